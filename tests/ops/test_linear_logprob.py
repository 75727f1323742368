"""Log-prob and entropy from hidden states."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops._logprob import Rows, Scalars, Stats
from rlkern.ops.linear_logprob import reference, samples
from rlkern.ops.logprob_from_logits import reference as from_logits
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "linear_logprob"
ALL = ("logprob", "entropy", "logsumexp")


def arguments(hidden, weight, targets, *scalars, bias=None, ids=None, mask=None, rows=None, **how):
    """Of forward. scalars: temperature, logit_scale, softcap, ignore_index; 1, 1, 0, -100."""
    scalars = (*scalars, *(1.0, 1.0, 0.0, -100)[len(scalars) :])
    scalars = (*scalars, how.pop("size", len(weight)), how.pop("rounding", False))
    inputs = (*Rows(targets, ids, mask, rows), *Scalars(*scalars))
    how = {"topk": 0, "invariant": False, "chunk": 0} | how
    return (hidden, weight, bias, *inputs, how["topk"], how["invariant"], how["chunk"])


# the products are summed in another order than torch's
SUM_ULPS = 64


def plain_torch_gradients(inputs: tuple) -> tuple:
    """What torch's own matmuls give in the inputs' dtype: the yardstick of 16-bit gradients."""
    hidden, weight, bias, *shared = inputs[4:-5]
    size = shared[10]
    logits = (hidden @ weight[:size].T).float()
    if bias is not None:
        logits = logits + bias[:size].float()
    d_logits = from_logits.backward(*inputs[:4], logits, *shared).to(hidden.dtype)
    pad = len(weight) - size
    d_weight = torch.nn.functional.pad(d_logits.T @ hidden, (0, 0, 0, pad))
    d_bias = torch.nn.functional.pad(d_logits.float().sum(0), (0, pad)).to(hidden.dtype)
    return d_logits @ weight[:size], d_weight, weight[:0, 0] if bias is None else d_bias


def assert_close_as_torch(what, got, truth, torchs):
    """Gradients of 16-bit inputs: the root mean square error is at most 1.1 times torch's own."""
    if got.numel() == 0 or got.dtype == torch.float32:
        assert_within_budget(what, got, truth, torchs, SUM_ULPS)
        return

    def error(x):
        return (x.double() - truth).square().mean().sqrt()

    floor = torch.finfo(got.dtype).eps * truth.square().mean().sqrt() / 2
    assert error(got) <= 1.1 * error(torchs) + floor, f"{what}: {error(got)}, {error(torchs)}"


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradient_is_the_derivative(per_row, cap):
    targets = torch.tensor([0, 6, -100, 3])
    ids = torch.tensor([[0, 2], [-100, 6], [1, 1], [3, 0]])
    rows = torch.linspace(0.5, 2, 4, dtype=torch.float64) if per_row else None
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    inputs = (hidden, weight, bias)
    how = {"ids": ids, "rows": rows, "size": 8, "bias": bias}
    args = arguments(hidden, weight, targets, 0.7, 1.3, cap, **how)
    out = Stats(*reference.forward(*args))
    outputs = (out.logprob, out.logsumexp, out.entropy, out.id_logprob)
    upstream = [torch.randn_like(x) for x in outputs]
    want = torch.autograd.grad(outputs, inputs, upstream)
    with torch.no_grad():
        saved = samples.backward_inputs(args, out)[4:]
        got = reference.backward(*upstream, *saved)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


