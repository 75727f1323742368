"""The clipped value loss of a critic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.value_loss import reference, samples
from rlkern.testing.numerics import assert_same_bits, to_double

OP = "value_loss"
NAN, INF = float("nan"), float("inf")
MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def eager(values, returns, old_values, mask, cliprange, mode, count_empty=False):
    """PPO's formula by autograd, padded; verl's agg_loss."""
    inside = torch.maximum(torch.minimum(values, old_values + cliprange), old_values - cliprange)
    token = 0.5 * torch.maximum((values - returns) ** 2, (inside - returns) ** 2)
    token = torch.where(mask, token, 0.0)
    lengths = mask.sum(1)
    if mode == "token-sum":
        return token.sum()
    if mode == "token-mean":
        return token.sum() / lengths.sum().clamp(min=1)
    rows = token.sum(1)
    if mode == "seq-mean-token-mean":
        rows = rows / lengths.clamp(min=1)
    sequences = len(mask) if count_empty else (lengths > 0).sum().clamp(min=1)
    return rows.sum() / sequences


def padded(rows=6, columns=19, dtype=torch.float64):
    old = torch.randn(rows, columns, dtype=dtype)
    values = old + torch.randn(rows, columns, dtype=dtype)
    mask = torch.rand(rows, columns) < 0.7
    mask[2] = False
    return values, torch.randn(rows, columns, dtype=dtype), old, mask


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    checks.check_budget(OP, device, dtype)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_same_bits_twice_and_on_any_number_of_threads(device):
    checks.check_deterministic(OP, device, torch.float32)


def test_reference_gradient_is_the_derivative():
    for name, args in samples.sample_inputs("cpu", torch.float32):
        if not args[-1]:
            continue
        values, *rest = to_double(args)
        values.requires_grad_()
        loss, _, grad = reference.forward(values, *rest)
        if values.numel():
            (want,) = torch.autograd.grad(loss, values)
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-15, msg=name)


def test_gradcheck_through_the_public_function():
    values, returns, old, mask = padded(3, 5)
    values.requires_grad_()
    for cliprange in (None, 0.4):

        def run(v, cliprange=cliprange):
            return rlkern.value_loss(v, returns, old, mask=mask, cliprange=cliprange).loss

        assert torch.autograd.gradcheck(run, (values,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cliprange", [0.05, 0.3, None])
def test_equals_the_formula(device, mode, cliprange):
    values, returns, old, mask = padded(dtype=torch.float32)
    upstream = torch.tensor(-1.75)
    width = INF if cliprange is None else cliprange
    leaf = values.double().requires_grad_()
    want = eager(leaf, returns.double(), old.double(), mask, width, mode)
    (want_grad,) = torch.autograd.grad(want, leaf, upstream.double())
    # masked slots may hold anything
    values, returns, old = (torch.where(mask, x, NAN) for x in (values, returns, old))
    leaf = values.to(device).requires_grad_()
    got = rlkern.value_loss(
        leaf,
        returns.to(device),
        old.to(device),
        mask=mask.to(device),
        cliprange=cliprange,
        loss_agg_mode=mode,
    )
    (grad,) = torch.autograd.grad(got.loss, leaf, upstream.to(device))
    torch.testing.assert_close(got.loss.cpu().double(), want.detach(), rtol=2e-7, atol=0)
    torch.testing.assert_close(grad.cpu().double(), want_grad, rtol=4e-7, atol=1e-9)
    assert (grad.cpu()[~mask] == 0).all()
    v, r, o = (x[mask].double() for x in (values, returns, old))
    clipped = (v.clamp(o - width, o + width) - r) ** 2 > (v - r) ** 2
    assert (cliprange is None) == (not clipped.any())
    metrics = {name: value.item() for name, value in got.metrics.items()}
    assert metrics["num_tokens"] == mask.sum()
    assert metrics["vf_clipfrac"] == pytest.approx(clipped.double().mean().item(), rel=1e-6)
    assert metrics["vpred_mean"] == pytest.approx(v.mean().item(), rel=1e-5)


def test_a_worked_example():
    # in range; too far and past the return; too far and short of it
    values = torch.tensor([0.25, 1.0, 1.0], requires_grad=True)
    old, returns = torch.zeros(3), torch.tensor([1.0, 0.0, 2.0])
    out = rlkern.value_loss(values, returns, old, cliprange=0.5, loss_agg_mode="token-sum")
    # 1/2 (0.75^2 + max(1, 0.25) + max(1, 2.25))
    assert out.loss.item() == 0.5 * (0.5625 + 1.0 + 2.25)
    (grad,) = torch.autograd.grad(out.loss, values)
    # the second is pulled back, the third is not let further
    assert grad.tolist() == [-0.75, 1.0, 0.0]
    assert out.metrics["vf_clipfrac"].item() == pytest.approx(1 / 3)


def test_scalars_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    values, returns, old = torch.tensor([[1.0, 3, 2, 5], [0, 1, 4, 0], [0, 0, 3, 1]])
    bounds = torch.tensor([0, 1, 4, 4])

    def run(cliprange, denominator, divide_by_length, scale, want_grad):
        return torch.ops.rlkern.value_loss_fwd(
            values,
            returns,
            old,
            bounds,
            None,
            cliprange,
            denominator,
            divide_by_length,
            scale,
            want_grad,
        )

    # errors: 1, 2, -2, 5; wide enough 1, 4, 4, 25; at most 2 away: 1, 4, 4, max(25, 9)
    assert run(INF, 0, False, 1.0, False)[0].item() == 17.0
    assert run(INF, 0, False, 0.375, False)[0].item() == 6.375
    assert run(INF, 1, False, 1.0, False)[0].item() == 4.25
    assert run(INF, 2, False, 1.0, False)[0].item() == 8.5
    assert run(INF, 3, False, 1.0, False)[0].item() == pytest.approx(17 / 3)
    assert run(INF, 2, True, 1.0, False)[0].item() == 0.25 * (1 + 11)
    # within 1/2: 1/2, 1/2, 5/2, 3/2 have errors 1/2, -1/2, -3/2, 3/2; larger is the plain one
    loss, metrics, grad = run(0.5, 0, False, 2.0, True)
    assert loss.item() == 34.0
    assert metrics.tolist() == [4.0, 0.0, 2.75]
    assert grad.tolist() == [2.0, 4.0, -4.0, 10.0]
    assert run(0.5, 0, False, 1.0, False)[2].shape == (0,)
    with pytest.raises(RuntimeError, match=r"denominator must be in \[0, 4\), got 4"):
        run(0.5, 4, False, 1.0, False)


def test_packed_and_padded_are_the_same():
    values, returns, old, mask = padded(dtype=torch.float32)
    bounds = offsets(*mask.sum(1).tolist())
    for mode in MODES:
        got = rlkern.value_loss(values, returns, old, mask=mask, loss_agg_mode=mode).loss
        packed = (x[mask] for x in (values, returns, old))
        want = rlkern.value_loss(*packed, cu_seqlens=bounds, loss_agg_mode=mode).loss
        torch.testing.assert_close(got, want, rtol=2e-7, atol=0)
    flat = rlkern.value_loss(values[mask], returns[mask], old[mask])
    whole = rlkern.value_loss(values, returns, old, mask=mask)
    torch.testing.assert_close(flat.loss, whole.loss, rtol=2e-7, atol=0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_micro_batches_add_up(mode):
    values, returns, old, mask = padded(dtype=torch.float32)
    mask[2] = True
    count = int(mask.sum()) if mode == "token-mean" else 6
    whole = rlkern.value_loss(values, returns, old, mask=mask, loss_agg_mode=mode).loss
    for normalizer in (count, torch.tensor(float(count))):
        parts = [
            rlkern.value_loss(
                *(x[rows] for x in (values, returns, old)),
                mask=mask[rows],
                loss_agg_mode=mode,
                normalizer=normalizer,
            ).loss
            for rows in (slice(0, 2), slice(2, 6))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=2e-7, atol=0)


def test_options_of_the_mean():
    values, returns, old, mask = padded(dtype=torch.float32)
    arguments = {"mask": mask, "cliprange": 0.3}

    def loss(**options):
        return rlkern.value_loss(values, returns, old, **arguments, **options).loss

    mode = {"loss_agg_mode": "seq-mean-token-sum"}
    # one of six rows is empty
    torch.testing.assert_close(loss(**mode, count_empty=True) * 6, loss(**mode) * 5)
    normed = loss(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=32)
    torch.testing.assert_close(normed * 32, loss(**mode))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_tokens(shape):
    values = torch.empty(shape, requires_grad=True)
    out = rlkern.value_loss(values, values.detach(), values.detach())
    assert out.loss.item() == 0
    assert all(value.item() == 0 for value in out.metrics.values())
    assert torch.autograd.grad(out.loss, values)[0].shape == shape


def test_nan_is_seen_and_stays_at_its_token(device):
    for name in range(3):
        tensors = [torch.randn(30, device=device) for _ in range(3)]
        tensors[name][7] = NAN
        bounds = offsets(10, 20).to(device)
        for kernel in checks.kernels(OP, device):
            loss, _, grad = kernel.forward(*tensors, bounds, None, 0.2, 1, False, 1.0, True)
            assert loss.isnan(), f"{kernel.name} {name}"
            assert grad[8:].isfinite().all(), f"{kernel.name} {name}"
            assert name == 2 or grad[7].isnan(), f"{kernel.name} {name}"


def test_bounds_that_do_not_fit_stay_in_bounds(device):
    values, zeros = torch.ones(10, device=device), torch.zeros(10, device=device)
    for bounds in ([3, 5], [-4, 2], [8, 99]):
        at = torch.tensor(bounds, device=device)
        inside = torch.zeros(10)
        inside[max(bounds[0], 0) : bounds[1]] = 1
        for kernel in checks.kernels(OP, device):
            loss, _, grad = kernel.forward(values, zeros, None, at, None, INF, 0, False, 1.0, True)
            assert grad.tolist() == inside.tolist(), f"{kernel.name} {bounds}"
            assert loss.item() == 0.5 * inside.sum().item()


@pytest.mark.parametrize("dtype", [*checks.DTYPES, torch.float64])
def test_dtypes_and_strides(dtype):
    values = torch.randn(12, 3).to(dtype)[:, 1].requires_grad_()
    returns, old = torch.randn(12), torch.randn(12).bfloat16()
    out = rlkern.value_loss(values, returns, old)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (grad,) = torch.autograd.grad(out.loss, values)
    assert grad.dtype == dtype
    want = rlkern.value_loss(values.detach().float(), returns, old.float())
    torch.testing.assert_close(out.loss.float(), want.loss)


def test_compiles_whole():
    def run(values, returns, old, mask):
        return rlkern.value_loss(values, returns, old, mask=mask).loss

    values, returns, old, mask = padded(dtype=torch.float32)
    values.requires_grad_()
    got, want = checks.compiled(run)(values, returns, old, mask), run(values, returns, old, mask)
    assert_same_bits("loss", got, want)
    grads = [torch.autograd.grad(loss, values)[0] for loss in (got, want)]
    assert_same_bits("gradient", *grads)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    mode=st.sampled_from(MODES),
    cliprange=st.sampled_from([None, 1e-3, 0.5, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, mode, cliprange, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(sum(lengths), generator=generator) for _ in range(3)]
    values = tensors[0].requires_grad_()
    options = {"cu_seqlens": offsets(*lengths), "cliprange": cliprange, "loss_agg_mode": mode}
    got = rlkern.value_loss(*tensors, **options)
    wide = tensors[0].detach().double().requires_grad_()
    want = rlkern.value_loss(wide, *(x.double() for x in tensors[1:]), **options)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-6, atol=1e-9)
    (grad,) = torch.autograd.grad(got.loss, values)
    (want_grad,) = torch.autograd.grad(want.loss, wide)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-7)


ONES = torch.ones(6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values to be a Tensor, got list"),
        (
            {"values": torch.ones(1, 2, 3)},
            ValueError,
            r"values of shape \(T,\) or \(B, L\), got \(1, 2, 3\)",
        ),
        ({"returns": ONES[:5]}, ValueError, r"returns of shape \(T,\) = \(6,\), got \(5,\)"),
        ({"returns": None}, TypeError, "returns to be a Tensor, got NoneType"),
        (
            {"old_values": None},
            ValueError,
            r"old_values of shape \(6,\) with a cliprange, got None",
        ),
        ({"old_values": ONES.int()}, TypeError, "old_values of dtype float32"),
        ({"cliprange": 0.0}, ValueError, "cliprange to be positive and finite, got 0.0"),
        ({"cliprange": "0.2"}, TypeError, "cliprange to be a number, got str"),
        ({"loss_agg_mode": "mean"}, ValueError, "loss_agg_mode to be one of .*, got 'mean'"),
        (
            {"loss_agg_mode": "seq-mean-token-sum"},
            ValueError,
            r"cu_seqlens of shape \(S \+ 1,\) with packed values, got None",
        ),
        (
            {"loss_agg_mode": "seq-mean-token-sum-norm"},
            TypeError,
            "loss_scale_factor to be a number, got NoneType",
        ),
        ({"loss_scale_factor": 3.0}, ValueError, "loss_scale_factor to be None with loss_agg_mode"),
        ({"count_empty": True}, ValueError, "count_empty to be False with loss_agg_mode"),
        ({"count_empty": 1}, TypeError, "count_empty to be a bool, got 1"),
        ({"mask": ONES.bool()}, ValueError, "mask to be None with packed values"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens to rise from 0 to T = 6"),
        ({"normalizer": 0}, ValueError, "normalizer to be positive and finite, got 0"),
        (
            {"normalizer": 2, "loss_agg_mode": "token-sum"},
            ValueError,
            "normalizer to be None with loss_agg_mode='token-sum'",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"values": ONES, "returns": ONES, "old_values": ONES} | change
    positional = [arguments.pop(name) for name in ("values", "returns", "old_values")]
    with pytest.raises(error, match=f"^value_loss: .*{message}"):
        rlkern.value_loss(*positional, **arguments)
