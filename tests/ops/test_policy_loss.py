"""The policy loss: formulas, kernels, oracles restated from verl and TRL, contracts."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops import checks
from torch import Tensor

import rlkern
from rlkern import PolicyObjective
from rlkern.ops.policy_loss import op, presets, reference, selection
from rlkern.ops.policy_loss.objective import LOSS_AGG_MODES
from rlkern.ops.policy_loss.reference import Kinds, Numbers
from rlkern.testing.numerics import assert_same_bits, assert_within_budget

OP = "policy_loss"
ROOT = Path(__file__).parents[2]
HORIZON = 37.0
# options that have no default
GIVEN = {
    "loss_scale_factor": HORIZON,
    "fspo_c": 0.05,
    "dro_beta": 0.3,
    "pos_margin": 0.2,
    "neg_margin": 0.1,
    "entropy_threshold": 0.7,
}
BASIC = ("ppo", "grpo", "dapo", "dr_grpo", "gspo", "cispo")


def preset(name: str, **overrides) -> PolicyObjective:
    required = presets.PRESETS[presets.NAMES.get(name, name)].required
    return PolicyObjective.preset(name, **{k: GIVEN[k] for k in required} | overrides)


class Batch:
    """Padded tensors with a prefix mask, and the same tokens packed."""

    def __init__(self, lengths, columns=None, spread=0.3, dtype=torch.float64, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        rows, columns = len(lengths), columns or max(lengths)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        # below 0: some objectives read probabilities
        self.logprob = -(normal(rows, columns) - 2).abs() - 0.01
        self.old = (self.logprob + spread * normal(rows, columns)).clamp(max=-0.001)
        self.rollout = (self.old + 0.2 * normal(rows, columns)).clamp(max=-0.001)
        self.ref = self.logprob + 0.4 * normal(rows, columns)
        self.entropy = normal(rows, columns).abs()
        self.advantages = normal(rows)
        self.chosen = normal(rows, columns).relu()
        self.mask = torch.arange(columns) < self.lengths[:, None]
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def packed(self, value: Tensor) -> Tensor:
        return value[self.mask]


# --- formulas ---------------------------------------------------------------------------------

OBJECTIVES = {
    **{name: preset(name) for name in presets.PRESETS},
    "dual clip": preset("dapo", clip_ratio_c=1.5),
    "two-sided clip": preset("grpo", delta=1.4),
    "no clip": PolicyObjective(epsilon_low=None, epsilon_high=None),
    "narrow clamp": preset("ppo", log_ratio_clamp=0.15),
    "gspo, dual clip": preset("gspo", epsilon_low=0.02, epsilon_high=0.03, clip_ratio_c=1.05),
    "detached sequence ratio": preset("cispo", importance_sampling_level="sequence"),
    "detached, both sides": preset(
        "cispo", cispo_max_ratio=None, epsilon_low=0.1, epsilon_high=0.2
    ),
    **{
        f"{kind}, entropy": preset("grpo", kl_coef=0.2, kl_type=kind, entropy_coef=0.1)
        for kind in ("k1", "k2", "k3", "abs")
    },
    **{
        f"{level}, r k3": preset(
            "ppo", importance_sampling_level=level, kl_coef=0.2, use_bias_correction_kl=True
        )
        for level in ("token", "sequence")
    },
    "entropy band": preset(
        "ppo", entropy_low=0.4, entropy_low_coef=0.2, entropy_high=0.9, entropy_high_coef=0.3
    ),
    "kl to the rollout": preset("grpo", kl_coef=0.2, kl_against="rollout"),
    "minpro, clipped": preset(
        "minpro", surrogate="clip", cispo_max_ratio=None, epsilon_low=0.2, epsilon_high=0.28
    ),
    "sequence, truncated": preset("tis", rollout_is="sequence", rollout_is_threshold=1.1),
    "geometric, masked": preset("icepop", rollout_is="geometric", rollout_is_low=0.95),
    "tokens rejected": preset("ppo", rollout_rs="token_k1", rollout_rs_threshold="0.8_1.3"),
    "both rejected": preset(
        "grpo", rollout_rs="token_k3,seq_max_k2", rollout_rs_threshold="0.05,0.1"
    ),
    "off-policy sequences": preset("grpo", off_policy_mask_threshold=0.01),
    "k3, clamped": preset(
        "dapo", kl_coef=0.2, kl_input_clamp_value=0.5, kl_output_clamp_value=0.05
    ),
    **{
        mode: PolicyObjective(
            loss_agg_mode=mode, loss_scale_factor=HORIZON if mode.endswith("norm") else None
        )
        for mode in LOSS_AGG_MODES
    },
    "count empty": preset("grpo", count_empty=True),
    "likelihood": preset("gspo", nll_coef=0.2),
    "normalised by tokens": preset("icepop", rollout_is_batch_normalize=True),
    "normalised by sequences": preset("mis", rollout_is_batch_normalize=True),
}


def reference_args(batch: Batch, objective: PolicyObjective, logprob, entropy) -> tuple:
    tensors = (logprob, batch.old, batch.advantages, None, batch.mask, batch.rollout, batch.ref)
    return (*tensors, entropy, batch.chosen, None, objective.kinds, objective.numbers, True, True)


def segments_of(objective: PolicyObjective, cu_seqlens: Tensor) -> Tensor | None:
    """Two segments for every sequence, where the objective has segments."""
    if objective.importance_sampling_level != "segment":
        return None
    middle = (cu_seqlens[:-1] + cu_seqlens[1:]) // 2
    return torch.cat([cu_seqlens, middle]).sort().values


@pytest.mark.parametrize("name", OBJECTIVES)
def test_reference_gradient_is_the_derivative(name):
    batch, objective = Batch([5, 0, 9, 1]), OBJECTIVES[name]
    logprob = batch.logprob.clone().requires_grad_()
    entropy = batch.entropy.clone().requires_grad_()
    loss, _, grad, grad_entropy = reference.forward(
        *reference_args(batch, objective, logprob, entropy)
    )
    want = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
    torch.testing.assert_close(grad, want[0], rtol=1e-12, atol=1e-15)
    if objective.entropy_coef:
        torch.testing.assert_close(grad_entropy, want[1], rtol=1e-12, atol=1e-15)
    assert (grad[~batch.mask] == 0).all()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, o in OBJECTIVES.items()
        if o.surrogate
        in ("clip", "quadratic", "regression", "soft_gate", "squared", "shaped", "geometric")
        and o.importance_sampling_level in ("token", "sequence")
        and o.selection is None
        and not o.kl_type.endswith("+")
    ],
)
def test_gradient_is_that_of_central_differences(name):
    batch, objective = Batch([4, 0, 6, 1]), OBJECTIVES[name]

    def run(logprob, entropy):
        return rlkern.policy_loss(
            logprob,
            batch.packed(batch.old),
            batch.advantages,
            cu_seqlens=batch.cu_seqlens,
            objective=objective,
            ref_logprob=batch.packed(batch.ref),
            rollout_logprob=batch.packed(batch.rollout),
            entropy=entropy,
            nll_weight=batch.packed(batch.chosen),
        ).loss

    inputs = [batch.packed(x).clone().requires_grad_() for x in (batch.logprob, batch.entropy)]
    assert torch.autograd.gradcheck(run, inputs)


def test_detached_gradient_freezes_the_weight():
    """-sg[clip(r)] A logprob: central differences with the weights held."""
    batch = Batch([6, 3])
    logprob, old = batch.packed(batch.logprob), batch.packed(batch.old)
    a = batch.advantages.repeat_interleave(batch.lengths)
    objective = preset("cispo", epsilon_low=0.3, cispo_max_ratio=1.2)
    x = logprob.clone().requires_grad_()
    out = rlkern.policy_loss(
        x, old, batch.advantages, cu_seqlens=batch.cu_seqlens, objective=objective
    )
    (grad,) = torch.autograd.grad(out.loss, x)
    weight = (logprob - old).exp().clamp(0.7, 1.2)
    torch.testing.assert_close(grad, -weight * a / 9)
    torch.testing.assert_close(out.loss, (-weight * a * logprob).sum() / 9)


RATIOS = (0.05, 0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0, 2.99, 3.01, 20.0)


@pytest.mark.parametrize("kernel_of", ["public float64", "native", "triton", "reference"])
def test_dual_clip_table(kernel_of, device):
    """g / (-A): A > 0: r up to 1.28, then 0; A < 0: 0 below 0.8, r up to 3, then 0."""
    positive = [r if r <= 1.28 else 0.0 for r in RATIOS]
    negative = [r if 0.8 <= r <= 3 else 0.0 for r in RATIOS]
    objective = preset("dapo", clip_ratio_c=3.0, loss_agg_mode="token-sum")
    double = kernel_of == "public float64"
    kind = torch.float64 if double else torch.float32
    x = torch.tensor(RATIOS, dtype=torch.float64).log().to(device, kind)
    for a, want in ((1.0, positive), (-1.0, negative), (0.0, [0.0] * len(RATIOS))):
        advantages = torch.full_like(x, a)
        if double:
            live = x.clone().requires_grad_()
            out = rlkern.policy_loss(live, torch.zeros_like(x), advantages, objective=objective)
            (grad,) = torch.autograd.grad(out.loss, live)
        else:
            found = [k for k in checks.kernels(OP, device) if k.name == kernel_of]
            if not found:
                pytest.skip(f"no {kernel_of} kernel here")
            tensors = (x, torch.zeros_like(x), advantages, *(None,) * 7)
            grad = found[0].forward(
                *tensors, list(objective.kinds), list(objective.numbers), True, False
            )[2]
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(-grad.cpu().double() * (a or 1.0), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", BASIC)
def test_on_policy_the_gradient_is_minus_the_advantage(name):
    batch = Batch([5, 2, 7], dtype=torch.float32)
    live = batch.logprob.clone().requires_grad_()
    out = rlkern.policy_loss(
        live, batch.logprob, batch.advantages, mask=batch.mask, objective=preset(name)
    )
    (grad,) = torch.autograd.grad(out.loss, live)
    a = batch.advantages[:, None].expand_as(live)
    n = batch.lengths[:, None]
    weight = {"seq-mean-token-mean": 1 / (3 * n), "token-mean": torch.full_like(n, 1) / 14}
    want = -a * weight.get(preset(name).loss_agg_mode, torch.full_like(n, 1) / (3 * HORIZON))
    torch.testing.assert_close(grad, torch.where(batch.mask, want, 0.0))
    for key in ("ratio_mean", "ratio_min", "ratio_max"):
        assert out.metrics[key] == 1
    for key in ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"):
        assert out.metrics[key] == 0


# --- oracles: verl's and TRL's formulas, written out with autograd ------------------------------


def verl_agg_loss(loss: Tensor, mask: Tensor, mode: str, horizon: float) -> Tensor:
    """core_algos.agg_loss; sequences without tokens are not counted."""
    mask = mask.to(loss)
    if mode == "token-mean":
        return (loss * mask).sum() / mask.sum()
    if mode == "token-sum":
        return (loss * mask).sum()
    per_sequence = (loss * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        per_sequence = per_sequence / (mask.sum(-1) + 1e-8)
    filled = (mask.sum(-1) > 0).to(loss)
    mean = (per_sequence * filled).sum() / filled.sum()
    return mean / horizon if mode == "seq-mean-token-sum-norm" else mean


def verl_tokens(kind: str, live: Tensor, old: Tensor, a: Tensor, mask: Tensor, o) -> dict:
    """compute_policy_loss_vanilla, _gspo and _cispo: token losses and the metrics."""

    def mean(x):
        return (x.to(live) * mask).sum() / mask.sum()

    negative_approx_kl = torch.clamp(live - old, min=-20.0, max=20.0)
    if kind == "gspo":
        lengths = mask.sum(-1).clamp(min=1)
        sequence = ((live - old) * mask).sum(-1) / lengths
        log_ratio = live - live.detach() + sequence.detach()[:, None]
        ratio = torch.exp(torch.clamp(log_ratio, max=10.0))
    else:
        ratio = torch.exp(negative_approx_kl)
    low, high = 1 - o.epsilon_low, 1 + o.epsilon_high
    if kind == "cispo":
        clipped = torch.clamp(ratio, low, high).detach()
        return {"loss": -a * clipped * live, "pg_clipfrac": mean(ratio != clipped)}
    losses1 = -a * ratio
    losses2 = -a * torch.clamp(ratio, low, high)
    loss = torch.maximum(losses1, losses2)
    metrics = {"pg_clipfrac": mean(torch.gt(losses2, losses1)), "ppo_kl": mean(-negative_approx_kl)}
    if o.clip_ratio_c is not None:
        losses3 = -a * o.clip_ratio_c
        metrics["pg_clipfrac_lower"] = mean((loss > losses3) & (a < 0))
        loss = torch.where(a < 0, torch.min(losses3, loss), loss)
    return {"loss": loss, **metrics}


def verl_kl(live: Tensor, ref: Tensor, kind: str) -> Tensor:
    if kind == "k1":
        return live - ref
    if kind == "k2":
        return 0.5 * (live - ref).square()
    kl = torch.clamp(ref - live, min=-20, max=20)
    return torch.clamp(torch.exp(kl) - kl - 1, min=-10, max=10)


VERL = {
    "ppo": ("vanilla", {}),
    "dual clip": ("vanilla", {"clip_ratio_c": 1.3}),
    "wide": ("vanilla", {"epsilon_high": 0.28}),
    "gspo": ("gspo", {"importance_sampling_level": "sequence"}),
    "cispo": ("cispo", {"surrogate": "detached"}),
}


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", VERL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_verl(name, mode, kl_type, dtype):
    kind, fields = VERL[name]
    objective = PolicyObjective(
        **fields,
        loss_agg_mode=mode,
        loss_scale_factor=HORIZON if mode.endswith("norm") else None,
        kl_coef=0.3,
        kl_type=kl_type,
        kl_output_clamp_value=10.0,
        entropy_coef=0.05,
    )
    # sequence ratios are means: a wider spread so that some are clipped
    batch = Batch([7, 0, 12, 3, 1, 20], spread=1.0 if kind == "gspo" else 0.4)
    live = batch.logprob.clone().requires_grad_()
    entropy = batch.entropy.clone().requires_grad_()
    mask, a = batch.mask, batch.advantages[:, None]
    want = verl_tokens(kind, live, batch.old, a, mask, objective)

    def agg(x):
        return verl_agg_loss(x, mask, mode, HORIZON)

    loss = agg(want.pop("loss")) - 0.05 * agg(entropy)
    loss = loss + 0.3 * agg(verl_kl(live, batch.ref, kl_type))
    want_grads = torch.autograd.grad(loss, (live, entropy))

    ours = [x.detach().to(dtype).requires_grad_() for x in (live, entropy)]
    out = rlkern.policy_loss(
        ours[0],
        batch.old.to(dtype),
        batch.advantages.to(dtype),
        mask=mask,
        objective=objective,
        ref_logprob=batch.ref.to(dtype),
        entropy=ours[1],
    )
    got_grads = torch.autograd.grad(out.loss, ours)
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if exact else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(out.loss.double(), loss, **tolerance)
    for got, wanted in zip(got_grads, want_grads):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance["rtol"], atol=1e-8)
    assert 0 < out.metrics["pg_clipfrac"] < 1
    for key, value in want.items():
        torch.testing.assert_close(out.metrics[key].double(), value, **tolerance)


def trl_loss(live, old, ref, a, mask, loss_type, level, low, high, delta, beta) -> Tensor:
    """GRPOTrainer._compute_loss."""
    log_ratio = live - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if loss_type == "cispo":
        clamped = torch.clamp(coef_1, max=high).detach()
        loss = -clamped * a * live
    else:
        coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
        if delta is not None:
            coef_1 = torch.clamp(coef_1, max=delta)
        loss = -torch.min(coef_1 * a, coef_2 * a)
    if beta:
        kl = torch.exp(ref - live) - (ref - live) - 1
        loss = loss + beta * kl
    loss, mask = loss.expand_as(mask), mask.to(loss)
    if loss_type == "grpo":
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "dr_grpo":
        return (loss * mask).sum() / (loss.size(0) * HORIZON)
    # bnpo; dapo and cispo with one process and one micro-batch
    return (loss * mask).sum() / mask.sum().clamp(min=1.0)


TRL = {
    "grpo": {"objective": "grpo", "fields": {"count_empty": True}},
    "dr_grpo": {
        "objective": "dr_grpo",
        "fields": {"count_empty": True, "loss_scale_factor": HORIZON},
    },
    "dapo": {"objective": "dapo", "fields": {}},
    "cispo": {"objective": "cispo", "fields": {"cispo_max_ratio": 1.4}},
}


@pytest.mark.parametrize("loss_type", TRL)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.1, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_equals_trl(loss_type, level, delta, beta):
    if loss_type == "cispo" and (level == "sequence" or delta):
        pytest.skip("TRL has no such objective")
    high = {"dapo": 0.28, "cispo": 1.4}.get(loss_type, 0.2)
    case = TRL[loss_type]
    fields = {"importance_sampling_level": level, "log_ratio_clamp": None, "beta": beta}
    if delta:
        fields["delta"] = delta
    objective = PolicyObjective.preset(case["objective"], **case["fields"], **fields)
    batch = Batch([7, 0, 12, 3, 1, 20], spread=0.5)
    live = batch.logprob.clone().requires_grad_()
    a = batch.advantages[:, None]
    low = 0.2
    loss = trl_loss(
        live, batch.old, batch.ref, a, batch.mask, loss_type, level, low, high, delta, beta
    )
    (want,) = torch.autograd.grad(loss, live)
    ours = live.detach().requires_grad_()
    out = rlkern.policy_loss(
        ours,
        batch.old,
        batch.advantages,
        mask=batch.mask,
        objective=objective,
        ref_logprob=batch.ref,
    )
    (got,) = torch.autograd.grad(out.loss, ours)
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# --- kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    checks.check_budget(OP, device, dtype)


def test_small_gradients_are_as_exact_as_large_ones(device):
    """The budget's floor is absolute; a token's coefficient is of the size of 1 / N."""
    for name, args in checks.parts(OP)[1].sample_inputs(device, torch.float32):
        double = tuple(
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        )
        truth = reference.forward(*double)
        for kernel in checks.kernels(OP, device):
            got = kernel.forward(*args)
            for i in (2, 3):
                torch.testing.assert_close(
                    got[i].double(),
                    truth[i],
                    rtol=2e-5,
                    atol=1e-9,
                    msg=lambda m, what=f"{kernel.name} {name}": f"{what}: {m}",
                )


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set_is_as_exact(isa):
    """The lanes that this CPU would not choose; a set that it lacks falls to the next."""
    names = ("every_kernel_is_within_the_budget", "the_ratio_is_exact_to_the_last_place")
    tests = [f"{__file__}::test_{name}" for name in names]
    env = os.environ | {"RLKERN_CPU_ISA": isa, "TRITON_INTERPRET": "0"}
    wanted = ["-k", "cpu or last_place", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *tests, *wanted]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "4 passed" in run.stdout


def test_the_ratio_is_exact_to_the_last_place():
    """With an advantage of -1 and no bounds the coefficient of `detached` is the ratio."""
    x = torch.cat([torch.zeros(1), torch.linspace(-87, 87, 1_000_003)])
    objective = rlkern.PolicyObjective(
        surrogate="detached",
        epsilon_low=None,
        epsilon_high=None,
        log_ratio_clamp=87.0,
        loss_agg_mode="token-sum",
    )
    live = x.clone().requires_grad_()
    loss = rlkern.policy_loss(live, x * 0, x * 0 - 1, objective=objective).loss
    (ratio,) = torch.autograd.grad(loss, live)
    truth = x.double().exp()
    ulp = torch.exp2(truth.log2().floor() - 23)
    assert ((ratio.double() - truth) / ulp).abs().max() < 1.5
    assert ratio[0] == 1


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_same_bits_twice_and_on_any_number_of_threads(device):
    checks.check_deterministic(OP, device, torch.float32)


def test_same_bits_on_any_number_of_threads_when_long():
    batch = Batch([9000, 1, 30000, 700, 12345], dtype=torch.float32)
    threads = torch.get_num_threads()
    for name in ("grpo", "gspo"):
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            live = batch.packed(batch.logprob).requires_grad_()
            out = rlkern.policy_loss(
                live,
                batch.packed(batch.old),
                batch.advantages,
                cu_seqlens=batch.cu_seqlens,
                objective=name,
            )
            (grad,) = torch.autograd.grad(out.loss, live)
            results.append((out.loss, grad, torch.stack(list(out.metrics.values()))))
        torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other):
                assert_same_bits(name, a, b)


# a value that differs from the default, for each field, and what has to stand beside it to matter
FIELDS = {
    "surrogate": (1, {}),
    "level": (1, {}),
    "from_rollout": (1, {}),
    "correction": (2, {"correction": 1}),
    "correction_masks": (1, {"correction": 1, "correction_high": 1.1}),
    "token_rejection": (2, {"token_rejection": 1, "token_rejection_high": 0.1}),
    "sequence_rejection": (
        2,
        {"sequence_rejection": 1, "rejection_reduction": 2, "sequence_rejection_high": 0.01},
    ),
    "rejection_reduction": (
        3,
        {"sequence_rejection": 3, "rejection_reduction": 2, "sequence_rejection_high": 0.05},
    ),
    "count_rejected": (1, {"token_rejection": 1, "token_rejection_high": 0.1}),
    "kl_type": (1, {}),
    "kl_times_ratio": (1, {}),
    "denominator": (3, {}),
    "divide_by_length": (0, {}),
    "p0": (0.93, {}),
    "p1": (1.47, {}),
    "p2": (1.29, {}),
    "p3": (1.0, {"surrogate": 5, "p0": 0.03, "p1": 0.02, "p2": 9.0}),
    "p4": (0.9, {"surrogate": 3, "p0": 1.4, "p1": 1.3, "p2": 1.1, "p3": 1.7, "p4": 0.6, "p5": 1.0}),
    "p5": (0.7, {"surrogate": 3, "p0": 1.4, "p1": 1.3, "p2": 1.1, "p3": 1.7, "p4": 0.6, "p5": 1.0}),
    "log_ratio_clamp": (0.31, {}),
    "correction_low": (0.93, {"correction": 1}),
    "correction_high": (1.07, {"correction": 1}),
    "token_rejection_low": (-0.11, {"token_rejection": 1}),
    "token_rejection_high": (0.13, {"token_rejection": 1}),
    "sequence_rejection_low": (0.05, {"sequence_rejection": 1, "rejection_reduction": 1}),
    "sequence_rejection_high": (0.1, {"sequence_rejection": 1, "rejection_reduction": 1}),
    "off_policy_limit": (-0.5, {}),
    "kl_coef": (0.83, {}),
    "kl_input_clamp": (0.23, {}),
    "kl_output_clamp": (0.019, {}),
    "entropy_coef": (0.57, {}),
    "entropy_low": (0.61, {"entropy_low_coef": 0.2}),
    "entropy_high": (0.77, {"entropy_high_coef": 0.2}),
    "entropy_low_coef": (0.41, {"entropy_low": 0.6}),
    "entropy_high_coef": (0.43, {"entropy_high": 0.8}),
    "entropy_from": (0.52, {"entropy_low": 0.6, "entropy_low_coef": 0.2}),
    "nll_coef": (0.29, {}),
    "scale": (0.611, {}),
}
SCALARS = {"kl_coef": 0.37, "entropy_coef": 0.21, "p1": 1.13, "p2": 1.71, "kl_output_clamp": 5.0}


def scalars(**options) -> tuple[list[int], list[float]]:
    """The schema's kinds and numbers."""
    kinds = Kinds(**{k: v for k, v in options.items() if k in Kinds._fields})
    numbers = Numbers(**{k: v for k, v in options.items() if k in Numbers._fields})
    return list(kinds), list(numbers)


