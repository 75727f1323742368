"""Log-prob and entropy under the tokens that a sampler kept."""

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
ALL = ("logprob", "entropy", "logsumexp")
# the order of the op's outputs
NAMES = ("logprob", "logsumexp", "entropy", "logits")
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


def dense(hidden, weight, targets, kept_ids, kept_offsets, temperature=1.0):
    """(logprob, entropy, logsumexp) from all logits, those that were not kept at -inf."""
    kept = kept_mask(kept_ids, kept_offsets, weight.shape[0]).to(hidden.device)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None]
    z = (hidden @ weight.T / temperature).masked_fill(~kept, -INF)
    logp = z.log_softmax(-1)
    logprob = logp.gather(-1, targets[:, None])[:, 0]
    finite = logp.masked_fill(~kept, 0.0)
    return logprob, -(finite.exp() * finite * kept).sum(-1), z.logsumexp(-1)


def problem(rows, depth, vocab, sizes, dtype=torch.float32, seed=0, scale=1.0):
    """(hidden, weight, targets, kept_ids, kept_offsets)"""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = (torch.randn(vocab, depth, generator=generator) * scale).to(dtype)
    return hidden, weight, *kept_sets(rows, vocab, sizes, generator)


@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradient_is_the_derivative(per_row):
    hidden, weight, targets, ids, offsets = problem(5, 3, 9, [4, 1, 0, 9, 3], torch.float64)
    targets[3] = -100
    targets[4] = next(i for i in range(9) if i not in ids[-3:].tolist())
    rows = torch.linspace(0.5, 2, 5, dtype=torch.float64) if per_row else None
    hidden.requires_grad_(), weight.requires_grad_()
    constants = (targets, ids, offsets, rows, 0.7, -100)
    logprob, lse, entropy, logits, slot = reference.forward(hidden, weight, *constants, True, True)
    assert logprob[4] == -INF
    upstream = [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    a, c, b = upstream
    # what is infinite has no derivative of its own
    outputs = (logprob[[0, 1, 3]], lse[[0, 1, 3, 4]], entropy)
    grads = (a[[0, 1, 3]], c[[0, 1, 3, 4]], b)
    want = torch.autograd.grad(outputs, (hidden, weight), grads)
    with torch.no_grad():
        saved = (hidden, weight, ids, offsets, logits, slot, lse, entropy, rows, 0.7)
        got = reference.backward(a, c, b, *saved, True, True)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


def test_gradcheck_through_the_public_function():
    hidden, weight, targets, ids, offsets = problem(3, 4, 6, [5, 2, 6], torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()

    def run(h, w):
        return tuple(
            rlkern.sparse_linear_logprob(h, w, targets, ids, offsets, temperature=1.7, outputs=ALL)
        )

    assert run(hidden, weight)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(run, (hidden, weight))


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
            for got, want, peer, part in zip(ours, truth, torchs, NAMES):
                assert_within_budget(f"{what} {part}", got, want, peer, SUM_ULPS)
            assert ours[4].tolist() == truth[4].tolist(), what
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
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        whole = kernel.forward(hidden, weight, targets, ids, offsets, None, 0.8, -100, True, False)
        for order in ([3], [1, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [4, 3, 3]):
            parts = [ids[offsets[t] : offsets[t + 1]] for t in order]
            lengths = torch.tensor([0] + [len(part) for part in parts])
            part = kernel.forward(
                hidden[order],
                weight,
                targets[order],
                torch.cat(parts),
                lengths.cumsum(0).to(device),
                None,
                0.8,
                -100,
                True,
                True,
            )
            for name, a, b in zip(NAMES, part, whole[:3]):
                assert_same_bits(f"{kernel.name} {order} {name}", a, b[order])


def test_training_and_scoring_give_the_same_bits(device):
    tensors = [t.to(device) for t in problem(9, 16, 50, [5] * 9)]
    tensors[0].requires_grad_()
    train = rlkern.sparse_linear_logprob(*tensors, outputs=ALL)
    with torch.no_grad():
        score = rlkern.sparse_linear_logprob(*tensors)
    assert_same_bits("logprob", train.logprob.detach(), score.logprob)
    assert (train.logprob.detach() - score.logprob).exp().eq(1).all()


@pytest.mark.parametrize("per_row", [False, True])
def test_equals_a_masked_dense_softmax_and_differentiates(device, per_row):
    sizes = [30, 1, 200, 611, 7, 45]
    tensors = [t.to(device) for t in problem(6, 40, 611, sizes, scale=0.25)]
    temperature = torch.linspace(0.4, 1.6, 6).to(device) if per_row else 0.6
    leaves = [tensors[0].requires_grad_(), tensors[1].requires_grad_()]
    out = rlkern.sparse_linear_logprob(*tensors, temperature=temperature, outputs=ALL)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = dense(*exact, *tensors[2:], temperature)
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    d_want = torch.autograd.grad(want, exact, upstream)
    d_got = torch.autograd.grad(tuple(out), leaves, [u.float() for u in upstream])
    for got, expected in zip((*out, *d_got), (*want, *d_want)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)
    never = ~kept_mask(tensors[3], tensors[4], 611).any(0)
    assert not d_got[1][never].any()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_everything_kept_is_linear_logprob(device, dtype):
    hidden, weight, targets, ids, offsets = (
        t.to(device) for t in problem(5, 72, 300, [300] * 5, dtype, scale=0.5)
    )
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    ours = rlkern.sparse_linear_logprob(*leaves, targets, ids, offsets, outputs=ALL)
    full = rlkern.linear_logprob(*leaves, targets, outputs=ALL)
    upstream = [checks.random_sign(o, seed) for seed, o in enumerate(full)]
    for got, want in zip(ours, full):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    d_ours = torch.autograd.grad(tuple(ours), leaves, upstream)
    d_full = torch.autograd.grad(tuple(full), leaves, upstream)
    eps = torch.finfo(dtype).eps
    for got, want in zip(d_ours, d_full):
        limit = 4 * eps * want.abs().max() + 1e-5
        assert (got.double() - want.double()).abs().max() <= limit


def test_special_rows(device):
    hidden, weight = torch.randn(6, 8), torch.randn(10, 8)
    offsets = torch.tensor([0, 2, 4, 4, 4, 6, 8])
    ids = torch.tensor([1, 2, 3, 4, 7, 8, -1, 10])
    #        kept, not kept, nothing kept, and ignored, out of range, all ids out of range
    targets = torch.tensor([2, 9, 5, -100, 10, 5])
    tensors = [t.to(device) for t in (hidden, weight, targets, ids, offsets)]
    a = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0], device=device)
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(*tensors, None, 1.0, -100, True, True)
        logprob, lse, entropy, logits, slot = (o.cpu() for o in out)
        assert logprob[0].isfinite(), kernel.name
        assert logprob[1] == -INF, kernel.name
        assert logprob[[2, 4, 5]].isnan().all(), kernel.name
        assert logprob[3] == 0, kernel.name
        assert lse.isneginf().tolist() == [False, False, True, True, False, True], kernel.name
        assert entropy[[2, 3, 5]].eq(0).all(), kernel.name
        assert (entropy[[0, 1, 4]] > 0).all(), kernel.name
        assert logits.isneginf().tolist() == [False] * 6 + [True] * 2, kernel.name
        assert slot.tolist() == [1, -1, -1, -1, -1, -1], kernel.name
        # only the first row's log-prob has a gradient, and nothing is NaN
        saved = (*tensors[:2], *tensors[3:], *out[3:], out[1], out[2], None, 1.0, True, True)
        d_hidden, d_weight = (g.cpu() for g in kernel.backward(a, None, None, *saved))
        assert d_hidden.any(1).tolist() == [True] + [False] * 5, kernel.name
        assert d_weight.any(1).nonzero()[:, 0].tolist() == [1, 2], kernel.name
        d_hidden, d_weight = kernel.backward(a, a, a, *saved)
        assert d_hidden.isfinite().all(), kernel.name
        assert d_weight.isfinite().all(), kernel.name
        assert d_hidden.any(1).tolist() == [True, True, False, False, True, False], kernel.name


def test_an_id_that_stands_twice_counts_twice(device):
    """Distinct ids are the caller's part; this is what happens without."""
    hidden, weight = torch.randn(1, 8), torch.randn(5, 8)
    ids, offsets = torch.tensor([3, 1, 3]), torch.tensor([0, 3])
    exact = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    z = (exact[0] @ exact[1][ids].T)[0]
    want = (z[0] - z.logsumexp(0), z.logsumexp(0))
    d_want = torch.autograd.grad(want, exact, (torch.tensor(2.0).double(), torch.tensor(0.5)))
    tensors = [t.to(device) for t in (hidden, weight, torch.tensor([3]), ids, offsets)]
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(*tensors, None, 1.0, -100, True, True)
        torch.testing.assert_close(out[0][0].double().cpu(), want[0].detach(), rtol=0, atol=1e-5)
        saved = (*tensors[:2], *tensors[3:], *out[3:], out[1], out[2], None, 1.0, True, True)
        grads = (torch.tensor([2.0]).to(device), torch.tensor([0.5]).to(device), None)
        for got, expected in zip(kernel.backward(*grads, *saved), d_want):
            torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True)])
