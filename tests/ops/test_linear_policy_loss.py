"""The loss straight from hidden states, against policy_loss of linear_logprob."""

import subprocess
import sys

import pytest
import torch
from ops import checks

import rlkern
from rlkern import PolicyObjective
from rlkern.ops import linear_policy_loss as op
from rlkern.ops.policy_loss.presets import PRESETS
from rlkern.testing.numerics import assert_same_bits

LENGTHS = (17, 1, 30, 0, 9, 23)
TOKENS, HIDDEN, VOCAB = sum(LENGTHS), 32, 310
# all logits kept; those of 128 rows of the vocabulary; those of 256 in float32; none
KEPT = (2**28, 50_000, 100_000, 0)


class Batch:
    """Packed sequences; log-probs near those of the head."""

    def __init__(self, dtype=torch.float32, lengths=LENGTHS, vocab=VOCAB):
        random = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=random)

        tokens = sum(lengths)
        self.hidden = normal(tokens, HIDDEN).to(dtype).requires_grad_()
        self.weight = (normal(vocab, HIDDEN) / 4).to(dtype).requires_grad_()
        self.bias = normal(vocab).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, (tokens,), generator=random)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        self.advantages = normal(len(lengths))
        self.advantages[2:3] = 0.0
        with torch.no_grad():
            exact = rlkern.linear_logprob(*self.head(), bias=self.bias, temperature=0.8).logprob
        self.old = exact + 0.3 * normal(tokens)
        self.options = {
            "cu_seqlens": self.cu_seqlens,
            "ref_logprob": exact + 0.2 * normal(tokens),
            "rollout_logprob": self.old + 0.1 * normal(tokens),
            "nll_weight": torch.rand(len(lengths), generator=random),
        }

    def head(self):
        return self.hidden, self.weight, self.targets

    def inputs(self):
        return self.hidden, self.weight, self.bias

    def ours(self, objective, **options):
        return rlkern.linear_policy_loss(
            *self.head(),
            self.old,
            self.advantages,
            bias=self.bias,
            temperature=0.8,
            objective=objective,
            **self.options | options,
        )

    def composed(self, objective, **options):
        out = rlkern.linear_logprob(
            *self.head(), bias=self.bias, temperature=0.8, outputs=("logprob", "entropy")
        )
        loss = rlkern.policy_loss(
            out.logprob,
            self.old,
            self.advantages,
            entropy=out.entropy,
            objective=objective,
            **self.options | options,
        )
        return loss, out


def assert_equal(batch, objective, what="", keep_bytes=op.KEEP_BYTES, **options):
    # some selections are drawn at random
    torch.manual_seed(0)
    ours = batch.ours(objective, keep_bytes=keep_bytes, **options)
    torch.manual_seed(0)
    want, out = batch.composed(objective, **options)
    assert_same_bits(f"{what} logprob", ours.logprob, out.logprob.detach())
    assert_same_bits(f"{what} entropy", ours.entropy, out.entropy.detach())
    assert_same_bits(f"{what} loss", ours.loss.detach(), want.loss.detach())
    assert ours.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        assert_same_bits(f"{what} {name}", ours.metrics[name], value)
    got = torch.autograd.grad(ours.loss, batch.inputs())
    expected = torch.autograd.grad(want.loss, batch.inputs())
    eps = torch.finfo(batch.hidden.dtype).eps
    for name, a, b in zip(("hidden", "weight", "bias"), got, expected):
        scale = b.float().abs().max().clamp(min=1e-6)
        error = (a.float() - b.float()).abs().max()
        assert error <= 4 * eps * scale, f"{what} {name}: {error} of {scale}"


def objectives():
    for name in PRESETS:
        try:
            objective = PolicyObjective.preset(name)
        except ValueError:
            continue
        if objective.importance_sampling_level != "segment":
            yield pytest.param(objective, id=name)