def test_gradcheck_through_the_public_function():
    targets = torch.tensor([4, 0, 2])
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 1], [0, 3], [2, 4]])

    def run(h, w, b):
        options = {"temperature": 1.7, "softcap": 6.0, "ids": ids, "topk": 2}
        out = rlkern.linear_logprob(h, w, targets, bias=b, outputs=ALL, **options)
        return out.logprob, out.entropy, out.logsumexp, out.id_logprob, out.topk_values

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        truth = reference.forward(*to_double(args))
        torchs = reference.forward(*args)
        exact = samples.backward_inputs(to_double(args), truth)
        exact_grads = reference.backward(*to_double(exact))
        torch_grads = plain_torch_gradients(samples.backward_inputs(args, torchs))
        for kernel in checks.kernels(OP, device):
            what = f"{kernel.name} {dtype} {name!r}"
            ours = kernel.forward(*args)
            checks.assert_stats_within_budget(what, ours, truth, torchs, SUM_ULPS)
            gots = kernel.backward(*samples.backward_inputs(args, ours))
            for got, want, peer in zip(gots, exact_grads, torch_grads):
                assert_close_as_torch(f"{what} gradient", got, want, peer)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_row_does_not_depend_on_its_batch(device, dtype):
    hidden, weight = (
        torch.randn(1700, 33).to(device, dtype),
        torch.randn(1031, 33).to(device, dtype),
    )
    targets = torch.randint(1031, (1700,)).to(device)
    ids = torch.randint(1031, (1700, 2)).to(device)
    # the interpreter takes a second for each thousand rows
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        count = 1700 if kernel.name == "native" or device == "cuda" else 150
        h, t = hidden[:count], targets[:count]
        i = ids[:count]
        how = {"topk": 3, "invariant": True}
        whole = kernel.forward(*arguments(h, weight, t, 0.8, ids=i, **how))
        for rows in (slice(0, 1), slice(5, 60), slice(count - 20, count)):
            args = arguments(h[rows], weight, t[rows], 0.8, ids=i[rows], chunk=256, **how)
            for a, b in zip(kernel.forward(*args), whole):
                assert_same_bits(f"{kernel.name} {rows}", a, b[rows])
        order = torch.randperm(count)
        args = arguments(h[order], weight, t[order], 0.8, ids=i[order], **how)
        for a, b in zip(kernel.forward(*args), whole):
            assert_same_bits(f"{kernel.name} permuted", a, b[order])


def test_training_and_scoring_give_the_same_bits(device):
    hidden = torch.randn(9, 16).to(device).requires_grad_()
    weight, targets = torch.randn(50, 16).to(device), torch.randint(50, (9,)).to(device)
    train = rlkern.linear_logprob(hidden, weight, targets, outputs=ALL)
    with torch.no_grad():
        score = rlkern.linear_logprob(hidden, weight, targets)
    assert_same_bits("logprob", train.logprob.detach(), score.logprob)
    assert (train.logprob.detach() - score.logprob).exp().eq(1).all()