def test_frozen_inputs_get_no_gradient(device, train_hidden, train_weight):
    hidden, weight, *rest = (t.to(device) for t in problem(5, 8, 20, [4] * 5))
    hidden.requires_grad_(train_hidden)
    weight.requires_grad_(train_weight)
    rlkern.sparse_linear_logprob(hidden, weight, *rest).logprob.sum().backward()
    assert (hidden.grad is not None) == train_hidden
    assert (weight.grad is not None) == train_weight


def test_logits_are_kept_for_a_backward_alone():
    tensors = problem(4, 8, 20, [4] * 4)
    args = (*tensors, None, 1.0, -100, False)
    for want in (False, True):
        out = torch.ops.rlkern.sparse_linear_logprob_fwd(*args, want)
        assert [o.numel() for o in out] == [4, 4, 0, 16 * want, 4 * want]
    tensors[1].requires_grad_()
    with torch.no_grad():
        assert rlkern.sparse_linear_logprob(*tensors).logprob.grad_fn is None


def test_rows_that_nobody_kept_are_not_read(device):
    """NaN in them reaches nothing; in a kept row it reaches the rows that kept it."""
    hidden, weight, targets, ids, offsets = (t.to(device) for t in problem(4, 8, 30, [6] * 4))
    spoilt = torch.full_like(weight, NAN)
    spoilt[ids] = weight[ids]
    for kernel in checks.kernels(OP, device):
        args = (hidden, spoilt, targets, ids, offsets, None, 1.0, -100, True, True)
        out = kernel.forward(*args)
        want = kernel.forward(hidden, weight, *args[2:])
        for a, b in zip(out, want):
            assert_same_bits(kernel.name, a, b)
        grads = kernel.backward(*samples.backward_inputs(args, out))
        assert all(g.isfinite().all() for g in grads), kernel.name
        broken = spoilt.clone()
        broken[ids[0]] = NAN
        reached = kept_mask(ids, offsets, 30)[:, int(ids[0])]
        out = kernel.forward(hidden, broken, *args[2:])
        for part in out[:3]:
            assert part.isnan().cpu().tolist() == reached.tolist(), kernel.name


