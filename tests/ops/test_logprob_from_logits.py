"""Log-probs, entropy and their kin of logits."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks
from torch import Tensor

import rlkern
from rlkern.ops._logprob import OUTPUTS, Scalars, Stats
from rlkern.ops.logprob_from_logits import reference, samples
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "logprob_from_logits"
NAN, INF = float("nan"), float("inf")


def options(logits: Tensor, **how) -> tuple:
    """Arguments of forward after the logits, for samples.options' keywords."""
    random = torch.Generator().manual_seed(5)
    return samples.options(*logits.shape, random, str(logits.device), **how)


def inplace_of(kernel):
    if kernel.name == "native":
        return torch.ops.rlkern.logprob_from_logits_bwd_inplace
    return importlib.import_module(f"rlkern.ops.{OP}.{kernel.name}").backward_inplace


def twin(x: Tensor) -> Tensor:
    """The same values under the same strides in memory of its own."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def plain(
    logits, targets, ids, mask, rows, temperature, scale, cap, ignore, size, rounding, topk
) -> Stats:
    """Stats in float64, written apart from the reference: a loop over tokens."""
    x = logits[:, :size].double()
    if rounding:
        x = x + (x.detach().bfloat16().double() - x.detach())
    x = x * scale
    if cap:
        x = cap * torch.tanh(x / cap)
    if mask is not None:
        x = torch.where(mask[:size], x, -INF)
    out = []
    for i, z in enumerate(x / (temperature if rows is None else rows[:, None])):
        log_p = z.log_softmax(-1)
        p = z.softmax(-1)

        def pick(token, log_p=log_p):
            if token == ignore:
                return log_p.new_zeros(())
            return log_p[token] if 0 <= token < size else log_p.new_full((), NAN)

        target = int(targets[i])
        best = z.sort(descending=True, stable=True).indices.tolist()[:topk]
        best = [j if z[j] > -INF else -1 for j in best]
        values = [log_p[j] if j >= 0 else log_p.new_full((), -INF) for j in best]
        picks = [] if ids is None else [pick(int(k)) for k in ids[i]]
        row = (
            pick(target),
            z.logsumexp(-1),
            -(p * log_p.clamp(min=-1e30)).sum(),
            (p * p).sum(),
            torch.tensor(0 <= target < size and bool((z <= z[target]).all())),
            torch.stack(picks) if picks else z.new_empty(0),
            torch.stack(values) if values else z.new_empty(0),
            torch.tensor(best, dtype=torch.int64),
        )
        out.append(row)
    return Stats(*(torch.stack(column) for column in zip(*out)))


CASES = {
    "nothing": {},
    "temperature": {"temperature": 0.6, "ids": 2, "topk": 3},
    "scale": {"scale": 0.3, "ids": 3},
    "soft cap": {"scale": 1.4, "cap": 4.0, "temperature": 1.7, "ids": 2, "topk": 4},
    "mask": {"mask": True, "ids": 4, "topk": 20},
    "size": {"size": 290, "topk": 290},
    "rounding": {"rounding": True, "ids": 1, "topk": 5},
    "everything": {
        "row_temperature": torch.linspace(0.5, 1.5, 6),
        "scale": 1.2,
        "cap": 6.0,
        "mask": True,
        "size": 280,
        "rounding": True,
        "ids": 7,
        "topk": 9,
    },
}


def case(name: str, device: str) -> tuple:
    """Arguments of forward; NaN lies where nothing may be read or counted."""
    how = dict(CASES[name])
    logits = torch.randn(6, 301, generator=torch.Generator().manual_seed(2)) * 3
    targets = torch.tensor([0, 17, 279, samples.IGNORE, 40, 133])
    if "mask" in how:
        how["mask"] = (torch.arange(301) % 5 != 2).to(device)
        logits[:, 2::5] = NAN
    logits[:, how.get("size", 301) :] = NAN
    if "row_temperature" in how:
        how["row_temperature"] = how["row_temperature"].to(device)
    rest = list(options(logits.to(device), targets=targets.to(device), **how))
    if rest[1] is not None:
        # an ignored one, the target again, the same token thrice
        ids = rest[1].clone()
        ids[0, 0], ids[1, 0], ids[2] = samples.IGNORE, targets[1], 5
        rest[1] = ids
    return logits.to(device), *rest


@pytest.mark.parametrize("name", CASES)
def test_equals_a_plain_program(device, name):
    args = case(name, device)
    logits = args[0].double().requires_grad_()
    clean = logits if args[3] is None else torch.where(args[3], logits, 0.0)
    want = plain(clean, *args[1:])
    for kernel in checks.kernels(OP, device):
        got = Stats(*kernel.forward(*args))
        for field, value, expected in zip(Stats._fields, got, want, strict=True):
            what = f"{kernel.name} {field}"
            if not value.is_floating_point():
                assert value.tolist() == expected.tolist(), what
                continue
            close = torch.testing.assert_close
            close(value.double(), expected.detach(), rtol=4e-6, atol=4e-6, msg=what)
        inputs = samples.backward_inputs(args, got)
        at = (want.logprob, want.logsumexp, want.entropy, want.id_logprob)
        value = sum((v * u.double()).sum() for v, u in zip(at, inputs) if u is not None)
        (d_want,) = torch.autograd.grad(value, logits, retain_graph=True)
        d_got = kernel.backward(*inputs).double()
        torch.testing.assert_close(d_got, d_want, rtol=1e-5, atol=4e-6, msg=f"{kernel.name} grad")
        size = args[9]
        assert (d_got[:, size:] == 0).all(), kernel.name
        if args[3] is not None:
            assert (d_got[:, ~args[3]] == 0).all(), kernel.name


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradient_is_the_derivative(per_row, cap):
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100, 3])
    ids = torch.tensor([[1, 0, 0], [-100, 6, 2], [5, 4, 3], [3, 3, 3]])
    mask = torch.arange(9) != 4
    ids[2, 1] = 7
    rows = torch.linspace(0.5, 2, 4, dtype=torch.float64) if per_row else None
    inputs = (targets, ids, mask, rows)
    scalars = Scalars(0.7, 1.3, cap, -100, 8, False)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = Stats(*reference.forward(x, *inputs, *scalars, 0))
            ctx.save_for_backward(x, out.logsumexp, out.entropy)
            return out.logprob, out.logsumexp, out.entropy, out.id_logprob

        @staticmethod
        def backward(ctx, *grads):
            x, *saved = ctx.saved_tensors
            return reference.backward(*grads, x, *inputs, *saved, *scalars)

    out = plain(logits, *inputs, *scalars, 0)
    values = (out.logprob, out.logsumexp, out.entropy, out.id_logprob)
    upstream = [torch.randn_like(x) for x in values]
    (want,) = torch.autograd.grad(values, logits, upstream)
    (got,) = torch.autograd.grad(Op.apply(logits), logits, upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(Op.apply, (logits,))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        truth = Stats(*reference.forward(*to_double(args)))
        torchs = reference.forward(*args)
        exact = samples.backward_inputs(to_double(args), truth)
        exact_grad = reference.backward(*to_double(exact))
        torch_grad = reference.backward(*samples.backward_inputs(args, torchs))
        # the saved logsumexp is a float32: half a unit of it is a relative error of every p
        lse = truth.logsumexp.abs().max().item() if len(truth.logsumexp) else 0.0
        for kernel in checks.kernels(OP, device):
            what = f"{kernel.name} {dtype} {name!r}"
            ours = kernel.forward(*args)
            checks.assert_stats_within_budget(what, ours, truth, torchs)
            grad = kernel.backward(*samples.backward_inputs(args, ours))
            what = f"{what} gradient"
            assert_within_budget(what, grad, exact_grad, torch_grad, 16 + lse / 2)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_opcheck_of_the_gradient_in_place(device):
    op = torch.ops.rlkern.logprob_from_logits_bwd_inplace.default
    for name in ("nothing", "everything"):
        args = case(name, device)
        inputs = samples.backward_inputs(args, reference.forward(*args))
        torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


def test_every_instruction_set_is_as_exact():
    checks.check_instruction_set(__file__, "avx2")


def test_a_row_does_not_depend_on_its_batch(device):
    logits = torch.randn(33, 3001).to(device)
    targets, ids, *rest = options(logits, temperature=0.8, ids=3, topk=4)
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        whole = kernel.forward(logits, targets, ids, *rest)
        for rows in (slice(0, 1), slice(5, 9), slice(32, 33)):
            part = kernel.forward(logits[rows], targets[rows], ids[rows], *rest)
            for a, b in zip(part, whole):
                assert_same_bits(f"{kernel.name} {rows}", a, b[rows])


def test_equals_torch_and_differentiates(device):
    logits = (torch.randn(6, 211) * 3).to(device).requires_grad_()
    targets = torch.randint(211, (6,)).to(device)
    ids = torch.randint(211, (6, 4), dtype=torch.int32).to(device)
    out = rlkern.logprob_from_logits(
        logits, targets, temperature=0.6, outputs=OUTPUTS, ids=ids, topk=5
    )
    logp = (logits / 0.6).log_softmax(-1)
    want = (
        logp.gather(-1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (logits / 0.6).logsumexp(-1),
        logp.topk(5).values,
        logp.gather(-1, ids.long()),
    )
    got = (out.logprob, out.entropy, out.logsumexp, out.topk_values, out.id_logprob)
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    (d_want,) = torch.autograd.grad(want, logits, upstream)
    (d_got,) = torch.autograd.grad(got, logits, upstream)
    for value, expected in zip((*got, d_got), (*want, d_want)):
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=4e-6)
    assert out.topk_ids.tolist() == logp.topk(5).indices.tolist()
    assert out.is_top1.tolist() == (logp.argmax(-1) == targets).tolist()
    torch.testing.assert_close(out.sum_sq_prob, logp.exp().square().sum(-1))
    constants = (out.sum_sq_prob, out.is_top1, out.topk_ids)
    assert not any(value.requires_grad for value in constants)


def test_only_what_was_asked_for_is_returned():
    logits, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int32)
    out = rlkern.logprob_from_logits(logits, targets, outputs=("entropy",))
    assert out.entropy.dtype == torch.float32
    assert [name for name, value in out._asdict().items() if value is not None] == ["entropy"]
    out = rlkern.logprob_from_logits(logits, targets, outputs=(), topk=2)
    names = [name for name, value in out._asdict().items() if value is not None]
    assert names == ["topk_values", "topk_ids"]
    out = rlkern.logprob_from_logits(logits, targets, outputs=(), ids=targets[:, None][:, :0])
    assert out.id_logprob.shape == (3, 0)
    assert out.logprob is None


def test_upstream_of_one_output_only():
    logits = torch.randn(3, 8, requires_grad=True)
    targets = torch.tensor([1, -100, 2])
    ids = torch.tensor([[1], [2], [-100]])
    out = rlkern.logprob_from_logits(logits, targets, outputs=OUTPUTS, ids=ids, topk=2)
    assert out.logprob[1] == 0
    assert out.id_logprob[2] == 0
    (grad,) = torch.autograd.grad(out.logprob.sum(), logits, retain_graph=True)
    assert (grad[1] == 0).all()
    (grad,) = torch.autograd.grad(out.id_logprob.sum(), logits, retain_graph=True)
    assert (grad[2] == 0).all()
    for value in out:
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
            assert grad.isfinite().all()
            assert (grad != 0).any()


def test_double_precision_gradcheck_through_the_public_function():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, 0, 2])
    how = {"softcap": 2.5, "logit_scale": 1.2, "vocab_size": 6, "topk": 3}
    how |= {"ids": torch.tensor([[4, 4], [1, -100], [0, 3]]), "vocab_mask": torch.arange(7) != 1}

    def run(x):
        out = rlkern.logprob_from_logits(x, targets, temperature=1.7, outputs=OUTPUTS, **how)
        return out.logprob, out.entropy, out.logsumexp, out.topk_values, out.id_logprob[[0, 2]]

    assert torch.autograd.gradcheck(run, (logits,))


def test_scalars_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    logits = torch.randn(4, 9)
    targets, ids = torch.tensor([3, 7, 7, 1]), torch.tensor([[7, 2], [5, 5], [1, 7], [8, 0]])
    for scalars in (
        Scalars(0.37, 1.0, 0.0, 7, 9, False),
        Scalars(2.25, 0.61, 0.0, 7, 9, True),
        Scalars(1.0, 1.7, 2.9, 7, 8, False),
        Scalars(0.83, 1.1, 0.0, 5, 6, True),
    ):
        for topk in (0, 3, 6):
            args = (logits, targets, ids, None, None, *scalars, topk)
            got = torch.ops.rlkern.logprob_from_logits_fwd(*args)
            want = reference.forward(*args)
            torch.testing.assert_close(got, want, equal_nan=True)
            assert got[6].shape == (4, topk)
        inputs = samples.backward_inputs(args, want)
        wanted = reference.backward(*inputs)
        torch.testing.assert_close(torch.ops.rlkern.logprob_from_logits_bwd(*inputs), wanted)
        over = logits.clone()
        args = (*inputs[:4], over, *inputs[5:])
        torch.ops.rlkern.logprob_from_logits_bwd_inplace(*args)
        torch.testing.assert_close(over, wanted)


def test_out_of_range_tokens_give_nan_and_stay_in_bounds(device):
    logits = torch.randn(5, 8).to(device)
    strange = torch.tensor([-1, 6, 2**40, 5, -100]).to(device)
    ids = torch.stack([strange, torch.full_like(strange, 3)], 1)
    rest = options(logits, targets=strange, size=6)
    rest = (rest[0], ids, *rest[2:])
    for kernel in checks.kernels(OP, device):
        out = Stats(*kernel.forward(logits, *rest))
        nan = [True, True, True, False, False]
        assert out.logprob.isnan().tolist() == nan, kernel.name
        assert out.id_logprob[:, 0].isnan().tolist() == nan, kernel.name
        assert out.id_logprob[:, 1].isfinite().all(), kernel.name
        assert out.logprob[4] == 0, kernel.name
        assert not out.is_top1[[0, 1, 2, 4]].any(), kernel.name
        inputs = samples.backward_inputs((logits, *rest), out)
        grad = kernel.backward(*inputs)
        torch.testing.assert_close(grad, reference.backward(*inputs))
        assert grad.isfinite().all(), kernel.name


def test_nan_logits_are_not_hidden(device):
    logits = torch.randn(3, 2100).to(device)
    # the top one, were it not for the NaN
    logits[1, 1], logits[1, 2050] = 50.0, NAN
    rest = options(logits, targets=torch.tensor([0, 1, 2]).to(device), ids=2, topk=2)
    for kernel in checks.kernels(OP, device):
        for name, value in Stats(*kernel.forward(logits, *rest))._asdict().items():
            if value.is_floating_point():
                nan = value.isnan().view(3, -1).all(1).tolist()
                assert nan == [False, True, False], f"{kernel.name} {name}"
            elif name == "is_top1":
                assert not value[1], kernel.name


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "scale": 1.3, "cap": 40.0}])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_the_largest_is_the_top_one(device, dtype, how):
    """Its logit, read again on its own, has the bits of the row's maximum."""
    logits = (torch.randn(40, 3001) * 3).to(device, dtype)
    first = logits.argmax(-1)
    second = logits.scatter(-1, first[:, None], -INF).argmax(-1)
    for rounding in (False, True):
        for kernel in checks.kernels(OP, device):
            rest = options(logits, targets=first, rounding=rounding, **how)
            assert kernel.forward(logits, *rest)[4].all(), kernel.name
            if rounding or dtype != torch.float32:
                continue
            rest = options(logits, targets=second, **how)
            assert not kernel.forward(logits, *rest)[4].any(), kernel.name


