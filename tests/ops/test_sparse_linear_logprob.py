"""Log-prob and entropy under the tokens that a sampler kept."""

import itertools
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.sparse_linear_logprob import reference, samples
from rlkern.ops.sparse_linear_logprob.samples import kept_sets
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "sparse_linear_logprob"
DIFFERENTIABLE = ("logprob", "entropy", "logsumexp")
ALL = (*DIFFERENTIABLE, "sum_sq_prob", "is_top1")
# the order of the op's outputs, and where those stand that are compared within the budget
NAMES = ("logprob", "logsumexp", "entropy", "sum_sq_prob", "is_top1", "logits", "target_slot")
MEASURED = (0, 1, 2, 3, 5)
# temperature, logit_scale, softcap, ignore_index, round_logits
PLAIN = (1.0, 1.0, 0.0, -100, False)
NAN, INF = float("nan"), float("inf")
# the products are summed in another order than torch's
SUM_ULPS = 64


def kept_mask(kept_ids, kept_offsets, vocab):
    """(T, V) bool, built row by row from lists."""
    bounds = kept_offsets.tolist()
    kept = torch.zeros(len(bounds) - 1, vocab, dtype=torch.bool)
    for t, (begin, end) in enumerate(pairwise(bounds)):
        for i in kept_ids[begin:end].tolist():
            if 0 <= i < vocab:
                kept[t, i] = True
    return kept


def dense(
    hidden,
    weight,
    targets,
    kept_ids,
    kept_offsets,
    *,
    bias=None,
    temperature=1.0,
    logit_scale=1.0,
    softcap=None,
    rounded=False,
):
    """ALL from all logits, those that were not kept at -inf."""
    kept = kept_mask(kept_ids, kept_offsets, weight.shape[0]).to(hidden.device)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None]
    x = hidden @ weight.T
    if bias is not None:
        x = x + bias
    if rounded:
        x = x + (x.bfloat16().to(x.dtype) - x).detach()
    y = logit_scale * x
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    z = (y / temperature).masked_fill(~kept, -INF)
    logp = z.log_softmax(-1)
    logprob = logp.gather(-1, targets[:, None])[:, 0]
    finite = logp.masked_fill(~kept, 0.0)
    entropy = -(finite.exp() * finite * kept).sum(-1)
    is_top1 = logprob >= logp.amax(-1)
    return logprob, entropy, z.logsumexp(-1), logp.exp().square().sum(-1).detach(), is_top1


def differentiable(out):
    return tuple(getattr(out, name) for name in DIFFERENTIABLE)


def assert_same_outputs(what, a, b):
    for name in ALL:
        got, want = getattr(a, name).detach(), getattr(b, name).detach()
        assert_same_bits(f"{what} {name}", got.float(), want.float())