def test_equals_torch_and_differentiates(device):
    hidden = torch.randn(70, 40).to(device).requires_grad_()
    weight = (torch.randn(611, 40) / 4).to(device).requires_grad_()
    targets = torch.randint(611, (70,)).to(device)
    out = rlkern.linear_logprob(hidden, weight, targets, temperature=0.6, outputs=ALL)
    z = hidden @ weight.T / 0.6
    logp = z.log_softmax(-1)
    want = (
        logp.gather(-1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        z.logsumexp(-1),
    )
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    d_want = torch.autograd.grad(want, (hidden, weight), upstream)
    d_got = torch.autograd.grad(out[:3], (hidden, weight), upstream)
    for got, expected in zip((*out[:3], *d_got), (*want, *d_want)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_large_biases_do_not_reach_the_gradient_through_padding(device):
    """Panels of tokens are filled up with lanes that see the bias alone."""
    inputs = torch.randn(5, 8), torch.randn(40, 8), torch.randn(40)
    inputs[2][7] = 120.0
    hidden, weight, bias = (x.to(device).requires_grad_() for x in inputs)
    targets = torch.arange(5).to(device)
    logprob = rlkern.linear_logprob(hidden, weight, targets, bias=bias).logprob
    grads = torch.autograd.grad(logprob.sum(), (hidden, weight, bias))
    assert all(g.isfinite().all() for g in grads)


def test_rows_without_a_gradient_drop_out_exactly():
    """Not multiplied by zero: what they hold does not matter."""
    hidden, weight = torch.randn(40, 16), torch.randn(90, 16)
    targets = torch.randint(90, (40,))
    live = torch.arange(0, 40, 3)
    hidden[1::3] = float("nan")
    upstream = torch.zeros(2, 40)
    upstream[:, live] = torch.randn(2, len(live))
    targets[2::3], upstream[0, 2::3] = -100, 1.0  # a gradient into an ignored row is none
    args = arguments(hidden, weight, targets)
    stats = Stats(*torch.ops.rlkern.linear_logprob_fwd(*args))

    def backward(rows, *grads):
        part = arguments(hidden[rows], weight, targets[rows])
        saved = samples.backward_inputs(part, [x[rows] for x in stats])[4:]
        grads = grads or (upstream[0, rows], None, upstream[1, rows], None)
        return torch.ops.rlkern.linear_logprob_bwd(*grads, *saved)

    got, want = backward(torch.arange(40)), backward(live)
    assert_same_bits("weight", got[1], want[1])
    assert_same_bits("hidden", got[0][live], want[0])
    dead = torch.ones(40, dtype=torch.bool)
    dead[live] = False
    assert (got[0][dead] == 0).all()
    none = torch.zeros(40)
    for grad in backward(torch.arange(40), none, None, none, None):
        assert (grad == 0).all()


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True)])
def test_frozen_inputs_get_no_gradient(train_hidden, train_weight):
    hidden = torch.randn(5, 8, requires_grad=train_hidden)
    weight = torch.randn(20, 8, requires_grad=train_weight)
    targets = torch.randint(20, (5,))
    rlkern.linear_logprob(hidden, weight, targets).logprob.sum().backward()
    assert (hidden.grad is not None) == train_hidden
    assert (weight.grad is not None) == train_weight


def test_a_transposed_head_and_strided_hidden_states():
    weight = torch.randn(16, 50).T
    hidden = torch.randn(2, 9, 16)[:, ::2].reshape(-1, 16)[::2]
    targets = torch.randint(50, hidden.shape[:1])
    got = rlkern.linear_logprob(hidden, weight, targets).logprob
    want = reference.forward(*arguments(hidden, weight, targets))[0]
    torch.testing.assert_close(got, want)