def test_equals_are_all_top_and_ordered_by_id(device):
    logits = torch.randint(-3, 3, (4, 5000)).float().to(device)
    logits[0] = 7.5
    targets = logits.argmax(-1)
    targets[0] = 4999
    rest = options(logits, targets=targets, topk=900)
    want = torch.sort(logits, dim=-1, descending=True, stable=True)
    for kernel in checks.kernels(OP, device):
        out = Stats(*kernel.forward(logits, *rest))
        assert out.is_top1.all(), kernel.name
        values = want.values[:, :900] - out.logsumexp[:, None]
        torch.testing.assert_close(out.topk_values, values)
        if kernel.name == "triton":
            # in any order among equals, but each once
            assert (logits.gather(-1, out.topk_ids) == want.values[:, :900]).all()
            assert all(row.unique().numel() == 900 for row in out.topk_ids)
            continue
        assert (out.topk_ids == want.indices[:, :900]).all(), kernel.name


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_topk_is_the_beginning_of_a_sort(device, order, k):
    logits = torch.randn(3, 4500)
    if order != "random":
        logits = logits.sort(-1, descending=order == "falling").values
    logits = logits.to(device)
    want = torch.sort(logits, dim=-1, descending=True, stable=True)
    for kernel in checks.kernels(OP, device):
        out = Stats(*kernel.forward(logits, *options(logits, topk=k)))
        assert (out.topk_ids == want.indices[:, :k]).all(), kernel.name
        values = logits.log_softmax(-1).gather(-1, out.topk_ids)
        torch.testing.assert_close(out.topk_values, values)


