"""rlkern.integrations.trl in TRL's own trainers: the same run, less memory, more objectives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers.compare import BUDGET, DTYPES, Batch, describe, distance, relative

pytest.importorskip("trl")

from peers.test_trl import (  # noqa: F401
    HORIZON,
    LENGTHS,
    STEPS,
    _quiet,
    theirs,
    train,
    trainer,
)
from trl import GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

import rlkern
from rlkern import PolicyObjective
from rlkern.integrations import trl as integration
from rlkern.ops.policy_loss.presets import PRESETS

VOCAB, HIDDEN, TOKENS = 503, 32, 40
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TWINS = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")


# --- enabling ------------------------------------------------------------------------------------


def test_everything_is_put_back():
    from trl.experimental.cpo import cpo_trainer as importer

    before = {name: getattr(utils, name) for name in TWINS}
    bound = {name: vars(importer)[name] for name in TWINS if name in vars(importer)}
    assert bound, "a module of TRL that imports one of them by name"
    with integration.enable() as handle:
        assert integration.enable() is handle
        assert utils._ChunkedLogProbFunction is integration.LogprobHead
        for name in TWINS:
            assert getattr(utils, name) is getattr(integration, name)
        for name in bound:
            assert vars(importer)[name] is getattr(integration, name)
        # the fallback is TRL's own
        assert ChunkedLogProbFunction is not integration.LogprobHead
    assert not handle.enabled
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert {name: getattr(utils, name) for name in TWINS} == before
    assert {name: vars(importer)[name] for name in bound} == bound
    handle.disable()


def test_another_signature_is_refused_before_anything_changes(monkeypatch):
    def selective_log_softmax(logits, index, sharpness):
        return logits

    original = utils.selective_log_softmax
    monkeypatch.setattr(utils, "selective_log_softmax", selective_log_softmax)
    wanted = r"expected trl.trainer.utils.selective_log_softmax\(logits, index, temperature, row_"
    with pytest.raises(RuntimeError, match=wanted + r".*got trl 1\.16\.0: \(logits, index, sharp"):
        integration.enable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    monkeypatch.setattr(utils, "selective_log_softmax", original)
    integration.enable(lm_head=False).disable()


# --- the head ------------------------------------------------------------------------------------


def head_inputs(dtype=torch.float32) -> tuple:
    hidden = torch.randn(TOKENS, HIDDEN)
    weight = torch.randn(VOCAB, HIDDEN) * 3 / HIDDEN**0.5
    targets = torch.randint(VOCAB, (TOKENS,))
    return hidden.to(dtype), weight.to(dtype), torch.randn(VOCAB).to(dtype), targets


def run_head(
    function, hidden, weight, bias, targets, *, outputs=ALL, autocast=None, softcap=None, scale=1.0
):
    leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        values = function.apply(*leaves, targets, 0.7, 128, softcap, scale, outputs)
    upstream = torch.linspace(-1, 1, len(hidden))
    loss = (values[0] * upstream).sum()
    if values[1] is not None:
        loss = loss - (values[1] * upstream.flip(0)).sum()
    leaves = [x for x in leaves if x is not None]
    return values, torch.autograd.grad(loss, leaves)


CASES = {
    "plain": {},
    "scaled": {"scale": 0.5},
    "soft-capped": {"softcap": 8.0, "scale": 0.5},
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_all_five_outputs(case, biased, parity):
    hidden, weight, bias, targets = head_inputs()
    # soft-capped mean_logits are TRL's own: without them, ours
    outputs = ALL if case != "soft-capped" else tuple(n for n in ALL if n != "mean_logits")
    heads = (integration.LogprobHead, ChunkedLogProbFunction)
    args = (hidden, weight, bias if biased else None, targets)
    got, want = (run_head(head, *args, outputs=outputs, **CASES[case]) for head in heads)
    for x, y in zip(got[0], want[0]):
        assert (x is None) == (y is None)
    assert torch.equal(got[0][4], want[0][4])
    assert not got[0][2].requires_grad
    pairs = [(x, y) for x, y in zip(got[0][:4], want[0][:4]) if x is not None]
    parity(
        "integrations",
        "trl LogprobHead",
        f"TRL ChunkedLogProbFunction, {case}{', bias' * biased}: {', '.join(outputs)}",
        rlkern="integrations.trl.enable()",
        value=max(distance(x, y) for x, y in pairs),
        gradient=max(relative(x, y) for x, y in zip(got[1], want[1])),
        budget=2e-5,
    )


def test_what_is_left_to_trl(monkeypatch):
    hidden, weight, bias, targets = head_inputs()
    monkeypatch.setattr(rlkern, "linear_logprob", None)
    args = (hidden, weight, bias, targets)
    for options in ({"softcap": 8.0}, {"scale": -0.5}):
        got, want = (
            run_head(head, *args, **options)
            for head in (integration.LogprobHead, ChunkedLogProbFunction)
        )
        assert all(torch.equal(x, y) for x, y in zip(got[0], want[0]))
        assert all(torch.equal(x, y) for x, y in zip(got[1], want[1]))


def test_under_autocast_it_computes_in_16_bits_and_is_closer_to_float64():
    hidden, weight, bias, targets = head_inputs()
    args, outputs = (hidden, weight, bias, targets), ("log_probs", "entropy")
    rounded = [x.bfloat16().double() for x in (hidden, weight, bias)]
    truth, _ = run_head(ChunkedLogProbFunction, *rounded, targets, outputs=outputs)
    got, grads = run_head(integration.LogprobHead, *args, outputs=outputs, autocast=torch.bfloat16)
    want, _ = run_head(ChunkedLogProbFunction, *args, outputs=outputs, autocast=torch.bfloat16)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    for mine, other, exact in zip(got[:2], want[:2], truth[:2]):
        assert mine.dtype == torch.float32
        assert distance(mine, exact) < 1e-5
        assert distance(mine, exact) < 0.1 * distance(other, exact)


def test_no_valid_row():
    hidden, weight, bias, targets = (x[:0] for x in head_inputs())
    _, weight, bias, _ = head_inputs()
    values, grads = run_head(integration.LogprobHead, hidden, weight, bias, targets)
    assert [x.shape for x in values] == [(0,)] * 5
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("shape", [(5,), (3, 7)])
def test_logits_twins(shape, parity):
    base = torch.randn(*shape[:-1], shape[-1] + 1, VOCAB, requires_grad=True)
    index = torch.randint(VOCAB, shape)
    row_mask = torch.rand(shape) < 0.7
    several = torch.randint(VOCAB, (*shape, 3))
    # a slice, as trainers pass it
    logits = base[..., :-1, :]
    calls = [
        ("selective_log_softmax", (index,), {"temperature": 0.7}),
        ("selective_log_softmax", (index,), {"row_mask": row_mask}),
        ("selective_log_softmax", (several,), {"temperature": 1.3}),
        ("entropy_from_logits", (), {}),
        ("selective_log_softmax_and_entropy", (index,), {"temperature": 0.7}),
        ("selective_log_softmax_and_entropy", (index,), {"row_mask": row_mask}),
        ("selective_log_softmax_and_entropy", (index, False), {}),
    ]
    values, grads = [], []
    for name, args, options in calls:
        results = []
        for module in (integration, utils):
            out = getattr(module, name)(logits, *args, **options)
            out = out if isinstance(out, tuple) else (out,)
            live = [x for x in out if x.requires_grad]
            total = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in live)
            results.append((out, torch.autograd.grad(total, base)[0]))
        (got, got_grad), (want, want_grad) = results
        assert [x.requires_grad for x in got] == [x.requires_grad for x in want]
        values += [distance(x, y) for x, y in zip(got, want, strict=True)]
        grads.append(relative(got_grad, want_grad))
    parity(
        "integrations",
        "trl selective_log_softmax and kin",
        f"TRL's own, logits of {(*shape, VOCAB)}",
        rlkern="integrations.trl.enable()",
        value=max(values),
        gradient=max(grads),
        budget=2e-5,
    )


# --- a run ---------------------------------------------------------------------------------------


PEAK = Path(__file__).with_name("trl_peak.py")


@pytest.mark.slow
def test_a_run_takes_less_memory(parity):
    """Peak resident memory of a step's process above that before it, V = 32,000."""
    peaks = {}
    for how in ("trl", "rlkern"):
        done = subprocess.run(
            [sys.executable, PEAK, how],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            cwd=PEAK.parents[2],
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[how] = json.loads(done.stdout.splitlines()[-1])
    theirs, ours = (peaks[how]["mib"] for how in ("trl", "rlkern"))
    assert ours < 0.8 * theirs
    parity(
        "integrations",
        "trl GRPOTrainer",
        "2 steps of a tiny Qwen3, V=32000, 8 x 96 tokens: loss",
        rlkern="integrations.trl.enable()",
        value=abs(peaks["trl"]["loss"] - peaks["rlkern"]["loss"]),
        budget=1e-5,
        note=f"peak resident memory above the start of training {ours:.0f} MiB, "
        f"TRL's {theirs:.0f} MiB",
    )


# --- objectives ----------------------------------------------------------------------------------


class Given(integration.ObjectiveMixin, GRPOTrainer):
    """Its forward is replaced by leaves; see test_trl."""

    def __init__(self, *args, rlkern_objective, **kwargs):
        beta = rlkern_objective.pop("beta", 0.0)
        super().__init__(*args, **kwargs, rlkern_objective=rlkern_objective)
        # as an option, beta loads a reference model by the hub name of the first one
        self.args.beta = beta
        self.rlkern_objective = integration._objective(self.args, rlkern_objective)

    def give(self, logprob, entropy):
        self.given = (logprob, entropy, None)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.given


def given(objective):
    class GivenObjective(Given):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, rlkern_objective=dict(objective), **kwargs)

    return GivenObjective