def test_scale_and_soft_cap_as_models_apply_them(device):
    """Gemma 2: cap tanh(logits / cap); Cohere: logits times logit_scale."""
    hidden = torch.randn(9, 24).to(device).requires_grad_()
    weight = torch.randn(70, 24).to(device).requires_grad_()
    targets = torch.randint(70, (9,)).to(device)
    z = 5.0 * torch.tanh(0.8 * (hidden @ weight.T) / 5.0) / 0.7
    logp = z.log_softmax(-1)
    want = (logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1))
    options = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.8, "outputs": ALL}
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    expected = torch.autograd.grad(want, (hidden, weight), upstream)
    out = rlkern.linear_logprob(hidden, weight, targets, **options)
    got = torch.autograd.grad(out[:3], (hidden, weight), upstream)
    for a, b in zip((*out[:3], *got), (*want, *expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    from_logits = rlkern.logprob_from_logits(hidden @ weight.T, targets, **options)
    for a, b in zip(from_logits[:3], want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_padded_vocabulary_is_not_read(device):
    hidden = torch.randn(6, 16).to(device).requires_grad_()
    weight = torch.randn(64, 16).to(device)
    padded = torch.cat([weight, torch.full((8, 16), float("nan")).to(device)]).requires_grad_()
    targets = torch.randint(64, (6,)).to(device)
    out = rlkern.linear_logprob(hidden, padded, targets, vocab_size=64, outputs=ALL)
    plain = rlkern.linear_logprob(hidden, weight, targets, outputs=ALL)
    for name in ALL:
        a, b = getattr(out, name), getattr(plain, name)
        assert_same_bits("padded", a.detach(), b.detach())
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert (padded.grad[64:] == 0).all()
    assert padded.grad[:64].abs().sum() > 0


def test_arguments_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    hidden, weight, bias = torch.randn(4, 6), torch.randn(9, 6), torch.randn(9)
    targets, ids = torch.tensor([3, 7, 7, 1]), torch.tensor([[2, 7], [0, 1], [7, 7], [5, 4]])
    mask = torch.arange(9) != 6
    for change in (
        {"scalars": (0.37, 1.0, 0.0, 7)},
        {"scalars": (2.25, 0.61, 0.0, 7), "bias": bias, "topk": 2},
        {"scalars": (1.0, 1.7, 2.9, 7), "ids": ids, "size": 8},
        {"scalars": (1.0, 1.7, 2.9, 7), "ids": ids, "mask": mask, "topk": 9},
        {"scalars": (1.5, 1.0, 0.0, 7), "bias": bias, "rounding": True, "rows": torch.rand(4) + 1},
    ):
        how = dict(change)
        args = arguments(hidden, weight, targets, *how.pop("scalars"), **how)
        got = torch.ops.rlkern.linear_logprob_fwd(*args)
        torch.testing.assert_close(got, reference.forward(*args))
        assert (got[0][1:3] == 0).all()
        inputs = samples.backward_inputs(args, got)
        for needs in ((True, True, True), (True, False, False), (False, True, False), (0, 0, 1)):
            chosen = (*inputs[:-3], *map(bool, needs))
            grads = torch.ops.rlkern.linear_logprob_bwd(*chosen)
            torch.testing.assert_close(grads, reference.backward(*chosen), rtol=1e-5, atol=1e-5)


def test_out_of_range_targets_and_ids_give_nan_and_stay_in_bounds(device):
    hidden, weight = torch.randn(4, 8).to(device), torch.randn(6, 8).to(device)
    targets = torch.tensor([-1, 6, 2**40, 5]).to(device)
    ids = torch.tensor([[5, -2], [0, -100], [2**40, 1], [6, 6]]).to(device)
    for kernel in checks.kernels(OP, device):
        args = arguments(hidden, weight, targets, ids=ids, topk=1)
        out = Stats(*kernel.forward(*args))
        assert out.logprob.isnan().tolist() == [True, True, True, False], kernel.name
        assert out.id_logprob.isnan().tolist() == [
            [False, True],
            [False, False],
            [True, False],
            [True, True],
        ], kernel.name
        assert out.id_logprob[1, 1] == 0, kernel.name
        assert not out.is_top1[:3].any(), kernel.name
        grads = kernel.backward(*samples.backward_inputs(args, out))
        assert all(g.isfinite().all() for g in grads), kernel.name


def test_log_probs_at_ids_are_those_of_targets(device):
    """In bits, and so are their gradients; ids may repeat, and may be the target."""
    hidden, weight = torch.randn(50, 16).to(device), torch.randn(700, 16).to(device)
    targets = torch.randint(700, (50,)).to(device)
    ids = torch.stack([targets, targets.roll(1), targets], 1)
    for kernel in checks.kernels(OP, device):
        args = arguments(hidden, weight, targets, 0.8, ids=ids)
        out = Stats(*kernel.forward(*args))
        assert_same_bits(f"{kernel.name} at the target", out.id_logprob[:, 0], out.logprob)
        a = torch.randn(50).to(device)
        zero = torch.zeros(50, 1).to(device)
        saved = samples.backward_inputs(args, out)[4:]
        from_target = kernel.backward(a, None, None, None, *saved)
        at_ids = torch.cat([zero, zero, a[:, None]], 1)
        for x, y in zip(kernel.backward(None, None, None, at_ids, *saved), from_target):
            assert_same_bits(f"{kernel.name} gradient", x, y)


def test_top_k_are_the_largest(device):
    hidden, weight = torch.randn(60, 16).to(device), torch.randn(2500, 16).to(device)
    weight[77] *= 3
    weight[1234] = weight[77]  # a tie between chunks of the vocabulary
    hidden[3] = weight[77] * 3
    targets = torch.randint(2500, (60,)).to(device)
    targets[3] = 1234
    log_p = (hidden.double() @ weight.double().T / 0.8).log_softmax(-1)
    want = log_p.topk(50)
    for kernel in checks.kernels(OP, device):
        out = Stats(*kernel.forward(*arguments(hidden, weight, targets, 0.8, topk=50)))
        torch.testing.assert_close(out.topk_values.double(), want.values, rtol=1e-5, atol=1e-5)
        at = log_p.gather(1, out.topk_ids)
        torch.testing.assert_close(at, want.values, rtol=1e-5, atol=1e-5)
        assert all(len(set(row)) == 50 for row in out.topk_ids.tolist()), kernel.name
        assert set(out.topk_ids[3, :2].tolist()) == {77, 1234}, kernel.name
        if kernel.name != "triton":
            assert out.topk_ids[3, 0] == 77, "the lower id of two equals comes first"
        assert out.is_top1[3], "a tie with the best is a best"
        top1 = log_p.argmax(1) == targets
        assert (out.is_top1 == top1)[torch.arange(60) != 3].all(), kernel.name


def test_masked_vocabulary_is_a_smaller_vocabulary(device):
    hidden = torch.randn(30, 16).to(device).requires_grad_()
    weight = torch.randn(300, 16).to(device).requires_grad_()
    bias = torch.randn(300).to(device).requires_grad_()
    mask = (torch.rand(300) < 0.1).to(device)
    mask[:64] = False  # whole tiles
    keep = mask.nonzero()[:, 0]
    own = torch.randint(len(keep), (30,)).to(device)
    how = {"softcap": 3.0, "outputs": (*ALL, "sum_sq_prob", "is_top1"), "topk": 5}
    out = rlkern.linear_logprob(hidden, weight, keep[own], bias=bias, vocab_mask=mask, **how)
    want = rlkern.linear_logprob(hidden, weight[keep], own, bias=bias[keep], **how)
    for name in (*how["outputs"], "topk_values"):
        torch.testing.assert_close(getattr(out, name), getattr(want, name), rtol=2e-6, atol=2e-6)
    assert (keep[want.topk_ids] == out.topk_ids).all()
    inputs = (hidden, weight, bias)

    def gradients(x):
        return torch.autograd.grad(x.logprob.sum() + 0.3 * x.entropy.sum(), inputs)

    for a, b in zip(gradients(out), gradients(want)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(
        rlkern.linear_logprob(hidden, weight, keep[own], vocab_mask=mask).logprob.sum(), weight
    )
    assert (grads[0][~mask] == 0).all()
    few = torch.zeros(300, dtype=torch.bool).to(device)
    few[[5, 290]] = True
    out = rlkern.linear_logprob(hidden, weight, keep[own], vocab_mask=few, outputs=(), topk=3)
    assert (out.topk_ids[:, 2] == -1).all()
    assert (out.topk_values[:, 2] == -float("inf")).all()
    torch.testing.assert_close(out.topk_values[:, :2].exp().sum(1), torch.ones(30).to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_logits_are_those_of_a_16_bit_head(device, dtype):
    hidden, weight = torch.randn(64, 32).to(device, dtype), torch.randn(500, 32).to(device, dtype)
    bias = torch.randn(500).to(device, dtype)
    targets = torch.randint(500, (64,)).to(device)
    exact = hidden.float() @ weight.float().T + bias.float()
    log_p = (exact.bfloat16().float() / 0.7).log_softmax(-1)
    want = log_p.gather(1, targets[:, None])[:, 0]
    options = {"bias": bias, "temperature": 0.7}
    got = rlkern.linear_logprob(hidden, weight, targets, logits_rounding="bf16", **options).logprob
    full = rlkern.linear_logprob(hidden, weight, targets, **options).logprob
    # a sum in another order may round one logit of a row the other way
    assert ((got - want).abs() < 3e-6).float().mean() > 0.9
    assert (full - want).abs().median() > 1e-3


def test_sum_of_squared_probabilities(device):
    hidden, weight = torch.randn(40, 16).to(device), torch.randn(3000, 16).to(device)
    targets = torch.randint(3000, (40,)).to(device)
    out = rlkern.linear_logprob(hidden, weight, targets, temperature=2.5, outputs=("sum_sq_prob",))
    p = (hidden.double() @ weight.double().T / 2.5).softmax(-1)
    torch.testing.assert_close(out.sum_sq_prob.double(), p.square().sum(-1), rtol=1e-5, atol=1e-9)
    assert out.logprob is None
    assert not out.sum_sq_prob.requires_grad


def test_differentiates_bias_ids_and_top_k(device):
    hidden = torch.randn(70, 40).to(device).requires_grad_()
    weight = (torch.randn(611, 40) / 4).to(device).requires_grad_()
    bias = torch.randn(611).to(device).requires_grad_()
    targets = torch.randint(611, (70,)).to(device)
    ids = torch.randint(611, (70, 4)).to(device)
    inputs = (hidden, weight, bias)
    out = rlkern.linear_logprob(*inputs[:2], targets, bias=bias, ids=ids, topk=6)
    log_p = (hidden @ weight.T + bias).log_softmax(-1)
    want = (
        log_p.gather(-1, targets[:, None])[:, 0],
        log_p.topk(6).values,
        log_p.gather(-1, ids),
    )
    got = (out.logprob, out.topk_values, out.id_logprob)
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    d_want = torch.autograd.grad(want, inputs, upstream)
    d_got = torch.autograd.grad(got, inputs, upstream)
    for a, b in zip((*got, *d_got), (*want, *d_want)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_the_forward_saves_nothing_of_the_vocabulary():
    """A second backward through a kept graph gives the same bits."""
    hidden = torch.randn(9, 16, requires_grad=True)
    weight, targets = torch.randn(50, 16), torch.randint(50, (9,))
    loss = rlkern.linear_logprob(hidden, weight, targets).logprob.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert_same_bits("again", torch.autograd.grad(loss, hidden)[0], first)


def test_no_tensor_of_rows_times_vocabulary():
    """Peak memory of forward + backward stays far below one (T, V) float32 tensor."""
    code = """
import resource, torch, rlkern
hidden = torch.randn(2048, 64, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(65536, 64, dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(65536, (2048,))
rlkern.linear_logprob(hidden[:64], weight[:512], targets[:64] % 512).logprob.sum().backward()
weight.grad = torch.zeros_like(weight)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = rlkern.linear_logprob(hidden, weight, targets, outputs=("logprob", "entropy"))
(out.logprob + out.entropy).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 128, f"{run.stdout} MiB; one (T, V) float32 tensor is 512 MiB"


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set_is_as_exact(isa):
    checks.check_instruction_set(__file__, isa)


def test_compiles_whole():
    def loss(hidden, weight, targets):
        out = rlkern.linear_logprob(hidden, weight, targets, temperature=0.9, outputs=ALL)
        return (out.logprob - 0.1 * out.entropy).sum()

    hidden = torch.randn(5, 8, requires_grad=True)
    weight, targets = torch.randn(12, 8, requires_grad=True), torch.randint(12, (5,))
    want = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
    run = checks.compiled(loss)
    got = torch.autograd.grad(run(hidden, weight, targets), (hidden, weight))
    for g, w in zip(got, want):
        assert_same_bits("gradient", g, w)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 130),
    depth=st.integers(1, 70),
    vocab=st.integers(1, 1500),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.floats(0.1, 10.0),
    dtype=st.sampled_from(checks.DTYPES),
    gap=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, depth, vocab, scale, temperature, dtype, gap, seed):
    generator = torch.Generator().manual_seed(seed)
    extra = 3 if gap else 0
    hidden = torch.randn(rows, depth + extra, generator=generator).to(dtype)[:, :depth]
    weight = (torch.randn(vocab, depth + extra, generator=generator) * scale).to(dtype)[:, :depth]
    targets = torch.randint(vocab, (rows,), generator=generator)
    how = {"ids": torch.randint(vocab, (rows, 2), generator=generator), "topk": min(3, vocab)}
    how["bias"] = torch.randn(vocab, generator=generator).to(dtype) if gap else None
    args = arguments(hidden, weight, targets, temperature, **how)
    truth, torchs = reference.forward(*to_double(args)), reference.forward(*args)
    ours = torch.ops.rlkern.linear_logprob_fwd(*args)
    checks.assert_stats_within_budget("forward", ours, truth, torchs, SUM_ULPS)
    exact = reference.backward(*to_double(samples.backward_inputs(to_double(args), truth)))
    peers = plain_torch_gradients(samples.backward_inputs(args, torchs))
    gots = torch.ops.rlkern.linear_logprob_bwd(*samples.backward_inputs(args, ours))
    for got, want, peer in zip(gots, exact, peers):
        if want.numel():
            scale_of = want.abs().max().clamp(min=1e-3)
            limit = 3 * (peer.double() - want).abs().max() + 1e-4 * scale_of
            assert (got.double() - want).abs().max() <= limit


HIDDEN, WEIGHT = torch.zeros(4, 8), torch.zeros(10, 8)
TARGETS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": 3}, TypeError, "expected hidden to be a Tensor, got int"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "expected hidden of dtype"),
        (
            {"hidden": torch.zeros(1, 4, 8)},
            ValueError,
            r"hidden of shape \(T, H\), got \(1, 4, 8\)",
        ),
        ({"weight": WEIGHT.bfloat16()}, TypeError, "weight of dtype float32, got bfloat16"),
        (
            {"weight": torch.zeros(10, 7)},
            ValueError,
            r"expected weight of shape \(V, H\) = \(10, 8\), got \(10, 7\)",
        ),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets of shape \(T,\)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "expected weight on cpu like hidden, got meta"),
        ({"temperature": -1.0}, ValueError, "temperature to be positive and finite, got -1.0"),
        ({"outputs": ()}, ValueError, "outputs to be a non-empty tuple"),
        ({"softcap": 0.0}, ValueError, "softcap to be positive and finite, got 0.0"),
        ({"logit_scale": -2}, ValueError, "logit_scale to be positive and finite, got -2"),
        ({"vocab_size": 11}, ValueError, r"vocab_size in \[1, V\] = \[1, 10\], got 11"),
        ({"vocab_size": 8.0}, TypeError, "expected vocab_size to be an int, got float"),
        ({"bias": torch.zeros(9)}, ValueError, r"expected bias of shape \(V,\) = \(10,\)"),
        ({"bias": torch.zeros(10).half()}, TypeError, "bias of dtype float32, got float16"),
        ({"ids": torch.zeros(4)}, TypeError, "expected ids of dtype int64 or int32"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"ids of shape \(T, K\)"),
        ({"topk": 11}, ValueError, r"topk in \[0, vocab_size\] = \[0, 10\], got 11"),
        ({"topk": True}, TypeError, "expected topk to be an int, got bool"),
        ({"vocab_mask": torch.ones(9, dtype=torch.bool)}, ValueError, r"vocab_mask of shape"),
        ({"vocab_mask": torch.ones(10)}, TypeError, "vocab_mask of dtype bool, got float32"),
        ({"logits_rounding": "fp8"}, ValueError, 'logits_rounding to be None or "bf16"'),
        ({"chunk_size": -4}, ValueError, "chunk_size to be positive and finite, got -4"),
        ({"outputs": ("logits",)}, ValueError, "outputs to be one of"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    values = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS} | change
    tensors = [values.pop(name) for name in ("hidden", "weight", "targets")]
    with pytest.raises(error, match=f"linear_logprob: .*{message}"):
        rlkern.linear_logprob(*tensors, **values)