def halves(*shape, seed):
    """Sums of their products are exact in float32: what is rounded is the same in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator) / 2


def problem(rows, depth, vocab, sizes, dtype=torch.float32, seed=0, scale=1.0):
    """(hidden, weight, targets, kept_ids, kept_offsets)"""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = (torch.randn(vocab, depth, generator=generator) * scale).to(dtype)
    return hidden, weight, *kept_sets(rows, vocab, sizes, generator)


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradient_is_the_derivative(per_row, cap):
    hidden, weight, targets, ids, offsets = problem(5, 3, 9, [4, 1, 0, 9, 3], torch.float64)
    targets[3] = -100
    targets[4] = next(i for i in range(9) if i not in ids[-3:].tolist())
    rows = torch.linspace(0.5, 2, 5, dtype=torch.float64) if per_row else None
    leaves = (hidden, weight, torch.randn(9, dtype=torch.float64))
    for leaf in leaves:
        leaf.requires_grad_()
    scalars = (0.7, 1.3, cap)
    out = reference.forward(*leaves, targets, ids, offsets, rows, *scalars, -100, False, True)
    logprob, lse, entropy, _, _, logits, slot = out
    assert logprob[4] == -INF
    a, c, b = upstream = [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    # what is infinite has no derivative of its own
    outputs = (logprob[[0, 1, 3]], lse[[0, 1, 3, 4]], entropy)
    want = torch.autograd.grad(outputs, leaves, (a[[0, 1, 3]], c[[0, 1, 3, 4]], b))
    with torch.no_grad():
        saved = (hidden, weight, ids, offsets, logits, slot, lse, entropy, rows, *scalars)
        got = reference.backward(*upstream, *saved, True, True, True)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.6}])
def test_gradcheck_through_the_public_function(options):
    hidden, weight, targets, ids, offsets = problem(3, 4, 6, [5, 2, 6], torch.float64)
    leaves = (hidden, weight, torch.randn(6, dtype=torch.float64))
    for leaf in leaves:
        leaf.requires_grad_()

    def run(h, w, bias):
        return differentiable(
            rlkern.sparse_linear_logprob(
                h,
                w,
                targets,
                ids,
                offsets,
                bias=bias,
                temperature=1.7,
                outputs=DIFFERENTIABLE,
                **options,
            )
        )

    assert run(*leaves)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        truth = reference.forward(*to_double(args))
        torchs = reference.forward(*args)
        exact = reference.backward(*to_double(samples.backward_inputs(to_double(args), truth)))
        peers = reference.backward(*samples.backward_inputs(args, torchs))
        for kernel in checks.kernels(OP, device):
            what = f"{kernel.name} {dtype} {name!r}"
            ours = kernel.forward(*args)
            for i in MEASURED:
                part = f"{what} {NAMES[i]}"
                assert_within_budget(part, ours[i], truth[i], torchs[i], SUM_ULPS)
            assert ours[4].tolist() == truth[4].tolist(), what
            assert ours[6].tolist() == truth[6].tolist(), what
            gots = kernel.backward(*samples.backward_inputs(args, ours))
            for got, want, peer in zip(gots, exact, peers):
                assert_within_budget(f"{what} gradient", got, want, peer, SUM_ULPS)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_row_does_not_depend_on_its_batch(device, dtype):
    sizes = [70, 1, 0, 513, 33, 4, 600, 5, 9, 2]
    hidden, weight, targets, ids, offsets = (
        t.to(device) for t in problem(10, 48, 700, sizes, dtype)
    )
    bias = torch.randn(700).to(device, dtype)
    scalars = (None, 0.8, 1.2, 6.0, -100, True)
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        whole = kernel.forward(hidden, weight, bias, targets, ids, offsets, *scalars, False)
        for order in ([3], [1, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [4, 3, 3]):
            parts = [ids[offsets[t] : offsets[t + 1]] for t in order]
            lengths = torch.tensor([0] + [len(part) for part in parts])
            sets = (torch.cat(parts), lengths.cumsum(0).to(device))
            part = kernel.forward(
                hidden[order], weight, bias, targets[order], *sets, *scalars, True
            )
            for name, a, b in zip(NAMES, part[:5], whole[:5]):
                what = f"{kernel.name} {order} {name}"
                assert_same_bits(what, a.float(), b[order].float())


def test_training_and_scoring_give_the_same_bits(device):
    tensors = [t.to(device) for t in problem(9, 16, 50, [5] * 9)]
    tensors[0].requires_grad_()
    options = {"bias": torch.randn(50).to(device), "softcap": 5.0, "logits_rounding": "bf16"}
    train = rlkern.sparse_linear_logprob(*tensors, outputs=ALL, **options)
    with torch.no_grad():
        score = rlkern.sparse_linear_logprob(*tensors, **options)
    assert_same_bits("logprob", train.logprob.detach(), score.logprob)
    assert (train.logprob.detach() - score.logprob).exp().eq(1).all()


OPTIONS = {
    "plain": {},
    "row temperatures": {"temperature": torch.linspace(0.4, 1.6, 6)},
    "bias": {"bias": torch.linspace(-3, 3, 611)},
    "scale": {"logit_scale": 1.9},
    "soft cap": {"softcap": 2.5},
    "all": {
        "bias": torch.linspace(2, -2, 611),
        "temperature": torch.linspace(0.4, 1.6, 6),
        "logit_scale": 0.7,
        "softcap": 3.5,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_a_masked_dense_softmax_and_differentiates(device, name):
    options = {"temperature": 0.6} | {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in OPTIONS[name].items()
    }
    sizes = [30, 1, 200, 611, 7, 45]
    tensors = [t.to(device) for t in problem(6, 40, 611, sizes, scale=0.25)]
    names = ("hidden", "weight", "bias")
    leaves = (*tensors[:2], *([options["bias"]] if "bias" in options else []))
    leaves = dict(zip(names, (leaf.detach().clone().requires_grad_() for leaf in leaves)))
    exact = {key: leaf.detach().double().requires_grad_() for key, leaf in leaves.items()}
    rest = dict(zip(("targets", "kept_ids", "kept_offsets"), tensors[2:]))
    out = rlkern.sparse_linear_logprob(**rest, **(options | leaves), outputs=ALL)
    want = dense(**rest, **(options | exact))
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want[:3])]
    d_want = torch.autograd.grad(want[:3], tuple(exact.values()), upstream)
    d_got = torch.autograd.grad(
        differentiable(out), tuple(leaves.values()), [u.float() for u in upstream]
    )
    for got, expected in zip((*out[:3], out.sum_sq_prob, *d_got), (*want[:4], *d_want)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)
    assert out.is_top1.tolist() == want[4].tolist()
    assert not out.sum_sq_prob.requires_grad
    assert not out.is_top1.requires_grad
    never = ~kept_mask(tensors[3], tensors[4], 611).any(0)
    for grad in d_got[1:]:
        assert not grad[never].any()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_rounding_is_that_of_a_bfloat16_head(device, dtype):
    _, _, *sets = problem(6, 40, 611, [30, 1, 200, 611, 7, 45])
    targets, ids, offsets = (t.to(device) for t in sets)
    shapes = ((6, 40), (611, 40), (611,))
    hidden, weight, bias = (
        halves(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes)
    )
    row = torch.repeat_interleave(offsets.diff())
    exact = hidden.float() @ weight.float().T + bias.float()
    head = exact.bfloat16()
    assert (head != exact).any()
    # torch's own layer in bfloat16 has the same logits
    linear = torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert torch.equal(linear, head)
    sets = (targets, ids, offsets)
    for kernel in checks.kernels(OP, device):
        for b, want in ((bias, head), (None, (exact - bias.float()).bfloat16())):
            out = kernel.forward(hidden, weight, b, *sets, None, *PLAIN[:-1], True, True)
            assert torch.equal(out[5], want[row, ids].float()), kernel.name


def test_rounding_to_the_nearest_even_and_of_what_is_not_finite(device):
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F8000, 0x00008000, 0x3FFFFFFF]
    bits += [b - 2**31 for b in bits] + [0x7F800000, 0x7F800000 - 2**31, 0x7FC00000]
    bias = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)
    count = len(bits)
    zeros = torch.zeros(1, 4).to(device), torch.zeros(count, 4).to(device)
    sets = torch.tensor([0]), torch.arange(count), torch.tensor([0, count])
    sets = [t.to(device) for t in sets]
    scalars = (1.0, 1.0, 0.0, -100, True)
    for kernel in checks.kernels(OP, device):
        got = kernel.forward(*zeros, bias, *sets, None, *scalars, True)[5]
        want = bias.bfloat16().float()
        assert torch.equal(got.nan_to_num(7.0, INF, -INF), want.nan_to_num(7.0, INF, -INF)), (
            kernel.name
        )


def test_the_gradient_passes_straight_through_the_rounding(device):
    _, _, *sets = problem(6, 40, 611, [30, 1, 200, 611, 7, 45])
    sets = [t.to(device) for t in sets]
    shapes = ((6, 40), (611, 40), (611,))
    leaves = [halves(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(shapes)]
    options = {"bias": leaves[2], "temperature": 0.2, "logit_scale": 0.1, "softcap": 9.0}
    out = rlkern.sparse_linear_logprob(
        *leaves[:2], *sets, logits_rounding="bf16", outputs=ALL, **options
    )
    want = dense(*leaves[:2], *sets, rounded=True, **options)
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want[:3])]
    d_want = torch.autograd.grad(want[:3], leaves, upstream)
    d_got = torch.autograd.grad(differentiable(out), leaves, upstream)
    for got, expected in zip((*out[:4], *d_got), (*want[:4], *d_want)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    unrounded = dense(*leaves[:2], *sets, **options)
    assert (out.logprob - unrounded[0]).abs().max() > 2e-3


def test_sum_of_squares_and_top1(device):
    # logits 0, 1, 2 and, tied with the last, 2; the vocabulary is their order in weight
    hidden = torch.ones(7, 1).to(device)
    weight = torch.tensor([[0.0], [1.0], [2.0], [2.0]]).to(device)
    ids = torch.tensor([0, 1, 2, 3, 2, 1, 0, 0, 1, 1, 2, 3, 2, 9])
    offsets = torch.tensor([0, 4, 7, 9, 9, 10, 12, 14])
    #        tied, beaten, not kept, nothing kept, alone, out of range, ignored
    targets = torch.tensor([3, 1, 3, 0, 1, 4, -100])
    moved = (t.to(device) for t in (targets, ids, offsets))
    args = (hidden, weight, None, *moved, None, *PLAIN, True)
    kept = [[0, 1, 2, 2], [2, 1, 0], [0, 1], None, [1], [2, 2], [2]]
    want = [float(torch.tensor(k).float().softmax(0).square().sum()) if k else 0.0 for k in kept]
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(*args)
        torch.testing.assert_close(out[3].tolist(), want, rtol=1e-6, atol=0)
        assert out[4].tolist() == [True, False, False, False, True, False, False], kernel.name
        # the target's logit is not the largest of its row where another is NaN
        spoilt = torch.where(weight == 0, NAN, weight)
        out = kernel.forward(hidden, spoilt, *args[2:])
        assert out[4].tolist() == [False] * 4 + [True] + [False] * 2, kernel.name
        assert out[3].isnan().tolist() == [True, True, True] + [False] * 4, kernel.name


def test_squares_across_blocks_of_slots(device):
    """A row's larger logits may come first or last; the sums move to the new largest."""
    vocab = 1300
    weight = torch.linspace(0, 12, vocab)[:, None].to(device)
    hidden = torch.ones(2, 1).to(device)
    order = torch.arange(vocab)
    ids = torch.cat([order, order.flip(0)]).to(device)
    offsets = torch.tensor([0, vocab, 2 * vocab]).to(device)
    targets = torch.tensor([vocab - 1, vocab - 2]).to(device)
    want = weight[:, 0].double().softmax(0).square().sum()
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(hidden, weight, None, targets, ids, offsets, None, *PLAIN, False)
        for got in out[3]:
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
        assert out[4].tolist() == [True, False], kernel.name