def test_every_field_has_a_value_to_test_with():
    assert list(FIELDS) == [*Kinds._fields, *Numbers._fields]


@pytest.mark.parametrize("field", [*FIELDS, "want_grad", "want_entropy_grad"])
def test_scalars_reach_every_kernel(field):
    """The stable ABI does not compare C++ parameter types with the schema."""
    batch = Batch([9, 0, 40, 13], dtype=torch.float32, spread=0.6)
    names = ("logprob", "old", "rollout", "ref", "entropy", "chosen")
    live, old, rollout, ref, entropy, nll = (batch.packed(getattr(batch, n)) for n in names)
    a = torch.tensor([0.7, 1.0, -1.3, -0.4])
    value, beside = FIELDS.get(field, (None, {}))
    wants = {"want_grad": True, "want_entropy_grad": True}

    def run(function, options, wants):
        tensors = (live, old, a, batch.cu_seqlens, None, rollout, ref, entropy, nll, None)
        return function(*tensors, *scalars(**options), *wants.values())

    start = SCALARS | beside
    changed = start if value is None else start | {field: value}
    chosen = wants | ({field: False} if value is None else {})
    want = run(reference.forward, changed, chosen)
    for kernel in checks.kernels(OP, "cpu"):
        before = run(kernel.forward, start, wants)
        got = run(kernel.forward, changed, chosen)
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        different = [x.shape != y.shape or not torch.equal(x, y) for x, y in zip(got, before)]
        assert any(different), f"{field} changed nothing"