def test_a_transposed_head_and_strided_hidden_states():
    _, _, targets, ids, offsets = problem(5, 16, 50, [7] * 5)
    weight = torch.randn(16, 50).T
    hidden = torch.randn(2, 9, 16)[:, ::2].reshape(-1, 16)[::2]
    got = rlkern.sparse_linear_logprob(hidden, weight, targets, ids, offsets).logprob
    want = rlkern.sparse_linear_logprob(
        hidden.contiguous(), weight.contiguous(), targets, ids, offsets
    ).logprob
    assert_same_bits("strided", got, want)


def test_integers_of_either_size_give_the_same_bits(device):
    hidden, weight, *integers = (t.to(device) for t in problem(5, 16, 50, [7] * 5))
    got = rlkern.sparse_linear_logprob(hidden, weight, *(i.int() for i in integers)).logprob
    want = rlkern.sparse_linear_logprob(hidden, weight, *integers).logprob
    assert_same_bits("int32", got, want)


def test_scalars_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    hidden, weight, _, ids, offsets = problem(4, 6, 9, [9, 9, 3, 9])
    targets = torch.tensor([3, 7, 7, 1])
    for temperature in (0.37, 2.25):
        args = (hidden, weight, targets, ids, offsets, None, temperature, 7, True, True)
        got = torch.ops.rlkern.sparse_linear_logprob_fwd(*args)
        torch.testing.assert_close(got, reference.forward(*args))
        assert (got[0][1:3] == 0).all()
        inputs = samples.backward_inputs(args, got)
        for needs in ((True, True), (True, False), (False, True)):
            chosen = (*inputs[:-2], *needs)
            grads = torch.ops.rlkern.sparse_linear_logprob_bwd(*chosen)
            torch.testing.assert_close(grads, reference.backward(*chosen), rtol=1e-5, atol=1e-5)