def test_logits_of_minus_infinity(device):
    """A bias of -inf is a token of probability 0; under a soft cap it is one of logit -softcap."""
    hidden, weight, _, _, _ = (t.to(device) for t in problem(3, 8, 6, [6] * 3))
    bias = torch.tensor([0.5, -INF, -1.0, -INF, -INF, 0.25]).to(device)
    ids = torch.tensor([0, 1, 2, 3, 2, 5, 1, 3, 4]).to(device)
    offsets = torch.tensor([0, 3, 6, 9]).to(device)
    #        kept, of probability 0, and a row with nothing else
    targets = torch.tensor([0, 3, 1]).to(device)
    args = (hidden, weight, bias, targets, ids, offsets, None, *PLAIN, True)
    ones = torch.ones(3).to(device)
    for kernel in checks.kernels(OP, device):
        logprob, lse, entropy, squares, is_top1, *_ = out = kernel.forward(*args)
        assert logprob[0].isfinite(), kernel.name
        assert logprob[1] == -INF, kernel.name
        assert logprob[2].isnan(), kernel.name
        assert lse.isneginf().tolist() == [False, False, True], kernel.name
        assert entropy.isnan().tolist() == [False, False, True], kernel.name
        assert squares.isnan().tolist() == [False, False, True], kernel.name
        assert not is_top1[1:].any(), kernel.name
        inputs = samples.backward_inputs(args, out)
        grads = kernel.backward(None, *[ones] * 2, *inputs[3:])
        assert all(g.isfinite().all() for g in grads), kernel.name
        assert not grads[0][2].any(), kernel.name
        assert not grads[2][[1, 3, 4]].any(), kernel.name
        capped = (*args[:7], 1.0, 1.0, 4.0, -100, False, True)
        out = kernel.forward(*capped)
        want = torch.tensor([4.0] * 3).softmax(0)[0].log().to(device)
        torch.testing.assert_close(out[0][2], want)
        grads = kernel.backward(*samples.backward_inputs(capped, out))
        assert all(g.isfinite().all() for g in grads), kernel.name
        assert not grads[2][[1, 3, 4]].any(), kernel.name