@pytest.mark.parametrize("name", BASIC)
def test_masked_slots_may_hold_anything(device, name):
    batch = Batch([5, 0, 9, 1], columns=11, dtype=torch.float32)
    clean = None
    objective = preset(name, kl_coef=0.1, entropy_coef=0.1, nll_coef=0.1)
    spread = batch.advantages[:, None].repeat(1, 11)
    for junk in (0.0, float("nan"), float("inf"), float("-inf"), 1e30):
        tensors = (batch.logprob, batch.old, spread, batch.ref, batch.entropy, batch.chosen)
        live, old, a, ref, entropy, chosen = (
            torch.where(batch.mask, x, junk).to(device) for x in tensors
        )
        live.requires_grad_(), entropy.requires_grad_()
        out = rlkern.policy_loss(
            live,
            old,
            a,
            mask=batch.mask.to(device),
            objective=objective,
            ref_logprob=ref,
            entropy=entropy,
            nll_weight=chosen,
        )
        grads = torch.autograd.grad(out.loss, (live, entropy))
        for grad in grads:
            assert (grad.cpu()[~batch.mask] == 0).all()
        result = (out.loss, *grads, torch.stack(list(out.metrics.values())))
        clean = clean or result
        for a_result, b_result in zip(result, clean):
            assert_same_bits(f"{name} {junk}", a_result.abs(), b_result.abs())