def test_fewer_tokens_than_k(device):
    logits = torch.tensor([[1.0, -INF, 3.0, 9.0, 2.0, NAN]] * 2).to(device)
    mask = torch.tensor([True, True, True, False, True, True]).to(device)
    rest = options(logits, mask=mask, size=5, topk=5)
    for kernel in checks.kernels(OP, device):
        out = Stats(*kernel.forward(logits, *rest))
        assert out.topk_ids.tolist() == [[2, 4, 0, -1, -1]] * 2, kernel.name
        assert (out.topk_values[:, 3:] == -INF).all(), kernel.name
        assert out.topk_values[:, :3].isfinite().all(), kernel.name


def test_a_row_without_any_token(device):
    logits = torch.randn(3, 2500).to(device)
    logits[1] = -INF
    mask = (torch.arange(2500) >= 2100).to(device)
    logits[2, 2100:] = -INF
    rest = options(logits, mask=mask, ids=2, topk=2)
    for kernel in checks.kernels(OP, device):
        out = Stats(*kernel.forward(logits, *rest))
        assert (out.logsumexp == -INF).tolist() == [False, True, True], kernel.name
        for value in (out.logprob, out.entropy, out.sum_sq_prob):
            assert value.isnan().tolist()[1:] == [True, True], kernel.name
        assert (out.topk_ids[1:] == -1).all(), kernel.name
        assert (out.topk_values[1:] == -INF).all(), kernel.name
        assert (out.topk_ids[0] >= 2100).all(), kernel.name
        grad = kernel.backward(*samples.backward_inputs((logits, *rest), out))
        assert (grad[:, ~mask] == 0).all(), kernel.name