def test_padded_vocabulary_is_not_read(device):
    hidden, weight, targets, ids, offsets = (t.to(device) for t in problem(4, 16, 64, [9] * 4))
    padding = torch.full((8, 16), NAN).to(device)
    padded = torch.cat([weight, padding]).requires_grad_()
    bias = torch.randn(64).to(device)
    padded_bias = torch.cat([bias, padding[:, 0]]).requires_grad_()
    hidden.requires_grad_()
    spoilt = ids.clone()
    spoilt[::9] = torch.tensor([64, 71, 72, -1]).to(device)
    targets = ids[3::9].clone()
    outside = torch.tensor([0, 0, 1, 0], dtype=torch.bool).to(device)
    targets[outside] = 64
    # an ignored id stays out also where a soft cap makes logits of -inf finite
    options = {"softcap": 5.0, "outputs": ALL}
    out = rlkern.sparse_linear_logprob(
        hidden, padded, targets, spoilt, offsets, bias=padded_bias, vocab_size=64, **options
    )
    inside = torch.cat([ids[1:9], ids[10:18], ids[19:27], ids[28:36]])
    plain = rlkern.sparse_linear_logprob(
        hidden, weight, targets, inside, torch.arange(5).to(device) * 8, bias=bias, **options
    )
    for a, b in zip(out[:5], plain[:5]):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert out.logprob.isnan().tolist() == outside.tolist()
    (out.logprob[~outside].sum() + out.entropy.sum()).backward()
    assert hidden.grad.isfinite().all()
    for grad in (padded.grad, padded_bias.grad):
        assert (grad[64:] == 0).all()
        assert grad[:64].abs().sum() > 0
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_everything_kept_is_linear_logprob(device, dtype):
    hidden, weight, targets, ids, offsets = (
        t.to(device) for t in problem(5, 72, 300, [300] * 5, dtype, scale=0.5)
    )
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    names = {"outputs": DIFFERENTIABLE}
    ours = differentiable(rlkern.sparse_linear_logprob(*leaves, targets, ids, offsets, **names))
    full = differentiable(rlkern.linear_logprob(*leaves, targets, **names))
    upstream = [checks.random_sign(o, seed) for seed, o in enumerate(full)]
    for got, want in zip(ours, full):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    d_ours = torch.autograd.grad(ours, leaves, upstream)
    d_full = torch.autograd.grad(full, leaves, upstream)
    eps = torch.finfo(dtype).eps
    for got, want in zip(d_ours, d_full):
        limit = 4 * eps * want.abs().max() + 1e-5
        assert (got.double() - want.double()).abs().max() <= limit