def test_advantage_zero_gives_exactly_nothing(device):
    """Also where the ratio overflows, or a log-prob is not a number."""
    logprob = torch.tensor([-1.0, 0.0, float("nan"), -3.0])
    old = torch.tensor([-1e4, -500.0, -1.0, float("-inf")])
    a = torch.zeros(4)
    tensors = [x.to(device) for x in (logprob, old, a)]
    for surrogate in (0, 1):
        options = {"surrogate": surrogate, "log_ratio_clamp": math.inf, "denominator": 1}
        open_bounds = {"p0": -math.inf, "p1": math.inf, "p2": math.inf}
        for kernel in checks.kernels(OP, device):
            options_of = scalars(**options, **open_bounds)
            out = kernel.forward(*tensors, *(None,) * 7, *options_of, True, False)
            assert out[0] == 0, kernel.name
            assert (out[2] == 0).all(), kernel.name


@pytest.mark.parametrize("where", ["logprob", "old_logprob", "advantages", "ref_logprob"])
def test_nan_is_not_hidden(device, where):
    names = ("logprob", "old_logprob", "advantages", "ref_logprob")
    for surrogate in (0, 1):
        tensors = {name: torch.full((40,), -0.5 - i).to(device) for i, name in enumerate(names)}
        tensors[where][7] = float("nan")
        live, old, a, ref = tensors.values()
        options = scalars(surrogate=surrogate, kl_coef=0.1, denominator=1, p1=1.5)
        for kernel in checks.kernels(OP, device):
            tensors_of = (live, old, a, None, None, None, ref, None, None, None)
            out = kernel.forward(*tensors_of, *options, True, False)
            assert out[0].isnan(), kernel.name
            # with a detached weight and k3, a NaN in a log-prob reaches g through either
            assert out[2].isnan().nonzero().tolist() == [[7]], kernel.name