@pytest.mark.parametrize("objective", list(objectives()))
@pytest.mark.parametrize("keep_bytes", KEPT)
def test_every_preset_is_the_composition(objective, keep_bytes):
    assert_equal(Batch(), objective, keep_bytes=keep_bytes)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_dtype(dtype):
    objective = PolicyObjective.preset("grpo", kl_coef=0.1, entropy_coef=0.01)
    assert_equal(Batch(dtype), objective, keep_bytes=KEPT[1])


def test_normalizer_and_segments():
    batch = Batch()
    assert_equal(batch, "grpo", normalizer=11.0)
    assert_equal(batch, "grpo", normalizer=torch.tensor(11.0))
    batch.options["cu_segments"] = torch.tensor([0, 5, 17, 18, 40, 48, 57, 80])
    assert_equal(batch, PolicyObjective(importance_sampling_level="segment"))


def test_tokens_of_no_gradient_drop_out_exactly():
    """Not multiplied by zero: what they hold does not matter."""
    batch = Batch()
    with torch.no_grad():
        batch.hidden[18:48] = float("inf")  # the sequence of advantage 0
    objective = PolicyObjective(loss_agg_mode="token-mean")
    loss = batch.ours(objective).loss
    grads = torch.autograd.grad(loss, batch.inputs())
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][18:48] == 0).all()


def test_upstream_gradients_scale_and_frozen_inputs_stay():
    batch = Batch()
    full = torch.autograd.grad(batch.ours("dapo").loss, batch.inputs())
    half = torch.autograd.grad(0.5 * batch.ours("dapo").loss, batch.inputs())
    for a, b in zip(half, full):
        torch.testing.assert_close(a, 0.5 * b)
    batch.weight.requires_grad_(False)
    loss = batch.ours("dapo").loss
    (only,) = torch.autograd.grad(loss, batch.hidden)
    assert_same_bits("hidden", only, full[0])
    assert batch.weight.grad is None
    with torch.no_grad():
        assert not batch.ours("dapo").loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_bytes", KEPT)
def test_weight_grad_takes_the_gradient(dtype, keep_bytes):
    batch = Batch(dtype)
    loss = batch.ours("dapo", keep_bytes=keep_bytes).loss
    want = torch.autograd.grad(loss, batch.weight)[0].float()
    main = torch.full((VOCAB, HIDDEN), 3.0)
    batch.ours("dapo", weight_grad=main, keep_bytes=keep_bytes).loss.backward()
    assert batch.weight.grad is None
    assert batch.hidden.grad is not None
    torch.testing.assert_close(main - 3, want, rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize(
    ("keep_bytes", "error", "message"),
    [
        (-1, ValueError, "linear_policy_loss: expected keep_bytes to be at least 0, got -1"),
        (1e9, TypeError, "linear_policy_loss: expected keep_bytes to be an int, got float"),
        (True, TypeError, "linear_policy_loss: expected keep_bytes to be an int, got bool"),
    ],
)
def test_bad_keep_bytes_is_refused_in_one_sentence(keep_bytes, error, message):
    with pytest.raises(error) as raised:
        Batch().ours("dapo", keep_bytes=keep_bytes)
    assert str(raised.value) == message


def test_padded_and_masked_vocabulary():
    batch = Batch()
    with torch.no_grad():
        batch.weight[300:] = float("nan")
    batch.targets %= 290
    mask = torch.arange(VOCAB) < 295
    out = batch.ours("grpo", vocab_size=300, vocab_mask=mask, softcap=20.0, logit_scale=0.9)
    grads = torch.autograd.grad(out.loss, batch.inputs())
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][295:] == 0).all()
    assert grads[1][:295].abs().sum() > 0