def test_special_rows(device):
    hidden, weight, bias = torch.randn(6, 8), torch.randn(10, 8), torch.randn(10)
    offsets = torch.tensor([0, 2, 4, 4, 4, 6, 8])
    ids = torch.tensor([1, 2, 3, 4, 7, 8, -1, 10])
    #        kept, not kept, nothing kept, and ignored, out of range, all ids out of range
    targets = torch.tensor([2, 9, 5, -100, 10, 5])
    tensors = [t.to(device) for t in (hidden, weight, bias, targets, ids, offsets)]
    a = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0], device=device)
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(*tensors, None, *PLAIN, True)
        logprob, lse, entropy, squares, is_top1, logits, slot = (o.cpu() for o in out)
        assert logprob[0].isfinite(), kernel.name
        assert logprob[1] == -INF, kernel.name
        assert logprob[[2, 4, 5]].isnan().all(), kernel.name
        assert logprob[3] == 0, kernel.name
        assert lse.isneginf().tolist() == [False, False, True, True, False, True], kernel.name
        assert entropy[[2, 3, 5]].eq(0).all(), kernel.name
        assert (entropy[[0, 1, 4]] > 0).all(), kernel.name
        assert squares[[2, 3, 5]].eq(0).all(), kernel.name
        assert (squares[[0, 1, 4]] > 0).all(), kernel.name
        assert not is_top1[1:].any(), kernel.name
        assert logits.isneginf().tolist() == [False] * 6 + [True] * 2, kernel.name
        assert slot.tolist() == [1, -1, -1, -1, -1, -1], kernel.name
        # only the first row's log-prob has a gradient, and nothing is NaN
        inputs = samples.backward_inputs((*tensors, None, *PLAIN, True), out)[3:]
        d_hidden, d_weight, d_bias = (g.cpu() for g in kernel.backward(a, None, None, *inputs))
        assert d_hidden.any(1).tolist() == [True] + [False] * 5, kernel.name
        assert d_weight.any(1).nonzero()[:, 0].tolist() == [1, 2], kernel.name
        assert d_bias.nonzero()[:, 0].tolist() == [1, 2], kernel.name
        grads = kernel.backward(a, a, a, *inputs)
        assert all(g.isfinite().all() for g in grads), kernel.name
        assert grads[0].any(1).tolist() == [True, True, False, False, True, False], kernel.name


def test_an_id_that_stands_twice_counts_twice(device):
    """Distinct ids are the caller's part; this is what happens without."""
    leaves = (torch.randn(1, 8), torch.randn(5, 8), torch.randn(5))
    ids, offsets = torch.tensor([3, 1, 3]), torch.tensor([0, 3])
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    z = (exact[0] @ exact[1][ids].T)[0] + exact[2][ids]
    want = (z[0] - z.logsumexp(0), z.logsumexp(0))
    d_want = torch.autograd.grad(want, exact, (torch.tensor(2.0).double(), torch.tensor(0.5)))
    tensors = [t.to(device) for t in (*leaves, torch.tensor([3]), ids, offsets)]
    args = (*tensors, None, *PLAIN, True)
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(*args)
        torch.testing.assert_close(out[0][0].double().cpu(), want[0].detach(), rtol=0, atol=1e-5)
        squares = z.softmax(0).square().sum().detach()
        torch.testing.assert_close(out[3][0].double().cpu(), squares, rtol=0, atol=1e-5)
        inputs = samples.backward_inputs(args, out)[3:]
        grads = (torch.tensor([2.0]).to(device), torch.tensor([0.5]).to(device), None)
        for got, expected in zip(kernel.backward(*grads, *inputs), d_want):
            torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(device, trained):
    hidden, weight, *rest = (t.to(device) for t in problem(5, 8, 20, [4] * 5))
    leaves = {"hidden": hidden, "weight": weight, "bias": torch.randn(20).to(device)}
    all_train = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    leaves[trained].requires_grad_()
    names = ("targets", "kept_ids", "kept_offsets")
    for each in (all_train, leaves):
        rlkern.sparse_linear_logprob(**each, **dict(zip(names, rest))).logprob.sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name == trained)
    assert_same_bits(trained, leaves[trained].grad, all_train[trained].grad)