def test_bad_offsets_stay_in_bounds(device):
    """The public function checks them on the CPU; raw callers and other devices do not."""
    live = torch.randn(50).to(device)
    for offsets in ([3, 10, 47], [0, 60, 90], [-7, 20, 50], [0, 30, 10, 50], [5, 5], [99, 120]):
        cu_seqlens = torch.tensor(offsets).to(device)
        a = torch.ones(len(offsets) - 1).to(device)
        for kernel in checks.kernels(OP, device):
            if kernel.name == "reference":
                continue
            args = (live, live - 0.01, a, cu_seqlens, *(None,) * 6)
            grad = kernel.forward(*args, *scalars(), True, False)[2].cpu()
            assert grad.isfinite().all(), kernel.name
            if offsets == [3, 10, 47]:
                inside = torch.arange(50).ge(3) & torch.arange(50).lt(47)
                assert ((grad != 0) == inside).all(), kernel.name


# --- meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, o in OBJECTIVES.items()
        if o.importance_sampling_level != "segment" and o.selection != "clip_cov"
    ],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_packed_is_padded(name, per_token):
    batch, objective = (
        Batch([5, 0, 33, 1, 0, 17], columns=40, dtype=torch.float32),
        OBJECTIVES[name],
    )
    a = batch.advantages
    if per_token:
        a = a[:, None] + 0.1 * torch.randn(batch.logprob.shape)
    padded, packed = {}, {}
    for key in ("logprob", "old", "ref", "rollout", "entropy", "chosen"):
        padded[key] = getattr(batch, key).clone()
        packed[key] = batch.packed(padded[key])
    results = []
    for tensors, where, adv in (
        (padded, {"mask": batch.mask}, a),
        (packed, {"cu_seqlens": batch.cu_seqlens}, batch.packed(a) if per_token else a),
    ):
        live, h = tensors["logprob"].requires_grad_(), tensors["entropy"].requires_grad_()
        out = rlkern.policy_loss(
            live,
            tensors["old"],
            adv,
            objective=objective,
            ref_logprob=tensors["ref"],
            rollout_logprob=tensors["rollout"],
            entropy=h,
            nll_weight=tensors["chosen"],
            **where,
        )
        grads = torch.autograd.grad(out.loss, (live, h), allow_unused=True)
        if where.get("mask") is not None:
            grads = [None if g is None else batch.packed(g) for g in grads]
        results.append((out.loss, torch.stack(list(out.metrics.values())), *grads))
    for a_result, b_result in zip(*results):
        torch.testing.assert_close(a_result, b_result, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [m for m in LOSS_AGG_MODES if m != "token-sum"])
@pytest.mark.parametrize("on_device", [False, True])
def test_micro_batches_add_up(mode, on_device):
    lengths = [5, 12, 0, 3, 800, 1, 7]
    batch = Batch(lengths, dtype=torch.float32)
    objective = PolicyObjective(
        loss_agg_mode=mode,
        loss_scale_factor=HORIZON if mode.endswith("norm") else None,
        kl_coef=0.1,
        entropy_coef=0.02,
        nll_coef=0.3,
    )
    count = sum(lengths) if mode == "token-mean" else sum(n > 0 for n in lengths)
    normalizer = torch.tensor(float(count)) if on_device else count

    def run(first, last, **options):
        begin, end = batch.cu_seqlens[first], batch.cu_seqlens[last]
        live, old, ref, entropy = (
            batch.packed(x)[begin:end].clone()
            for x in (batch.logprob, batch.old, batch.ref, batch.entropy)
        )
        live.requires_grad_(), entropy.requires_grad_()
        out = rlkern.policy_loss(
            live,
            old,
            batch.advantages[first:last],
            cu_seqlens=batch.cu_seqlens[first : last + 1] - begin,
            objective=objective,
            ref_logprob=ref,
            entropy=entropy,
            nll_weight=batch.chosen[first:last, 0],
            **options,
        )
        return out.loss, *torch.autograd.grad(out.loss, (live, entropy))

    whole = run(0, 7)
    parts = [run(a, b, normalizer=normalizer) for a, b in ((0, 2), (2, 3), (3, 5), (5, 7))]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-6, atol=1e-7)
    for i in (1, 2):
        joined = torch.cat([p[i] for p in parts])
        if on_device:
            torch.testing.assert_close(joined, whole[i])
        else:
            assert_same_bits(f"gradient {i}", joined, whole[i])


def test_gspo_gradient_reaches_every_token_alike():
    batch = Batch([6, 11], dtype=torch.float64)
    live = batch.packed(batch.logprob).requires_grad_()
    objective = preset("gspo", epsilon_low=None, epsilon_high=None)
    out = rlkern.policy_loss(
        live,
        batch.packed(batch.old),
        batch.advantages,
        cu_seqlens=batch.cu_seqlens,
        objective=objective,
    )
    (grad,) = torch.autograd.grad(out.loss, live)
    for i, (a, b) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:])):
        s = (live[a:b] - batch.packed(batch.old)[a:b]).mean().exp().detach()
        want = (-batch.advantages[i] * s / (2 * (b - a))).expand(int(b - a))
        torch.testing.assert_close(grad[a:b], want)


def test_metrics():
    batch = Batch([6, 0, 30, 14], dtype=torch.float64, spread=0.5)
    objective = preset("dapo", clip_ratio_c=1.6)
    out = rlkern.policy_loss(
        batch.logprob,
        batch.old,
        batch.advantages,
        mask=batch.mask,
        objective=objective,
        ref_logprob=batch.ref,
        entropy=batch.entropy,
    )
    r = batch.packed((batch.logprob - batch.old).exp())
    a = batch.packed(batch.advantages[:, None].expand_as(batch.mask))
    delta = batch.packed(batch.logprob - batch.ref)
    low, high = (a < 0) & (r < 0.8), (a > 0) & (r > 1.28)
    want = {
        "num_tokens": torch.tensor(50.0),
        "pg_clipfrac": (low | high).double().mean(),
        "pg_clipfrac_lower": ((a < 0) & (r > 1.6)).double().mean(),
        "clip_ratio/low_mean": low.double().mean(),
        "clip_ratio/high_mean": high.double().mean(),
        "ppo_kl": -r.log().mean(),
        "ratio_mean": r.mean(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
        "kl": ((-delta).exp() + delta - 1).mean(),
        "entropy": batch.packed(batch.entropy).mean(),
    }
    assert list(out.metrics) == list(want) == list(op.METRICS[:11])
    for name, value in want.items():
        torch.testing.assert_close(out.metrics[name], value.double(), msg=name)
        assert value != 0, f"{name}: the case does not reach it"


def test_metrics_of_the_correction():
    """verl's names; the size of an equally weighted sample with this variance, as a share."""
    batch = Batch([6, 0, 30, 14], dtype=torch.float64)
    objective = preset(
        "tis", rollout_is_threshold=1.1, rollout_rs="token_k1", rollout_rs_threshold="0.7_1.2"
    )
    out = rlkern.policy_loss(
        batch.logprob,
        batch.old,
        batch.advantages,
        mask=batch.mask,
        objective=objective,
        rollout_logprob=batch.rollout,
    )
    d = batch.packed(batch.old - batch.rollout)
    kept = ((-d).exp() >= 0.7) & ((-d).exp() <= 1.2)
    w = d.exp().clamp(max=1.1)[kept]
    want = {
        "num_tokens": kept.sum().double(),
        "rollout_is_mean": w.mean(),
        "rollout_is_eff_sample_size": w.mean() ** 2 / w.square().mean(),
        "rollout_rs_masked_fraction": 1 - kept.double().mean(),
    }
    assert list(out.metrics)[-3:] == list(want)[1:]
    for name, value in want.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)
        assert 0 < value < 50, f"{name}: the case does not reach it"