# loss_type -> GRPOConfig's options; TRL computes them both ways
NATIVE = {
    "grpo": {"epsilon": 0.1, "epsilon_high": 0.15},
    "bnpo": {"epsilon": 0.1, "delta": 1.5},
    "dr_grpo": {"epsilon": 0.1},
    "dapo": {"epsilon": 0.1},
    "cispo": {"epsilon_high": 1.3},
    "sapo": {"sapo_temperature_pos": 1.2},
    "vespo": {"vespo_k_pos": 1.5},
}
SAME = {"log_ratio_clamp": None, "kl_input_clamp_value": None}
DAPO = {"epsilon_low": 0.1, "epsilon_high": 0.1}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", NATIVE)
def test_trls_losses_through_the_mixin(name, beta, tmp_path, parity):
    batch = Batch(LENGTHS)
    options = {"loss_type": name, "beta": beta, **NATIVE[name]}
    options["use_bias_correction_kl"] = name != "vespo"
    want, want_metrics, (want_grad, _) = theirs(tmp_path / "trl", batch, **options)
    # 20 is part of vespo
    over = SAME if name != "vespo" else {"kl_input_clamp_value": None}
    if name == "dapo":
        over = over | DAPO
    if beta:
        over = over | {"beta": beta}
    got, metrics, (grad, _) = theirs(tmp_path / "us", batch, cls=given(over), **options)
    parity(
        "integrations",
        f"trl ObjectiveMixin, {name}",
        f"GRPOTrainer._compute_loss, beta={beta}",
        rlkern=f"rlkern_objective={over}",
        value=distance(got, want),
        gradient=relative(grad, want_grad),
        budget=BUDGET[torch.float32],
    )
    assert metrics["entropy"] == pytest.approx(want_metrics["entropy"], rel=1e-5)
    for key in ("clip_ratio/low_mean", "clip_ratio/region_mean"):
        if key in want_metrics and "delta" not in options:
            assert metrics[key] == pytest.approx(want_metrics[key], abs=1e-6)