def test_logits_are_kept_for_a_backward_alone():
    hidden, weight, *sets = problem(4, 8, 20, [4] * 4)
    args = (hidden, weight, None, *sets, None, *PLAIN)
    for want in (False, True):
        out = torch.ops.rlkern.sparse_linear_logprob_fwd(*args, want)
        assert [o.numel() for o in out] == [4] * 5 + [16 * want, 4 * want]
    weight.requires_grad_()
    with torch.no_grad():
        assert rlkern.sparse_linear_logprob(hidden, weight, *sets).logprob.grad_fn is None


def test_outputs_asked_for_are_those_that_come():
    tensors = problem(4, 8, 20, [4] * 4)
    for name in ALL:
        out = rlkern.sparse_linear_logprob(*tensors, outputs=(name,))
        assert [field for field in out._fields if getattr(out, field) is not None] == [name]
        kind = torch.bool if name == "is_top1" else torch.float32
        assert getattr(out, name).dtype == kind


def test_rows_that_nobody_kept_are_not_read(device):
    """NaN in them reaches nothing; in a kept row it reaches the rows that kept it."""
    hidden, weight, targets, ids, offsets = (t.to(device) for t in problem(4, 8, 30, [6] * 4))
    spoilt = torch.full_like(weight, NAN)
    spoilt[ids] = weight[ids]
    for kernel in checks.kernels(OP, device):
        args = (hidden, spoilt, None, targets, ids, offsets, None, *PLAIN, True)
        out = kernel.forward(*args)
        want = kernel.forward(hidden, weight, *args[2:])
        for a, b in zip(out, want):
            assert_same_bits(kernel.name, a.float(), b.float())
        grads = kernel.backward(*samples.backward_inputs(args, out))
        assert all(g.isfinite().all() for g in grads), kernel.name
        broken = spoilt.clone()
        broken[ids[0]] = NAN
        reached = kept_mask(ids, offsets, 30)[:, int(ids[0])]
        out = kernel.forward(hidden, broken, *args[2:])
        assert not out[4][reached].any(), kernel.name
        for part in out[:4]:
            assert part.isnan().cpu().tolist() == reached.tolist(), kernel.name


def test_a_transposed_head_and_strided_inputs():
    _, _, targets, ids, offsets = problem(5, 16, 50, [7] * 5)
    weight, bias = torch.randn(16, 50).T, torch.randn(100)[::2]
    hidden = torch.randn(2, 9, 16)[:, ::2].reshape(-1, 16)[::2]
    rest = (targets, ids, offsets)
    got = rlkern.sparse_linear_logprob(hidden, weight, *rest, bias=bias).logprob
    plain = (t.contiguous() for t in (hidden, weight))
    want = rlkern.sparse_linear_logprob(*plain, *rest, bias=bias.contiguous()).logprob
    assert_same_bits("strided", got, want)


def test_integers_of_either_size_give_the_same_bits(device):
    hidden, weight, *integers = (t.to(device) for t in problem(5, 16, 50, [7] * 5))
    got = rlkern.sparse_linear_logprob(hidden, weight, *(i.int() for i in integers)).logprob
    want = rlkern.sparse_linear_logprob(hidden, weight, *integers).logprob
    assert_same_bits("int32", got, want)


@pytest.mark.parametrize(
    "scalars",
    [
        (0.37, 1.0, 0.0, 7, False),
        (2.25, 0.61, 0.0, 7, True),
        (1.0, 1.7, 2.9, 7, False),
        (0.8, 0.4, 5.3, 7, True),
    ],
)
def test_scalars_reach_the_kernel(scalars):
    """The stable ABI does not compare C++ parameter types with the schema."""
    _, _, _, ids, offsets = problem(4, 6, 9, [9, 9, 3, 9])
    hidden, weight, bias = halves(4, 6, seed=1) / 2, halves(9, 6, seed=2) / 8, halves(9, seed=3) / 8
    targets = torch.tensor([3, 7, 7, 1])
    args = (hidden, weight, bias, targets, ids, offsets, None, *scalars, True)
    got = torch.ops.rlkern.sparse_linear_logprob_fwd(*args)
    torch.testing.assert_close(got, reference.forward(*args))
    assert (got[0][1:3] == 0).all()
    inputs = samples.backward_inputs(args, got)
    for needs in itertools.product((True, False), repeat=3):
        chosen = (*inputs[:-3], *needs)
        grads = torch.ops.rlkern.sparse_linear_logprob_bwd(*chosen)
        torch.testing.assert_close(grads, reference.backward(*chosen), rtol=1e-5, atol=1e-5)