def test_rounding_passes_the_gradient_straight_through(device):
    logits = (torch.randn(4, 2100) * 3).to(device).requires_grad_()
    rounded = logits.detach().bfloat16().float().requires_grad_()
    targets = torch.randint(2100, (4,)).to(device)
    how = {"temperature": 0.7, "outputs": OUTPUTS, "topk": 3}
    ours = rlkern.logprob_from_logits(logits, targets, logits_rounding="bf16", **how)
    want = rlkern.logprob_from_logits(rounded, targets, **how)
    exact = rlkern.logprob_from_logits(logits, targets, **how)
    assert not torch.equal(ours.logprob, exact.logprob)
    for a, b in zip(ours, want):
        if a is not None:
            assert_same_bits("rounded", a.detach(), b.detach())
    for out in (ours, want):
        (out.logprob.sum() + out.topk_values.sum()).backward()
    assert_same_bits("gradient", logits.grad, rounded.grad)


def test_more_rows_than_a_grid_dimension():
    logits = torch.randn(70_000, 3)
    targets = torch.randint(3, (70_000,))
    out = rlkern.logprob_from_logits(logits, targets)
    want = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logprob, want)


@pytest.mark.parametrize("inplace", [False, True])
def test_padded_vocabulary_is_not_read(device, inplace):
    logits = torch.randn(4, 30).to(device)
    padded = torch.cat([logits, torch.full((4, 3), NAN).to(device)], 1).requires_grad_()
    targets, ids = torch.randint(30, (4,)).to(device), torch.randint(30, (4, 2)).to(device)
    how = {"outputs": OUTPUTS, "ids": ids, "topk": 30, "inplace_backward": inplace}
    logits.requires_grad_()
    out = rlkern.logprob_from_logits(padded.clone(), targets, vocab_size=30, **how)
    exact = rlkern.logprob_from_logits(logits.clone(), targets, **how)
    for a, b in zip(out, exact):
        assert_same_bits("padded", a.detach(), b.detach())
    for value in (out, exact):
        (value.entropy + value.logprob + value.id_logprob.sum(1)).sum().backward()
    assert (padded.grad[:, 30:] == 0).all()
    torch.testing.assert_close(padded.grad[:, :30], logits.grad, rtol=0, atol=0)