def test_the_metric_of_r2vpos_constraint():
    """One step of its dual variable from the metric: kernel, reference."""
    batch = Batch([6, 0, 30, 14], spread=0.5)
    want = batch.packed(((batch.logprob - batch.old).exp() - 1).square()).mean()
    for dtype in (torch.float32, torch.float64):
        tensors = [x.to(dtype) for x in (batch.logprob, batch.old, batch.advantages)]
        out = rlkern.policy_loss(*tensors, mask=batch.mask, objective="r2vpo")
        assert list(out.metrics)[-1] == "ratio_variance"
        torch.testing.assert_close(out.metrics["ratio_variance"].double(), want, rtol=1e-5, atol=0)


def test_kl_near_zero_does_not_cancel(device):
    """k3 of D = 1e-4 is 5e-9; exp(-D) + D - 1 in float32 has an error of 6e-8."""
    live = torch.linspace(-3e-4, 3e-4, 4001).to(device)
    zero = torch.zeros_like(live)
    want = live.cpu().double().square().mean() / 2
    options = scalars(kl_coef=1.0, denominator=1)
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        tensors = (zero + live, zero, zero, None, None, None, zero, None, None, None)
        out = kernel.forward(*tensors, *options, True, False)
        assert out[1][9].item() == pytest.approx(want.item(), rel=1e-4), kernel.name


def test_unrequested_gradients_cost_nothing():
    batch = Batch([4, 6], dtype=torch.float32)
    args = (batch.logprob, batch.old, batch.advantages)
    out = rlkern.policy_loss(*args, mask=batch.mask, entropy=batch.entropy)
    assert not out.loss.requires_grad
    live = batch.logprob.clone().requires_grad_()
    out = rlkern.policy_loss(live, *args[1:], mask=batch.mask)
    assert out.loss.requires_grad
    assert not any(m.requires_grad for m in out.metrics.values())
    storage = {m.untyped_storage().data_ptr() for m in out.metrics.values()}
    assert len(storage) == 1, "metrics are views of one tensor"
    assert "kl" not in out.metrics
    assert "entropy" not in out.metrics


def test_upstream_scalar_and_second_backward():
    batch = Batch([4, 6], dtype=torch.float32)
    live = batch.logprob.clone().requires_grad_()
    out = rlkern.policy_loss(live, batch.old, batch.advantages, mask=batch.mask)
    (once,) = torch.autograd.grad(out.loss, live, retain_graph=True)
    (tripled,) = torch.autograd.grad(-3.0 * out.loss, live)
    torch.testing.assert_close(tripled, -3 * once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    batch = Batch([9, 30], dtype=dtype)
    live = batch.logprob.clone().requires_grad_()
    out = rlkern.policy_loss(live, batch.old, batch.advantages, mask=batch.mask)
    (grad,) = torch.autograd.grad(out.loss, live)
    wide = batch.logprob.float().requires_grad_()
    args = (batch.old.float(), batch.advantages.float())
    want = rlkern.policy_loss(wide, *args, mask=batch.mask)
    (want_grad,) = torch.autograd.grad(want.loss, wide)
    assert out.loss.dtype == torch.float32
    assert_same_bits("loss", out.loss, want.loss)
    assert_same_bits("gradient", grad, want_grad.to(dtype))


def test_strided_inputs():
    batch = Batch([4, 6, 3], dtype=torch.float32)
    want = rlkern.policy_loss(batch.logprob, batch.old, batch.advantages, mask=batch.mask)
    spread = [x.T.contiguous().T for x in (batch.logprob, batch.old, batch.mask)]
    a = batch.advantages.repeat_interleave(2)[::2]
    got = rlkern.policy_loss(spread[0], spread[1], a, mask=spread[2])
    assert_same_bits("loss", got.loss, want.loss)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_a_sequence_of_128k_tokens_and_many_short_ones(name):
    for lengths in ([131072, 3], [1] * 70_000):
        batch = Batch(lengths, dtype=torch.float32) if len(lengths) < 9 else None
        tokens = sum(lengths)
        live = torch.randn(tokens) if batch is None else batch.packed(batch.logprob)
        old = live + 0.01 * torch.randn(tokens)
        a = torch.randn(len(lengths))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        results = []
        for kind in (torch.float32, torch.float64):
            x = live.to(kind).requires_grad_()
            # wide bounds: no ratio lies so near to one that rounding decides
            objective = preset(name, epsilon_low=0.3, epsilon_high=0.3)
            out = rlkern.policy_loss(
                x, old.to(kind), a.to(kind), cu_seqlens=cu_seqlens, objective=objective
            )
            results.append((out.loss, *torch.autograd.grad(out.loss, x)))
        for got, want in zip(*results):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        *("grpo", "gspo", "cispo", "minpro", "mhpo", "kl_cov", "r2vpo", "srft"),
        *("normalised by tokens", "normalised by sequences"),
    ],
)
def test_compiles_whole(name):
    batch = Batch([5, 0, 9], dtype=torch.float32)

    def loss(live, old, rollout, a, cu_seqlens):
        out = rlkern.policy_loss(
            live,
            old,
            a,
            cu_seqlens=cu_seqlens,
            objective=OBJECTIVES[name],
            rollout_logprob=rollout,
            nll_weight=a > 0,
        )
        return 2 * out.loss + 0 * out.metrics["ratio_mean"]

    live = batch.packed(batch.logprob).requires_grad_()
    old, rollout = batch.packed(batch.old), batch.packed(batch.rollout)
    args = (old, rollout, batch.advantages, batch.cu_seqlens)
    (want,) = torch.autograd.grad(loss(live, *args), live)
    (got,) = torch.autograd.grad(checks.compiled(loss)(live, *args), live)
    assert_same_bits("gradient", got, want)