def test_bad_offsets_stay_in_bounds(device):
    """What other devices, which do not look at the values of kept_offsets, make of bad ones."""
    hidden, weight, targets, ids, _ = (t.to(device) for t in problem(2, 8, 20, [5, 5]))
    for kernel in checks.kernels(OP, device):
        # slots 0 and 9 belong to no row
        offsets = torch.tensor([1, 5, 9], device=device)
        args = (hidden, weight, hidden.new_zeros(20), targets, ids, offsets, None, *PLAIN, True)
        out = kernel.forward(*args)
        inner = (ids[1:9].contiguous(), torch.tensor([0, 4, 8], device=device), *args[6:])
        for a, b in zip(out[:5], kernel.forward(*args[:4], *inner)):
            assert_same_bits(kernel.name, a.float(), b.float())
        grads = kernel.backward(*samples.backward_inputs(args, out))
        assert all(g.isfinite().all() for g in grads), kernel.name
        nobodys = [i for i in range(20) if i not in ids[1:9].tolist()]
        assert not grads[1][nobodys].any(), kernel.name
        assert not grads[2][nobodys].any(), kernel.name
        if kernel.name == "reference":
            continue
        for bad in ([-5, 2, 2**40], [2**31, -1, 3], [8, 1, 6]):
            offsets = torch.tensor(bad, device=device)
            args = (*args[:5], offsets, None, *PLAIN, True)
            kernel.backward(*samples.backward_inputs(args, kernel.forward(*args)))


def test_more_than_65535_rows(device):
    rows = 66_000 if device == "cuda" else 2_000
    hidden, weight = torch.randn(rows, 4, device=device), torch.randn(3, 4, device=device)
    targets = torch.randint(3, (rows,), device=device)
    offsets = torch.arange(rows + 1, device=device)
    out = rlkern.sparse_linear_logprob(hidden, weight, targets, targets, offsets, outputs=ALL)
    assert not out.logprob.any()
    assert not out.entropy.any()
    want = (hidden * weight[targets]).sum(-1)
    torch.testing.assert_close(out.logsumexp, want, rtol=1e-5, atol=1e-5)


