"""Sums and means of packed sequences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.segment_reduce import reference, samples
from rlkern.ops.segment_reduce.reference import KINDS
from rlkern.testing.numerics import assert_same_bits, to_double

OP = "segment_reduce"
NAN, INF = float("nan"), float("inf")


def bounds_of(lengths, integer=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(integer)


def oracle(values, lengths, kind, mask=None):
    """A loop in Python: each sequence's exactly rounded sum."""
    out, at = [], 0
    numbers = values.double().tolist()
    counts = [True] * len(numbers) if mask is None else mask.tolist()
    for length in lengths:
        part = [x for x, c in zip(numbers[at : at + length], counts[at : at + length]) if c]
        out.append(math.fsum(part) / (max(1, len(part)) if kind == "mean" else 1))
        at += length
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_through_the_public_function(kind):
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1]).bool()
    for chosen in (None, mask):

        def run(v, chosen=chosen):
            return rlkern.segment_reduce(v, bounds_of([3, 0, 2, 4]), kind=kind, mask=chosen)

        assert run(values).dtype == torch.float64
        assert torch.autograd.gradcheck(run, (values,))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_reference_gradient_is_the_derivative(dtype):
    for name, args in samples.sample_inputs("cpu", dtype):
        values, *rest = to_double(args)
        values.requires_grad_()
        out, count = reference.forward(values, *rest)
        inputs = samples.backward_inputs((values.detach(), *rest), (out.detach(), count))
        (want,) = torch.autograd.grad(out, values, inputs[0])
        assert_same_bits(name, reference.backward(*inputs), want + 0.0)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    checks.check_budget(OP, device, dtype)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_equals_the_exact_sum_rounded(device, kind, dtype):
    """To the last bit of float32 but one, also of 128 k values that nearly cancel."""
    lengths = [131072, 3, 0, 2049, 17]
    values = (torch.randn(sum(lengths)) * 10).to(dtype)
    mask = torch.rand(values.shape) < 0.7
    for chosen in (None, mask):
        want = oracle(values, lengths, kind, chosen)
        spoilt = values if chosen is None else torch.where(chosen, values, NAN)
        on_device = None if chosen is None else chosen.to(device)
        for kernel in checks.kernels(OP, device):
            if kernel.name == "reference":
                continue
            args = (spoilt.to(device), bounds_of(lengths).to(device), on_device, kind == "mean")
            got = kernel.forward(*args)[0].cpu().double()
            ulp = torch.finfo(torch.float32).eps * want.abs()
            assert ((got - want).abs() <= ulp).all(), f"{kernel.name}: {got - want}"