@example([], "alp", False, False, False, False, 0.0, 0)  # nothing, with rollout_logprob
@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=9),
    name=st.sampled_from(
        sorted(
            name
            for name, o in OBJECTIVES.items()
            if o.selection is None and o.importance_sampling_level != "segment"
        )
    ),
    per_token=st.booleans(),
    padded=st.booleans(),
    narrow=st.booleans(),
    zeros=st.booleans(),
    spread=st.sampled_from([0.0, 0.1, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_any_segmentation(lengths, name, per_token, padded, narrow, zeros, spread, seed):
    random = torch.Generator().manual_seed(seed)
    rows, tokens = len(lengths), sum(lengths)
    columns = max(lengths, default=0) + 3
    shape = (rows, columns) if padded else (tokens,)
    live = -torch.randn(shape, generator=random).abs() - 0.01
    old = (live + spread * torch.randn(shape, generator=random)).clamp(max=-0.001)
    rollout = (old + 0.1 * torch.randn(shape, generator=random)).clamp(max=-0.001)
    ref, entropy = live + 0.3 * torch.randn(shape, generator=random), live.abs()
    chosen = torch.rand(rows, generator=random)
    a = torch.randn(shape if per_token else (rows,), generator=random)
    if zeros:
        a = a * (torch.rand(a.shape, generator=random) < 0.5)
    mask = torch.rand(rows, columns, generator=random) < 0.7 if padded else None
    cu_seqlens = None
    if not padded:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        cu_seqlens = cu_seqlens.int() if narrow else cu_seqlens
    if not padded and per_token and rows == tokens:
        return  # means one advantage per sequence
    objective = OBJECTIVES[name]
    x = live.clone().requires_grad_()
    out = rlkern.policy_loss(
        x,
        old,
        a,
        cu_seqlens=cu_seqlens,
        mask=mask,
        objective=objective,
        ref_logprob=ref,
        rollout_logprob=rollout,
        entropy=entropy,
        nll_weight=chosen,
    )
    (grad,) = torch.autograd.grad(out.loss, x)
    behind = rollout if objective.needs_rollout else None
    ref = rollout if objective.kl_against == "rollout" else ref
    if objective.rollout_is_batch_normalize:
        a = selection.normalised(objective, old, rollout, a, cu_seqlens, mask)
    nll = selection.per_token(live, chosen, cu_seqlens) if objective.nll_coef else None
    tensors = (live, old, a, cu_seqlens, mask, behind, ref, entropy, nll, None)
    options = (objective.kinds, objective.numbers, True, False)
    double = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    truth, peer = reference.forward(*double, *options), reference.forward(*tensors, *options)
    assert_within_budget("loss", out.loss, truth[0], peer[0])
    assert_within_budget("gradient", grad, truth[2], peer[2])
    got = torch.stack([out.metrics.get(name, x.float()) for name, x in zip(op.METRICS, truth[1])])
    # a ratio within rounding of a bound may fall on either side: one token
    slack = 1.01 / max(1, int(truth[1][0]))
    flags = [op.METRICS.index(m) for m in op.METRICS if "clip" in m]
    assert (got[flags] - truth[1][flags]).abs().max() <= slack
    rest = [i for i in range(len(op.METRICS)) if i not in flags]
    assert_within_budget("metrics", got[rest], truth[1][rest], peer[1][rest])


# --- refusals -----------------------------------------------------------------------------------

LIVE, ADV = torch.zeros(2, 3), torch.zeros(2)
FLAT, FLAT_ADV, CU = torch.zeros(5), torch.zeros(2), torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logprob": [1.0]}, TypeError, "expected logprob to be a Tensor, got list"),
        ({"logprob": LIVE.long()}, TypeError, "expected logprob of dtype float32 or"),
        (
            {"old_logprob": torch.zeros(2, 4)},
            ValueError,
            r"old_logprob of shape \(B, L\) = \(2, 3\)",
        ),
        ({"advantages": torch.zeros(7)}, ValueError, r"\(B,\) or \(B, L\) = \(2,\) or \(2, 3\)"),
        ({"advantages": ADV.int()}, TypeError, "advantages of dtype"),
        ({"mask": torch.ones(2, 3)}, TypeError, "expected mask of dtype bool, got float32"),
        ({"mask": torch.ones(3, 2).bool()}, ValueError, r"mask of shape \(B, L\) = \(2, 3\)"),
        ({"cu_seqlens": CU}, ValueError, r"logprob of shape \(T,\) with cu_seqlens"),
        ({"old_logprob": LIVE.to("meta")}, ValueError, "old_logprob on cpu like logprob, got meta"),
        ({"entropy": torch.zeros(2)}, ValueError, r"entropy of shape \(B, L\)"),
        ({"objective": 3}, TypeError, "objective to be a str or PolicyObjective, got int"),
        (
            {"objective": preset("grpo", kl_coef=0.1)},
            ValueError,
            r"expected ref_logprob of shape \(2, 3\) with kl_coef=0.1, got None",
        ),
        (
            {"objective": preset("grpo", entropy_coef=0.1)},
            ValueError,
            "expected entropy of shape .* with entropy_coef=0.1, got None",
        ),
        (
            {"objective": preset("grpo", nll_coef=0.1)},
            ValueError,
            r"nll_weight of shape \(2,\) or \(2, 3\) with nll_coef=0.1, got None",
        ),
        (
            {"objective": preset("grpo", nll_coef=0.1), "nll_weight": torch.ones(3)},
            ValueError,
            r"nll_weight of shape \(2,\) or \(2, 3\), got \(3,\)",
        ),
        (
            {"objective": preset("grpo", nll_coef=0.1), "nll_weight": ADV.int()},
            TypeError,
            "nll_weight of dtype float32 or .* or bool, got int32",
        ),
        (
            {
                "objective": preset("tis", rollout_is_batch_normalize=True),
                "rollout_logprob": LIVE,
                "normalizer": 7,
            },
            ValueError,
            "normalizer to be None with rollout_is_batch_normalize=True, .* got 7",
        ),
        ({"normalizer": 0}, ValueError, "normalizer to be positive and finite, got 0"),
        ({"normalizer": torch.ones(1)}, ValueError, r"normalizer of shape \(\) = \(\), got \(1,\)"),
        (
            {"normalizer": 4, "objective": preset("ppo", loss_agg_mode="token-sum")},
            ValueError,
            "normalizer to be None with loss_agg_mode='token-sum'",
        ),
    ],
)
def test_bad_padded_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"logprob": LIVE, "old_logprob": LIVE, "advantages": ADV} | change
    positional = [arguments.pop(n) for n in ("logprob", "old_logprob", "advantages")]
    with pytest.raises(error, match=f"policy_loss: .*{message}"):
        rlkern.policy_loss(*positional, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logprob": torch.zeros(1, 2, 3)}, ValueError, "expected"),
        (
            {"advantages": torch.zeros(7)},
            ValueError,
            r"\(S,\) or \(T,\) = \(2,\) or \(5,\), got \(7,\)",
        ),
        ({"mask": torch.ones(5).bool()}, ValueError, "mask to be None with packed log-probs"),
        ({"cu_seqlens": None}, ValueError, r"cu_seqlens of shape \(S \+ 1,\) with packed"),
        ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens of dtype int64 or int32, got float32"),
        ({"cu_seqlens": CU[None]}, ValueError, "cu_seqlens of shape"),
        ({"cu_seqlens": CU[:0]}, ValueError, "S >= 0"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 4])},
            ValueError,
            r"rise from 0 to T = 5, got \[0, 2, 4\]",
        ),
        ({"cu_seqlens": torch.tensor([1, 2, 5])}, ValueError, "rise from 0 to T = 5"),
        ({"cu_seqlens": torch.tensor([0, 7, 5])}, ValueError, "rise from 0 to T = 5"),
        (
            {"cu_seqlens": None, "objective": "ppo"},
            ValueError,
            r"advantages of shape \(T,\) \(no cu_seqlens\) = \(5,\), got \(2,\)",
        ),
        ({"objective": "grop"}, ValueError, "a_lol, aepo, .*, w_reinforce, got 'grop'"),
        (
            {"objective": "dr_grpo"},
            ValueError,
            "loss_scale_factor with .*maximum completion length",
        ),
    ],
)
def test_bad_packed_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"logprob": FLAT, "old_logprob": FLAT, "advantages": FLAT_ADV, "cu_seqlens": CU}
    arguments |= change
    positional = [arguments.pop(n) for n in ("logprob", "old_logprob", "advantages")]
    with pytest.raises(error, match=f"(policy_loss|PolicyObjective): .*{message}"):
        rlkern.policy_loss(*positional, **arguments)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"importance_sampling_level": "word"}, ValueError, "capped, product, .* got 'word'"),
        ({"surrogate": "sapo"}, ValueError, "one of balanced, banded, clip, detached"),
        ({"kl_type": "k4"}, ValueError, r"one of abs, k1, k1\+, k2, k3, k3\+"),
        ({"loss_agg_mode": "mean"}, ValueError, "one of seq-mean-token-mean"),
        ({"epsilon_low": -0.1}, ValueError, "epsilon_low to be at least 0 and finite, got -0.1"),
        ({"epsilon_high": "0.2"}, TypeError, "epsilon_high to be a number, got str"),
        ({"kl_coef": float("nan")}, ValueError, "kl_coef to be at least 0"),
        ({"clip_ratio_c": 1.0}, ValueError, "clip_ratio_c to be above 1"),
        ({"clip_ratio_c": 3.0, "delta": 2.0}, ValueError, "delta to be None with clip_ratio_c"),
        ({"surrogate": "detached", "delta": 2.0}, ValueError, "'detached', which does not read it"),
        ({"cispo_max_ratio": 5.0}, ValueError, "surrogate='clip', which does not read it"),
        ({"surrogate": "soft_gate", "epsilon_low": 0.1}, ValueError, "which does not read it"),
        ({"tau_pos": 1.0}, ValueError, "surrogate='clip': it is an option of 'soft_gate'"),
        ({"surrogate": "regression"}, ValueError, "dro_beta with .*, which has no default"),
        (
            {"surrogate": "banded", "fspo_c": 1},
            ValueError,
            "level to be 'product' with surrogate='banded'",
        ),
        (
            {"surrogate": "hazard", "importance_sampling_level": "product"},
            ValueError,
            "surrogate to be one of clip, detached, gamma_weight, banded",
        ),
        ({"rollout_is": "word"}, ValueError, "one of geometric, sequence, token"),
        ({"rollout_is_threshold": 2.0}, ValueError, "to be None without rollout_is"),
        (
            {"rollout_is": "token", "rollout_is_low": 3.0, "rollout_is_threshold": 2.0},
            ValueError,
            "at most rollout_is_threshold",
        ),
        ({"rollout_rs": "token_k1"}, ValueError, "'low_high' or one number above 0 for token_k1"),
        (
            {"rollout_rs": "token_k1,token_k2", "rollout_rs_threshold": "2,1"},
            ValueError,
            "one token and one sequence statistic",
        ),
        (
            {"rollout_rs": "token_k1,seq_sum_k2", "rollout_rs_threshold": "2"},
            ValueError,
            "as many bounds",
        ),
        (
            {"rollout_rs": "seq_max_k1", "rollout_rs_threshold": "2"},
            ValueError,
            "seq_max_k2 or seq_max_k3",
        ),
        ({"rollout_rs": "word_k1", "rollout_rs_threshold": "2"}, ValueError, "of token_k1..k3"),
        ({"rollout_rs_threshold": 2.0}, ValueError, "None without rollout_rs"),
        ({"count_rejected": True}, ValueError, "False without rollout_rs"),
        ({"selection": "entropy_above"}, ValueError, "entropy_threshold with .* no default"),
        ({"clip_cov_ub": 2.0}, ValueError, "it is an option of 'clip_cov'"),
        ({"selection": "kl_cov", "kl_coef": 0.1}, ValueError, "takes the place of the KL"),
        (
            {"use_bias_correction_kl": True, "importance_sampling_level": "prefix_min"},
            ValueError,
            "use_bias_correction_kl to be False",
        ),
        (
            {"use_bias_correction_kl": True, "kl_type": "k3+"},
            ValueError,
            "both correct the gradient",
        ),
        (
            {"surrogate": "detached", "cispo_max_ratio": 5.0},
            ValueError,
            "both bound the ratio from above",
        ),
        ({"rollout_is_batch_normalize": True}, ValueError, "to be False without rollout_is"),
        (
            {
                "surrogate": "quadratic",
                "rollout_is": "token",
                "rollout_is_batch_normalize": True,
                "epsilon_low": None,
                "epsilon_high": None,
            },
            ValueError,
            "surrogate='quadratic', not linear in A",
        ),
        ({"nll_coef": -0.1}, ValueError, "nll_coef to be at least 0"),
        ({"loss_scale_factor": 9.0}, ValueError, "which ignores it"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, ValueError, "loss_scale_factor with"),
        ({"count_empty": True}, ValueError, "it counts tokens"),
        ({"log_ratio_clamp": 0.0}, ValueError, "log_ratio_clamp to be positive"),
    ],
)
def test_impossible_objectives_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        PolicyObjective(**fields)