def test_bad_offsets_stay_in_bounds(device):
    """What other devices, which do not look at the values of kept_offsets, make of bad ones."""
    hidden, weight, targets, ids, _ = (t.to(device) for t in problem(2, 8, 20, [5, 5]))
    for kernel in checks.kernels(OP, device):
        # slots 0 and 9 belong to no row
        offsets = torch.tensor([1, 5, 9], device=device)
        args = (hidden, weight, targets, ids, offsets, None, 1.0, -100, True, True)
        out = kernel.forward(*args)
        inner = (ids[1:9].contiguous(), torch.tensor([0, 4, 8], device=device), *args[5:])
        for a, b in zip(out[:3], kernel.forward(*args[:3], *inner)):
            assert_same_bits(kernel.name, a, b)
        grads = kernel.backward(*samples.backward_inputs(args, out))
        assert all(g.isfinite().all() for g in grads), kernel.name
        assert not grads[1][[i for i in range(20) if i not in ids[1:9].tolist()]].any()
        if kernel.name == "reference":
            continue
        for bad in ([-5, 2, 2**40], [2**31, -1, 3], [8, 1, 6]):
            offsets = torch.tensor(bad, device=device)
            args = (hidden, weight, targets, ids, offsets, None, 1.0, -100, True, True)
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
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def loss(hidden, weight, targets, ids, offsets):
        out = rlkern.sparse_linear_logprob(
            hidden, weight, targets, ids, offsets, temperature=0.9, outputs=ALL
        )
        return (out.logprob - 0.1 * out.entropy).sum()

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
    dtype=st.sampled_from(checks.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_kept_sets(data, depth, vocab, scale, temperature, dtype, seed):
    sizes = data.draw(st.lists(st.integers(0, vocab), max_size=9))
    tensors = problem(len(sizes), depth, vocab, sizes, dtype, seed, scale)
    args = (*tensors, None, temperature, -100, True, True)
    truth, torchs = reference.forward(*to_double(args)), reference.forward(*args)
    ours = torch.ops.rlkern.sparse_linear_logprob_fwd(*args)
    for got, want, peer, name in zip(ours, truth, torchs, NAMES):
        assert_within_budget(name, got, want, peer, SUM_ULPS)
    filled = [t for t, size in enumerate(sizes) if size]
    if filled:
        exact = dense(
            tensors[0].double(),
            tensors[1].double(),
            tensors[2].clamp(min=0),
            *tensors[3:],
            temperature,
        )
        for got, want in zip((truth[0], truth[2], truth[1]), exact):
            torch.testing.assert_close(got[filled], want[filled], rtol=1e-10, atol=1e-9)
    exact = reference.backward(*to_double(samples.backward_inputs(to_double(args), truth)))
    peers = reference.backward(*samples.backward_inputs(args, torchs))
    gots = torch.ops.rlkern.sparse_linear_logprob_bwd(*samples.backward_inputs(args, ours))
    for got, want, peer in zip(gots, exact, peers):
        if got.numel():
            limit = 3 * (peer.double() - want).abs().max() + 1e-4 * want.abs().max().clamp(min=1e-3)
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
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    values = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS}
    values |= {"kept_ids": IDS, "kept_offsets": OFFSETS} | change
    names = ("hidden", "weight", "targets", "kept_ids", "kept_offsets")
    tensors = [values.pop(name) for name in names]
    with pytest.raises(error, match=f"^sparse_linear_logprob: .*{message}"):
        rlkern.sparse_linear_logprob(*tensors, **values)