def test_nothing_to_learn_from():
    batch = Batch(lengths=(0, 0))
    out = batch.ours("grpo")
    assert out.loss == 0
    for g in torch.autograd.grad(out.loss, batch.inputs()):
        assert (g == 0).all()


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("dead", [(), (1, 4), (0, 2, 4, 5)])
def test_kept_and_recomputed_logits_give_the_same_gradients(dtype, dead):
    """Also where they are gathered for the tokens that have a gradient. In bits where they are kept
    as they are."""
    grads = []
    for keep_bytes in KEPT:
        batch = Batch(dtype)
        batch.advantages[list(dead)] = 0.0
        objective = PolicyObjective(entropy_coef=0.0 if dead else 0.01)
        loss = batch.ours(objective, keep_bytes=keep_bytes).loss
        grads.append(torch.autograd.grad(loss, batch.inputs()))
    for found in grads[:-1]:
        for name, a, b in zip(("hidden", "weight", "bias"), found, grads[-1]):
            if dtype != torch.bfloat16:
                assert_same_bits(name, a, b)
            else:
                error = (a.float() - b.float()).norm() / b.float().norm()
                assert error < torch.finfo(dtype).eps / 4, f"{name}: {error}"


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("spread", [0.3, 3.0, 10.0])
def test_kept_logits_cost_no_exactness(spread, entropy_coef):
    """Against float64, gradients of bfloat16 inputs are as good with logits kept as with none."""
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(150, 64, generator=random)
    weight = torch.randn(3000, 64, generator=random) * spread / 8
    leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    targets = torch.randint(3000, (150,), generator=random)
    advantages = torch.randn(150, generator=random)
    objective = PolicyObjective(loss_agg_mode="token-mean", entropy_coef=entropy_coef)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_p = (exact[0] @ exact[1].T).log_softmax(-1)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    old = logprob.detach().float()
    loss = -(advantages * (logprob - old).exp()).mean() - entropy_coef * entropy.mean()
    wants = torch.autograd.grad(loss, exact)
    errors = []
    for keep_bytes in (2**28, 0):
        given = {"objective": objective, "keep_bytes": keep_bytes}
        out = rlkern.linear_policy_loss(*leaves, targets, old, advantages, **given)
        gots = torch.autograd.grad(out.loss, leaves)
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(gots, wants)])
    for kept, recomputed in zip(*errors):
        assert kept <= 1.01 * recomputed


def test_the_memory_is_flat_in_the_vocabulary():
    """Beside the gradient of the weight: logits are kept up to a bound."""
    code = """
import sys, torch, rlkern
from bench.memory import peak_growth
tokens, width, vocab = 256, 64, int(sys.argv[1])
hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(vocab, width, dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(vocab, (tokens,))
old, advantages = torch.randn(tokens), torch.randn(tokens)
def run():
    args = hidden, weight, targets, old, advantages
    loss = rlkern.linear_policy_loss(*args, objective="dapo", keep_bytes=2**25).loss
    return torch.autograd.grad(loss, (hidden, weight))
run()
print(peak_growth(run) - weight.numel() * weight.element_size())
"""
    scratch = []
    for vocab in (2**15, 2**18):
        command = [sys.executable, "-c", code, str(vocab)]
        out = subprocess.run(command, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        scratch.append(int(out.stdout))
    # all logits are kept in the first run, a fifth in the second
    assert 2**24 < scratch[0] < 1.2 * 2**25
    assert scratch[1] < 1.2 * 2**25


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(80, 7)}, ValueError, r"weight of shape \(V, H\)"),
        ({"hidden": torch.zeros(80, HIDDEN).double()}, TypeError, "weight of dtype float64"),
        ({"old_logprob": torch.zeros(79)}, ValueError, r"old_logprob of shape \(T,\) = \(80,\)"),
        ({"targets": torch.zeros(80)}, TypeError, "targets of dtype int64 or int32"),
        ({"weight_grad": torch.zeros(VOCAB, 3)}, ValueError, r"weight_grad of shape \(V, H\)"),
        ({"weight_grad": torch.zeros(HIDDEN, VOCAB).T}, ValueError, "weight_grad to be contig"),
        ({"objective": "grop"}, ValueError, "grop"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    batch = Batch()
    values = dict(zip(("hidden", "weight", "targets"), batch.head()))
    values |= {"old_logprob": batch.old, "advantages": batch.advantages} | change
    names = ("hidden", "weight", "targets", "old_logprob", "advantages")
    tensors = [values.pop(name) for name in names]
    with pytest.raises(error, match=message):
        rlkern.linear_policy_loss(*tensors, cu_seqlens=batch.cu_seqlens, **values)