def test_the_scalar_reaches_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    values, cu_seqlens = torch.tensor([1.0, 2.0, 6.0]), bounds_of([3])
    grad = torch.tensor([12.0])
    for mean, want, each in ((False, 9.0, 12.0), (True, 3.0, 4.0)):
        out, count = torch.ops.rlkern.segment_reduce_fwd(values, cu_seqlens, None, mean)
        assert out.tolist() == [want]
        assert count.tolist() == ([3.0] if mean else [])
        back = torch.ops.rlkern.segment_reduce_bwd(grad, values, cu_seqlens, None, count, mean)
        assert back.tolist() == [each] * 3


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_sequence_does_not_depend_on_its_batch(device, dtype):
    lengths = [700, 0, 1, 5000, 33, 64]
    cu_seqlens = bounds_of(lengths)
    values = torch.randn(sum(lengths)).to(device, dtype)
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        whole = kernel.forward(values, cu_seqlens.to(device), None, True)[0]
        for s, length in enumerate(lengths):
            part = values[cu_seqlens[s] : cu_seqlens[s + 1]].clone()
            alone = kernel.forward(part, bounds_of([length]).to(device), None, True)[0]
            assert_same_bits(f"{kernel.name} {length}", alone, whole[s : s + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_masked_slots_may_hold_anything_and_get_no_gradient(device, kind):
    values = torch.tensor([1.0, NAN, 3.0, INF, -INF, 2.0], device=device, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 0, 0, 0]).bool().to(device)
    out = rlkern.segment_reduce(values, bounds_of([3, 3]).to(device), kind=kind, mask=mask)
    assert out.tolist() == ([4.0, 0.0] if kind == "sum" else [2.0, 0.0])
    out.backward(torch.tensor([5.0, NAN], device=device))
    each = 5.0 if kind == "sum" else 2.5
    assert values.grad.tolist() == [each, 0.0, each, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_reaches_its_own_sequence_alone(device, kind):
    values = torch.tensor([1.0, NAN, 3.0, INF, 2.0], device=device)
    cu_seqlens = bounds_of([2, 1, 2]).to(device)
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(values, cu_seqlens, None, kind == "mean")[0]
        assert out.isnan().tolist() == [True, False, False], kernel.name
        assert out[1:].tolist() == [3.0, INF], kernel.name


@pytest.mark.parametrize("kind", KINDS)
def test_empty_sequences_are_zero_and_no_sequences_are_none(device, kind):
    values = torch.empty(0, device=device, requires_grad=True)
    for lengths in ([], [0, 0, 0]):
        out = rlkern.segment_reduce(values, bounds_of(lengths).to(device), kind=kind)
        assert out.tolist() == [0.0] * len(lengths)
        assert out.dtype == torch.float32
        assert torch.autograd.grad(out.sum(), values)[0].shape == (0,)


def test_values_outside_of_all_sequences_are_ignored_and_bounds_are_kept(device):
    """What other devices, which do not look at the values of cu_seqlens, make of bad ones."""
    values = torch.arange(1.0, 7.0, device=device)
    grad = torch.tensor([10.0, 20.0], device=device)
    for kernel in checks.kernels(OP, device):
        bounds = torch.tensor([1, 3, 4], device=device)
        out, count = kernel.forward(values, bounds, None, True)
        assert out.tolist() == [2.5, 4.0], kernel.name
        back = kernel.backward(grad, values, bounds, None, count, True)
        assert back.tolist() == [0.0, 5.0, 5.0, 20.0, 0.0, 0.0], kernel.name
        if kernel.name == "reference":
            continue
        for bad in ([-5, 2, 2**40], [2**31, -1, 3], [4, 1, 6]):
            bounds = torch.tensor(bad, device=device)
            out, count = kernel.forward(values, bounds, None, True)
            back = kernel.backward(grad, values, bounds, None, count, True)
            assert out.isfinite().all(), kernel.name
            assert back.isfinite().all(), kernel.name


def test_more_than_65535_values_and_sequences(device):
    values = torch.randn(70_000, device=device, requires_grad=True)
    out = rlkern.segment_reduce(values, torch.arange(70_001, device=device), kind="mean")
    assert_same_bits("sequences of one", out.detach(), values.detach())
    upstream = checks.random_sign(out)
    assert_same_bits("gradient", torch.autograd.grad(out, values, upstream)[0], upstream)


def test_strided_values_and_mask(device):
    base = torch.randn(20, 3).to(device)
    mask = (torch.rand(20, 2) < 0.5).to(device)
    cu_seqlens = torch.stack([bounds_of([9, 11])] * 2, 1)[:, 0].to(device)
    got = rlkern.segment_reduce(base[:, 1], cu_seqlens, mask=mask[:, 1])
    want = rlkern.segment_reduce(
        base[:, 1].contiguous(), cu_seqlens.contiguous(), mask=mask[:, 1].contiguous()
    )
    assert_same_bits("strided", got, want)


def test_the_gradient_has_the_dtype_of_the_values(device):
    for dtype in checks.DTYPES:
        values = torch.randn(7, device=device, dtype=dtype, requires_grad=True)
        out = rlkern.segment_reduce(values, bounds_of([3, 4]).to(device), kind="mean")
        assert out.dtype == torch.float32
        out.sum().backward()
        assert values.grad.dtype == dtype
        want = torch.tensor([1 / 3] * 3 + [0.25] * 4).to(device, dtype)
        assert_same_bits("gradient", values.grad, want)


def test_compiles_whole():
    def loss(values, cu_seqlens, mask):
        mean = rlkern.segment_reduce(values, cu_seqlens, kind="mean", mask=mask)
        return (mean.exp() + rlkern.segment_reduce(values, cu_seqlens, mask=mask)).sum()

    values, mask = torch.randn(11, requires_grad=True), torch.rand(11) < 0.6
    args = (bounds_of([4, 0, 7]), mask)
    want = torch.autograd.grad(loss(values, *args), values)
    got = torch.autograd.grad(checks.compiled(loss)(values, *args), values)
    assert_same_bits("gradient", got[0], want[0])


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), max_size=12),
    kind=st.sampled_from(KINDS),
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    dtype=st.sampled_from(checks.DTYPES),
    integer=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_any_segmentation(lengths, kind, share, dtype, integer, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator).to(dtype)
    mask = None
    if share is not None:
        mask = torch.rand(values.shape, generator=generator) < share
    want = oracle(values, lengths, kind, mask)
    spoilt = values if mask is None else torch.where(mask, values, NAN)
    spoilt.requires_grad_()
    out = rlkern.segment_reduce(spoilt, bounds_of(lengths, integer), kind=kind, mask=mask)
    torch.testing.assert_close(out.double(), want, rtol=1e-7, atol=1e-12)
    upstream = torch.randn(out.shape, generator=generator)
    (got,) = torch.autograd.grad(out, spoilt, upstream)
    each = upstream.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    counted = torch.ones(values.shape) if mask is None else mask.float()
    if kind == "mean":
        number = [c.sum().clamp(min=1).expand(len(c)) for c in counted.split(lengths)]
        each = each / (torch.cat(number) if number else 1.0)
    assert_same_bits("gradient", got, torch.where(counted > 0, each, 0.0).to(dtype))