def test_accumulated_micro_batches_are_trls(tmp_path):
    """Training mode: dapo's count is the generation batch's, sequence means are divided."""
    for name, over in (("dapo", SAME | DAPO), ("grpo", SAME)):
        losses = []
        for cls in (None, given(over)):
            batch = Batch(LENGTHS)
            made = trainer(
                tmp_path,
                **({} if cls is None else {"cls": cls}),
                loss_type=name,
                epsilon=0.1,
                gradient_accumulation_steps=4,
                steps_per_generation=8,
            )
            made.current_gradient_accumulation_steps = 4
            made.model.train()
            if cls is None:
                made._get_per_token_logps_and_entropies = lambda *a, b=batch, **k: (
                    b.logprob,
                    b.entropy,
                    None,
                )
            else:
                made.give(batch.logprob, batch.entropy)
            rows, columns = batch.logprob.shape
            losses.append(
                made._compute_loss(
                    made.model,
                    {
                        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
                        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
                        "completion_ids": torch.zeros(rows, columns, dtype=torch.long),
                        "completion_mask": batch.mask.long(),
                        "advantages": batch.advantages,
                        "old_per_token_logps": batch.old,
                        "num_items_in_batch": torch.tensor(913),
                    },
                )
            )
        assert distance(losses[1], losses[0]) <= BUDGET[torch.float32]