def test_a_masked_vocabulary_is_logits_of_minus_infinity(device):
    logits = torch.randn(4, 2100).to(device)
    mask = (torch.rand(2100) < 0.7).to(device)
    targets = torch.nonzero(mask)[:4, 0]
    masked = torch.where(mask, logits, -INF).requires_grad_()
    logits = torch.where(mask, logits, NAN).requires_grad_()
    how = {"outputs": OUTPUTS, "topk": 50, "temperature": 0.8}
    out = rlkern.logprob_from_logits(logits, targets, vocab_mask=mask, **how)
    want = rlkern.logprob_from_logits(masked, targets, **how)
    for name, a, b in zip(out._fields, out, want):
        if a is not None:
            assert_same_bits(name, a.detach(), b.detach())
    for value in (out, want):
        (value.entropy + value.logprob + value.topk_values.sum(1)).sum().backward()
    assert_same_bits("gradient", logits.grad + 0.0, masked.grad + 0.0)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_in_place_gives_the_same_bits(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        for kernel in checks.kernels(OP, device):
            inputs = samples.backward_inputs(args, kernel.forward(*args))
            want = kernel.backward(*inputs)
            over = twin(inputs[4])
            assert inplace_of(kernel)(*inputs[:4], over, *inputs[5:]) is None
            assert_same_bits(f"{kernel.name} {name!r}", over, want)


def test_in_place_leaves_the_gap_between_rows_alone(device):
    whole = torch.randn(7, 90).to(device)
    before = whole.clone()
    args = (whole[::2, :61], *options(whole[::2, :61], size=60, ids=2, cap=4.0))
    for kernel in checks.kernels(OP, device):
        whole.copy_(before)
        inputs = samples.backward_inputs(args, kernel.forward(*args))
        want = kernel.backward(*inputs)
        inplace_of(kernel)(*inputs)
        assert_same_bits(kernel.name, whole[::2, :61], want)
        assert_same_bits(kernel.name, whole[1::2], before[1::2])
        assert_same_bits(kernel.name, whole[::2, 61:], before[::2, 61:])


@pytest.mark.parametrize("dtype", [*checks.DTYPES, torch.float64])
@pytest.mark.parametrize("layout", ["dense", "rows with a gap", "columns with a gap"])
def test_inplace_backward_writes_over_the_logits(device, dtype, layout):
    whole = torch.randn(5, 2 * 40).to(device, dtype).requires_grad_()
    targets, ids = torch.randint(33, (5,)).to(device), torch.randint(33, (5, 3)).to(device)
    how = {"ids": ids, "topk": 2, "outputs": ("logprob", "entropy"), "vocab_size": 33}
    grads = []
    for inplace in (False, True):
        x = whole * 1
        if layout != "dense":
            x = x[:, :40] if layout == "rows with a gap" else x[:, ::2]
        out = rlkern.logprob_from_logits(x, targets, inplace_backward=inplace, **how)
        value = sum(v.sum() for v in (out.logprob, out.entropy, out.topk_values, out.id_logprob))
        (grad,) = torch.autograd.grad(value, x, retain_graph=True)
        grads.append(grad)
        # columns with a gap are copied first, and the copy is lost
        over = inplace and layout != "columns with a gap"
        assert (grad.data_ptr() == x.data_ptr()) == over
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(value, whole)
    assert_same_bits("gradient", grads[1], grads[0])


def test_inplace_backward_allocates_no_gradient():
    targets = torch.zeros(64, dtype=torch.int64)
    largest = {}
    for inplace in (False, True):
        x = torch.randn(64, 4096, requires_grad=True) * 1
        out = rlkern.logprob_from_logits(x, targets, inplace_backward=inplace)
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(out.logprob.sum(), x)
        largest[inplace] = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest[False] >= 64 * 4096 * 4
    assert largest[True] < 64 * 1024


def test_compiles_with_one_option():
    """Compiled, autograd passes zeros for the outputs that nobody used."""

    def loss(logits, targets, **how):
        out = rlkern.logprob_from_logits(logits, targets, **how)
        return out.logprob.sum() + (0.0 if out.topk_values is None else out.topk_values.sum())

    logits = torch.randn(5, 12, requires_grad=True)
    targets = torch.randint(12, (5,))
    for how in ({}, {"topk": 2}, {"ids": targets[:, None]}):
        want = torch.autograd.grad(loss(logits, targets, **how), logits)[0]
        got = torch.autograd.grad(checks.compiled(loss)(logits, targets, **how), logits)[0]
        assert_same_bits(f"{how}", got, want)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace):
    ids, mask = torch.randint(12, (5, 2)), torch.arange(12) != 3

    def loss(leaf, targets):
        out = rlkern.logprob_from_logits(
            leaf * 1.5,
            targets,
            temperature=0.9,
            softcap=7.0,
            outputs=OUTPUTS,
            ids=ids,
            topk=3,
            vocab_mask=mask,
            vocab_size=11,
            logits_rounding="bf16",
            inplace_backward=inplace,
        )
        values = out.logprob - 0.1 * out.entropy * out.sum_sq_prob + out.topk_values[:, 1]
        return (values + out.id_logprob.sum(1) + out.is_top1).sum()

    leaf = torch.randn(5, 12, requires_grad=True)
    targets = torch.tensor([0, 2, -100, 4, 10])
    ids[ids > 10] = 1
    ids[ids == 3] = 1
    want = torch.autograd.grad(loss(leaf, targets), leaf)[0]
    got = torch.autograd.grad(checks.compiled(loss)(leaf, targets), leaf)[0]
    assert_same_bits("gradient", got, want)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 5000),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.floats(0.05, 20.0),
    cap=st.sampled_from([0.0, 0.0, 25.0]),
    dtype=st.sampled_from(checks.DTYPES),
    gap=st.booleans(),
    rounding=st.booleans(),
    masked=st.booleans(),
    padding=st.integers(0, 40),
    ids=st.integers(0, 5),
    topk=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    rows, vocab, spread, temperature, cap, dtype, gap, rounding, masked, padding, ids, topk, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab + 3, generator=generator) * spread).to(dtype)
    logits = logits[:, :vocab] if gap else logits[:, :vocab].contiguous()
    size = max(1, vocab - padding)
    mask = torch.rand(vocab, generator=generator) < 0.8 if masked else None
    if masked:
        mask[0] = True
    rest = samples.options(
        rows,
        vocab,
        generator,
        "cpu",
        temperature=temperature,
        cap=cap,
        ids=ids,
        mask=mask,
        size=size,
        rounding=rounding,
        topk=min(topk, size),
    )
    args = (logits, *rest)
    got = torch.ops.rlkern.logprob_from_logits_fwd(*args)
    truth = reference.forward(*to_double(args))
    torchs = reference.forward(*args)
    for name, value, want, peer in zip(Stats._fields, got, truth, torchs):
        # two logits may be equal in float32 and not in float64
        if value.is_floating_point():
            assert_within_budget(name, value, want, peer)