def test_presets():
    assert preset("grpo", beta=0.04) == preset("grpo", kl_coef=0.04)
    with pytest.raises(ValueError, match="two names of one number"):
        preset("grpo", beta=0.04, kl_coef=0.1)
    with pytest.raises(TypeError, match="no field epsilom; the fields are importance_sampling"):
        preset("grpo", epsilom=0.1)
    assert preset("dapo") == PolicyObjective(epsilon_high=0.28)
    assert preset("gspo").kinds.level == 1
    assert preset("gspo").numbers[:2] == (1 - 3e-4, 1 + 4e-4)
    assert preset("cispo").numbers[:2] == (-math.inf, 5.0)
    assert hash(preset("ppo")) == hash(PolicyObjective())
    changed = replace(preset("ppo"), clip_ratio_c=2.5)
    assert changed.numbers.p2 == 2.5
    # TRL's delta: the tighter bound for A > 0, the looser for A < 0
    assert preset("ppo", delta=1.1).numbers[1:3] == (1.1, 1.2)
    assert preset("ppo", delta=4.0).numbers[1:3] == (1.2, 4.0)


# --- C++ ----------------------------------------------------------------------------------------


def test_maths_header_against_double(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path / "test_policy_math"
    source = ROOT / "tests/csrc/test_policy_math.cpp"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc/include'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(binary)], check=True)
    run = subprocess.run([str(binary)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