REFUSED = {name: "nll_weight" for name, preset in PRESETS.items() if "nll_coef" in preset.fields}
REFUSED["rank_grpo"] = "cu_segments"
REFUSED["lightning_rl"] = "ref_logprob: set beta"
# numbers that a preset leaves to its user
NEEDED = {
    name: {field: 0.5 for field in preset.required if field != "loss_scale_factor"}
    for name, preset in PRESETS.items()
}
# all candidates: which it draws is random
NEEDED["clip_cov"] = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_loss_type(name, tmp_path, parity):
    batch = Batch(LENGTHS)
    batch.logprob.clamp_(max=-0.01)
    options = NEEDED[name]
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            trainer(tmp_path, cls=given(options), loss_type=name)
        return
    more = {"sampling_per_token_logps": batch.rollout}
    got, metrics, (grad, _) = theirs(tmp_path, batch, cls=given(options), loss_type=name, more=more)
    if "loss_scale_factor" in PRESETS[name].required:
        options = {"loss_scale_factor": HORIZON}
    ours = PolicyObjective.preset(name, **options)
    if ours.loss_agg_mode.startswith("seq-"):
        ours = PolicyObjective.preset(name, **options, count_empty=True)
    want, _, want_grad = batch.ours(
        ours,
        rollout_logprob=batch.rollout if ours.needs_rollout else None,
        entropy=batch.entropy,
    )
    assert got.isfinite()
    assert metrics["entropy"] > 0
    parity(
        "integrations",
        f"trl ObjectiveMixin, {name}",
        f"loss_type={name!r}: rlkern.policy_loss",
        rlkern=describe(ours),
        value=distance(got, want),
        gradient=relative(grad, want_grad),
        budget=BUDGET[torch.float32],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_vllms_importance_ratios_are_in_the_loss(dtype, tmp_path):
    """dapo x TRL's token ratio; an objective with its own correction takes that alone."""
    batch = Batch(LENGTHS, dtype=dtype)
    ratio = (batch.old - batch.rollout).exp().clamp(max=3.0)
    more = {"importance_sampling_ratio": ratio, "sampling_per_token_logps": batch.rollout}

    class Vllm:
        """The trainer believes that vLLM has sampled."""

        def _compute_loss(self, model, inputs):
            self.use_vllm = True
            return super()._compute_loss(model, inputs)

    from peers.test_trl import GivenLogprobs

    plain = type("Plain", (Vllm, GivenLogprobs), {})
    options = {"loss_type": "dapo", "epsilon": 0.1, "more": more}
    want, _, (want_grad, _) = theirs(tmp_path / "trl", batch, cls=plain, **options)
    ours = type("Ours", (Vllm, given(SAME | DAPO)), {})
    got, _, (grad, _) = theirs(tmp_path / "us", batch, cls=ours, **options)
    assert distance(got, want) <= BUDGET[torch.float32]
    assert relative(grad, want_grad) <= 10 * BUDGET[torch.float32]

    own = SAME | DAPO | {"rollout_is": "token", "rollout_is_threshold": 3.0}
    ours = type("Own", (Vllm, given(own)), {})
    got, _, (grad, _) = theirs(tmp_path / "own", batch, cls=ours, **options)
    assert distance(got, want) <= BUDGET[torch.float32]
    assert relative(grad, want_grad) <= 10 * BUDGET[torch.float32]


def test_an_unknown_loss_type_or_option_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected the objective to be one of .*got 'grpoo'"):
        trainer(tmp_path, cls=given({}), loss_type="grpoo")
    with pytest.raises(TypeError, match="no field clip"):
        trainer(tmp_path, cls=given({"clip": 1}), loss_type="minpro")
    with pytest.raises(ValueError, match="use_adaptive_entropy"):
        trainer(tmp_path, cls=given({}), loss_type="minpro", use_adaptive_entropy=True)


def test_minpro_trains(tmp_path):
    """20 steps, head and loss both ours."""
    cls = type("Trainer", (integration.ObjectiveMixin, GRPOTrainer), {})
    with integration.enable():
        steps, _ = train(tmp_path, cls=cls, loss_type="minpro", num_iterations=2, beta=0.0)
    # of the steps that generate
    rewards = [step["reward"] for step in steps if "reward" in step]
    assert len(rewards) == STEPS // 2
    assert all(step["grad_norm"] > 0 for step in steps)