LOGITS, TARGETS = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
FLAGS = torch.ones(8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "expected logits to be a Tensor, got list"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "expected logits of dtype"),
        ({"logits": torch.zeros(8)}, ValueError, r"logits of shape \(T, V\), got \(8,\)"),
        ({"targets": torch.zeros(4, 1)}, TypeError, "expected targets of dtype int64 or int32"),
        (
            {"targets": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"expected targets of shape \(T,\) = \(4,\), got \(3,\)",
        ),
        ({"temperature": 0.0}, ValueError, "temperature to be positive and finite, got 0.0"),
        ({"temperature": "1"}, TypeError, "expected temperature to be a number, got str"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature of shape \(T,\) = \(4,\)"),
        ({"outputs": ("logp",)}, ValueError, "outputs to be one of entropy, .*, got 'logp'"),
        ({"outputs": "logprob"}, ValueError, "outputs to be a non-empty tuple"),
        ({"outputs": ()}, ValueError, r"outputs to be a non-empty tuple of .*, got \(\)"),
        ({"targets": TARGETS.to("meta")}, ValueError, "targets on cpu like logits, got meta"),
        ({"vocab_size": 0}, ValueError, r"vocab_size in \[1, V\] = \[1, 8\], got 0"),
        ({"vocab_size": 9}, ValueError, r"vocab_size in \[1, V\] = \[1, 8\], got 9"),
        ({"vocab_size": 8.0}, TypeError, "expected vocab_size to be an int, got float"),
        ({"topk": -1}, ValueError, r"topk in \[0, vocab_size\] = \[0, 8\], got -1"),
        ({"topk": 6, "vocab_size": 5}, ValueError, r"topk in .* = \[0, 5\], got 6"),
        ({"topk": True}, TypeError, "expected topk to be an int, got bool"),
        ({"ids": [1]}, TypeError, "expected ids to be a Tensor, got list"),
        ({"ids": LOGITS}, TypeError, "expected ids of dtype int64 or int32"),
        ({"ids": TARGETS}, ValueError, r"expected ids of shape \(T, K\), got \(4,\)"),
        ({"ids": TARGETS.view(2, 2)}, ValueError, r"ids of shape \(T, K\) = \(4, 2\), got \(2, 2"),
        ({"ids": TARGETS[:, None].to("meta")}, ValueError, "ids on cpu like logits, got meta"),
        ({"vocab_mask": LOGITS[0]}, TypeError, "expected vocab_mask of dtype bool"),
        (
            {"vocab_mask": FLAGS[:5], "vocab_size": 5},
            ValueError,
            r"vocab_mask of shape \(V,\) = \(8,\), got \(5,\)",
        ),
        ({"vocab_mask": FLAGS.to("meta")}, ValueError, "vocab_mask on cpu like logits, got meta"),
        ({"logits_rounding": "fp8"}, ValueError, 'logits_rounding to be None or "bf16", got \'fp8'),
        ({"softcap": -1.0}, ValueError, "softcap to be positive and finite, got -1.0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale to be positive and finite, got 0.0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS} | change
    with pytest.raises(error, match=f"logprob_from_logits: .*{message}"):
        rlkern.logprob_from_logits(arguments.pop("logits"), arguments.pop("targets"), **arguments)