VALUES, BOUNDS = torch.zeros(6), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "expected values to be a Tensor, got list"),
        ({"values": torch.zeros(6).int()}, TypeError, "expected values of dtype float32"),
        ({"values": torch.zeros(2, 3)}, ValueError, r"values of shape \(T,\), got \(2, 3\)"),
        ({"cu_seqlens": [0, 6]}, TypeError, "expected cu_seqlens to be a Tensor, got list"),
        ({"cu_seqlens": BOUNDS.float()}, TypeError, "cu_seqlens of dtype int64 or int32"),
        ({"cu_seqlens": BOUNDS[None]}, ValueError, r"cu_seqlens of shape \(S\+1,\), got"),
        ({"cu_seqlens": BOUNDS[:0]}, ValueError, r"of shape \(S \+ 1,\), S >= 0, got \(0,\)"),
        ({"cu_seqlens": BOUNDS.to("meta")}, ValueError, "cu_seqlens on cpu like values, got meta"),
        ({"cu_seqlens": BOUNDS + 1}, ValueError, r"to rise from 0 to T = 6, got \[1, 3, 7\]"),
        ({"cu_seqlens": BOUNDS[:2]}, ValueError, r"to rise from 0 to T = 6, got \[0, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, r"got \[0, 4, 2, 6\]"),
        ({"cu_seqlens": torch.arange(10)}, ValueError, r"got \[0, 1, 2, 3, ..., 9\]"),
        ({"kind": "max"}, ValueError, "kind to be one of mean, sum, got 'max'"),
        ({"mask": torch.ones(6)}, TypeError, "expected mask of dtype bool, got float32"),
        ({"mask": torch.ones(5).bool()}, ValueError, r"mask of shape \(T,\) = \(6,\), got \(5,\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"values": VALUES, "cu_seqlens": BOUNDS} | change
    with pytest.raises(error, match=f"^segment_reduce: .*{message}"):
        rlkern.segment_reduce(arguments.pop("values"), arguments.pop("cu_seqlens"), **arguments)