def test_memory_is_that_of_the_kept_sets():
    """Neither a (T, V) tensor nor gathered rows: 96 MiB of either would show."""
    code = """
import resource, torch, rlkern
hidden = torch.randn(1024, 256, requires_grad=True)
weight = torch.randn(24576, 256)
ids = torch.stack([torch.randperm(24576)[:96] for _ in range(1024)])
offsets = torch.arange(1025) * 96
def run(t):
    out = rlkern.sparse_linear_logprob(hidden[:t], weight, ids[:t, 0], ids[:t].flatten(),
                                       offsets[:t + 1])
    out.logprob.sum().backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(1024)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 32, f"{run.stdout} MiB"


def test_compiles_whole():
    hidden, weight, targets, ids, offsets = problem(5, 8, 12, [3, 12, 1, 5, 4])
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), torch.randn(12).requires_grad_())

    def loss(hidden, weight, bias, targets, ids, offsets):
        out = rlkern.sparse_linear_logprob(
            hidden,
            weight,
            targets,
            ids,
            offsets,
            bias=bias,
            temperature=0.9,
            softcap=5.0,
            vocab_size=11,
            outputs=ALL,
            logits_rounding="bf16",
        )
        taken = torch.where(out.is_top1, 2.0, 0.5) * out.sum_sq_prob * out.logprob
        return (torch.where(targets < 11, taken, 0.0) - 0.1 * out.entropy).sum()

    want = torch.autograd.grad(loss(*leaves, targets, ids, offsets), leaves)
    got = torch.autograd.grad(checks.compiled(loss)(*leaves, targets, ids, offsets), leaves)
    for g, w in zip(got, want):
        assert_same_bits("gradient", g, w)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    depth=st.integers(1, 70),
    vocab=st.integers(1, 900),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.floats(0.1, 10.0),
    logit_scale=st.floats(0.1, 3.0),
    softcap=st.sampled_from([0.0, 3.0, 30.0]),
    biased=st.booleans(),
    dtype=st.sampled_from(checks.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_kept_sets(
    data, depth, vocab, scale, temperature, logit_scale, softcap, biased, dtype, seed
):
    sizes = data.draw(st.lists(st.integers(0, vocab), max_size=9))
    hidden, weight, targets, ids, offsets = problem(
        len(sizes), depth, vocab, sizes, dtype, seed, scale
    )
    bias = torch.linspace(-2, 3, vocab).to(dtype) if biased else None
    scalars = (temperature, logit_scale, softcap, -100, False)
    args = (hidden, weight, bias, targets, ids, offsets, None, *scalars, True)
    truth, torchs = reference.forward(*to_double(args)), reference.forward(*args)
    ours = torch.ops.rlkern.sparse_linear_logprob_fwd(*args)
    for i in MEASURED:
        assert_within_budget(NAMES[i], ours[i], truth[i], torchs[i], SUM_ULPS)
    filled = [t for t, size in enumerate(sizes) if size]
    if filled:
        exact = dense(
            hidden.double(),
            weight.double(),
            targets.clamp(min=0),
            ids,
            offsets,
            bias=bias.double() if biased else None,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap or None,
        )
        for i, want in zip((0, 2, 1, 3), exact):
            torch.testing.assert_close(truth[i][filled], want[filled], rtol=1e-10, atol=1e-9)
    exact = reference.backward(*to_double(samples.backward_inputs(to_double(args), truth)))
    peers = reference.backward(*samples.backward_inputs(args, torchs))
    gots = torch.ops.rlkern.sparse_linear_logprob_bwd(*samples.backward_inputs(args, ours))
    for got, want, peer in zip(gots, exact, peers):
        if got.numel():
            # the slope of a soft cap near its end is the difference of two numbers near 1
            limit = 3 * (peer.double() - want).abs().max() + 1e-4 * want.abs().max().clamp(min=1e-2)
            assert (got.double() - want).abs().max() <= limit


HIDDEN, WEIGHT = torch.zeros(3, 8), torch.zeros(10, 8)
TARGETS, IDS = torch.zeros(3, dtype=torch.int64), torch.arange(6)
OFFSETS = torch.tensor([0, 2, 2, 6])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": 3}, TypeError, "expected hidden to be a Tensor, got int"),
        ({"hidden": HIDDEN.long()}, TypeError, "expected hidden of dtype"),
        ({"hidden": HIDDEN[None]}, ValueError, r"hidden of shape \(T, H\), got \(1, 3, 8\)"),
        ({"weight": WEIGHT.bfloat16()}, TypeError, "weight of dtype float32, got bfloat16"),
        ({"weight": WEIGHT[:, 1:]}, ValueError, r"weight of shape \(V, H\) = \(10, 8\), got"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "expected weight on cpu like hidden, got meta"),
        ({"targets": TARGETS[1:]}, ValueError, r"targets of shape \(T,\) = \(3,\), got \(2,\)"),
        ({"kept_ids": [1]}, TypeError, "expected kept_ids to be a Tensor, got list"),
        ({"kept_ids": IDS.float()}, TypeError, "kept_ids of dtype int64 or int32, got float32"),
        ({"kept_ids": IDS[None]}, ValueError, r"kept_ids of shape \(N,\), got \(1, 6\)"),
        ({"kept_ids": IDS.to("meta")}, ValueError, "kept_ids on cpu like hidden, got meta"),
        ({"kept_offsets": OFFSETS.float()}, TypeError, "kept_offsets of dtype int64 or int32"),
        ({"kept_offsets": OFFSETS[1:]}, ValueError, r"of shape \(T \+ 1,\) = \(4,\), got \(3,\)"),
        ({"kept_ids": IDS[:5]}, ValueError, r"to rise from 0 to N = 5, got \[0, 2, 2, 6\]"),
        ({"kept_offsets": OFFSETS + 1}, ValueError, r"rise from 0 to N = 6, got \[1, 3, 3, 7\]"),
        ({"kept_offsets": torch.tensor([0, 4, 2, 6])}, ValueError, r"got \[0, 4, 2, 6\]"),
        ({"temperature": 0.0}, ValueError, "temperature to be positive and finite, got 0.0"),
        ({"outputs": ()}, ValueError, "outputs to be a non-empty tuple"),
        ({"outputs": ("logits",)}, ValueError, "outputs to be one of"),
        ({"bias": 3}, TypeError, "expected bias to be a Tensor, got int"),
        ({"bias": IDS}, TypeError, "bias of dtype float32, got int64"),
        ({"bias": WEIGHT}, ValueError, r"bias of shape \(V,\) = \(10,\), got \(10, 8\)"),
        ({"bias": WEIGHT[:, 0].to("meta")}, ValueError, "bias on cpu like hidden, got meta"),
        ({"softcap": 0.0}, ValueError, "softcap to be positive and finite, got 0.0"),
        ({"logit_scale": -2}, ValueError, "logit_scale to be positive and finite, got -2"),
        ({"vocab_size": 11}, ValueError, r"vocab_size in \[1, V\] = \[1, 10\], got 11"),
        ({"logits_rounding": "fp16"}, ValueError, "logits_rounding to be None or .bf16., got"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    values = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS}
    values |= {"kept_ids": IDS, "kept_offsets": OFFSETS} | change
    names = ("hidden", "weight", "targets", "kept_ids", "kept_offsets")
    tensors = [values.pop(name) for name in names]
    with pytest.raises(error, match=f"^sparse_linear_logprob: .*{message}"):
        rlkern.sparse_linear_logprob(*tensors, **values)
