"""Generalised advantage estimation."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.gae import reference
from rlkern.testing.numerics import assert_same_bits

OP = "gae"
NAN, INF = float("nan"), float("inf")


def oracle(rewards, values, lengths, mask, gamma, lam):
    """The definition as a sum: A_t = sum over later tokens k of (gamma lam)^k delta_{t+k}."""
    advantages, returns = np.zeros(len(rewards)), np.zeros(len(rewards))
    start = 0
    for length in lengths:
        at = [i for i in range(start, start + length) if mask[i]]
        r, v = [float(rewards[i]) for i in at], [*(float(values[i]) for i in at), 0.0]
        deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(len(at))]
        for k, i in enumerate(at):
            advantages[i] = sum((gamma * lam) ** j * d for j, d in enumerate(deltas[k:]))
            returns[i] = advantages[i] + v[k]
        start += length
    return advantages, returns


def whitened(advantages, mask):
    kept = advantages[mask]
    spread = kept.std(ddof=1) if len(kept) > 1 else 0.0
    return np.where(mask, (advantages - kept.mean()) / np.sqrt(spread**2 + 1e-8), 0.0)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    checks.check_budget(OP, device, dtype)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_same_bits_twice_and_on_any_number_of_threads(device):
    checks.check_deterministic(OP, device, torch.float32)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (0.99, 0.0), (0.0, 0.5)])
def test_equals_the_definition(device, gamma, lam, whiten):
    """To the last bit of float32 but one of the largest, in every kernel."""
    lengths = (31, 0, 1, 600, 55)
    tokens = sum(lengths)
    for kept in (1.0, 0.6):
        mask = torch.rand(tokens) < kept
        rewards = torch.where(mask, torch.randn(tokens), NAN)
        values = torch.where(mask, torch.randn(tokens), INF)
        want, want_returns = oracle(rewards, values, lengths, mask, gamma, lam)
        if whiten:
            want = whitened(want, mask.numpy())
        args = (rewards, values, offsets(*lengths), mask)
        for kernel in checks.kernels(OP, device):
            got = kernel.forward(*(a.to(device) for a in args), gamma, lam, whiten)
            for mine, theirs in zip(got, (want, want_returns)):
                error = np.abs(mine.cpu().double().numpy() - theirs).max()
                limit = 4e-6 if kernel.name == "reference" else 1.2e-7
                assert error <= limit * max(1.0, np.abs(theirs).max()), kernel.name
                assert (mine.cpu()[~mask] == 0).all(), kernel.name


def test_a_discount_near_one_over_many_tokens(device):
    """In float32 0.999 is off by 1e-8, and its thousandth power by 1e-5."""
    tokens, gamma = 5000, 0.999
    rewards = torch.zeros(tokens, device=device)
    rewards[-1] = 1.0
    bounds = offsets(tokens).to(device)
    want = gamma ** np.arange(tokens - 1, -1, -1.0)
    for kernel in checks.kernels(OP, device):
        if kernel.name != "reference":
            got, _ = kernel.forward(
                rewards, torch.zeros_like(rewards), bounds, None, gamma, 1.0, False
            )
            error = np.abs(got.cpu().double().numpy() / want - 1)
            assert error.max() < 1e-7, kernel.name


def test_scalars_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 8.0])
    bounds = torch.tensor([0, 2, 3])
    run = torch.ops.rlkern.gae
    advantages, returns = run(rewards, values, bounds, None, 0.5, 0.25, False)
    # delta_1 = 2 - 1/4, delta_0 = 1 + 1/8 - 1/2
    assert advantages.tolist() == [0.625 + 0.125 * 1.75, 1.75, -4.0]
    assert returns.tolist() == [0.84375 + 0.5, 2.0, 4.0]
    assert run(rewards, values, bounds, None, 0.25, 0.5, False)[0][0] == 0.5625 + 0.125 * 1.75
    assert run(rewards, values, bounds, None, 0.5, 0.0, False)[0][0] == 0.625
    white, same = run(rewards, values, bounds, None, 0.5, 0.25, True)
    want = whitened(advantages.double().numpy(), np.ones(3, dtype=bool))
    torch.testing.assert_close(white.double(), torch.from_numpy(want), rtol=1e-6, atol=0)
    assert_same_bits("returns", same, returns)
    mask = torch.tensor([True, False, True])
    assert run(rewards, values, bounds, mask, 0.5, 0.25, False)[0].tolist() == [0.5, 0.0, -4.0]
    with pytest.raises(RuntimeError, match="cu_seqlens must have dtype int32 or int64"):
        run(rewards, values, bounds.float(), None, 0.5, 0.25, False)
    with pytest.raises(RuntimeError, match="values must have the dtype of rewards"):
        run(rewards, values.double(), bounds, None, 0.5, 0.25, False)


def test_packed_and_padded_are_the_same():
    lengths, columns = (4, 0, 7, 2), 9
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(4, columns), torch.randn(4, columns)
    options = {"gamma": 0.9, "lam": 0.8}
    for whiten in (False, True):
        padded = rlkern.gae(rewards, values, mask=mask, whiten=whiten, **options)
        packed = rlkern.gae(
            rewards[mask], values[mask], cu_seqlens=offsets(*lengths), whiten=whiten, **options
        )
        for a, b in zip(padded, packed):
            assert_same_bits("packed", a[mask], b)
            assert (a[~mask] == 0).all()


def test_what_is_known_of_gae():
    rewards, values = torch.randn(30), torch.randn(30)
    bounds = offsets(12, 18)
    # lam = 1: the discounted return less the value; gamma = 1: all rewards to come
    out = rlkern.gae(rewards, values, cu_seqlens=bounds)
    to_come = torch.cat([x.flip(0).cumsum(0).flip(0) for x in rewards.split([12, 18])])
    torch.testing.assert_close(out.returns, to_come)
    torch.testing.assert_close(out.advantages, to_come - values)
    # lam = 0: the one-step error
    out = rlkern.gae(rewards, values, cu_seqlens=bounds, gamma=0.5, lam=0.0)
    after = torch.cat([values[1:], torch.zeros(1)])
    after[[11, 29]] = 0
    torch.testing.assert_close(out.advantages, rewards + 0.5 * after - values)
    # observations between are stepped over
    holes = torch.rand(30) < 0.5
    masked = rlkern.gae(rewards, values, cu_seqlens=bounds, mask=holes, gamma=0.9, lam=0.8)
    sizes = [int(x.sum()) for x in holes.split([12, 18])]
    dense = rlkern.gae(
        rewards[holes], values[holes], cu_seqlens=offsets(*sizes), gamma=0.9, lam=0.8
    )
    assert_same_bits("holes", masked.advantages[holes], dense.advantages)


def test_whitened_advantages_have_mean_0_and_deviation_1(device):
    rewards, values = torch.randn(9000) + 100, torch.randn(9000)
    bounds = offsets(2000, 1, 6999).to(device)
    for kernel in checks.kernels(OP, device):
        if kernel.name != "reference":
            args = (rewards.to(device), values.to(device), bounds, None, 0.5, 0.5, True)
            got = kernel.forward(*args)[0].cpu().double()
            assert got.mean().abs() < 1e-7, kernel.name
            assert abs(got.std().item() - 1) < 1e-6, kernel.name


def test_nothing_to_whiten_is_0(device):
    """One token, equal advantages, and none."""
    one = torch.ones(6, device=device)
    for kernel in checks.kernels(OP, device):
        bounds = offsets(2, 4).to(device)
        got, _ = kernel.forward(one, one * 0, bounds, None, 0.0, 1.0, True)
        assert (got == 0).all(), kernel.name
        only = torch.arange(6, device=device) == 3
        got, returns = kernel.forward(one, one * 0, bounds, only, 1.0, 1.0, True)
        assert (got == 0).all(), kernel.name
        assert returns.tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_no_number_reaches_the_tokens_before_it(device, value):
    rewards, values = torch.randn(40), torch.randn(40)
    rewards[12] = value
    bounds = offsets(8, 20, 12)
    broken = (torch.arange(40) >= 8) & (torch.arange(40) <= 12)
    for kernel in checks.kernels(OP, device):
        args = (rewards.to(device), values.to(device), bounds.to(device), None, 0.9, 0.9)
        got, _ = kernel.forward(*args, False)
        assert got.cpu().isfinite().tolist() == (~broken).tolist(), kernel.name
        assert not kernel.forward(*args, True)[0].isfinite().any(), kernel.name


def test_bounds_that_do_not_fit_stay_in_bounds(device):
    rewards = torch.ones(10, device=device)
    for bounds in ([3, 5], [-4, 2], [8, 99], [7, 3, 10]):
        at = torch.tensor(bounds, device=device)
        for kernel in checks.kernels(OP, device):
            got, _ = kernel.forward(rewards, rewards * 0, at, None, 0.0, 1.0, False)
            inside = torch.zeros(10)
            for begin, end in pairwise(bounds):
                inside[max(begin, 0) : max(end, 0)] = 1
            assert got.tolist() == inside.tolist(), f"{kernel.name} {bounds}"


@pytest.mark.parametrize("dtype", [*checks.DTYPES, torch.float64])
def test_results_are_float32_and_strides_do_not_matter(dtype):
    rewards, values = torch.randn(20, 3).to(dtype)[:, 1], torch.randn(20).bfloat16()
    got = rlkern.gae(rewards, values, cu_seqlens=offsets(5, 15), gamma=0.9)
    want = rlkern.gae(rewards.float(), values.float(), cu_seqlens=offsets(5, 15).int(), gamma=0.9)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-7, atol=2e-7)


def test_no_gradient_goes_through():
    rewards, values = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    out = rlkern.gae(rewards, values, cu_seqlens=offsets(4))
    assert not out.advantages.requires_grad
    assert not out.returns.requires_grad


def test_compiles_whole():
    def run(rewards, values, mask):
        return rlkern.gae(rewards, values, mask=mask, gamma=0.9, lam=0.8, whiten=True)

    rewards, values, mask = torch.randn(3, 8), torch.randn(3, 8), torch.rand(3, 8) < 0.7
    for a, b in zip(checks.compiled(run)(rewards, values, mask), run(rewards, values, mask)):
        assert_same_bits("compiled", a, b)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    kept=st.sampled_from([None, 0.0, 0.4, 1.0]),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    whiten=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, kept, gamma, lam, whiten, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    rewards = torch.randn(tokens, generator=generator)
    values = torch.randn(tokens, generator=generator)
    mask = None if kept is None else torch.rand(tokens, generator=generator) < kept
    bounds = offsets(*lengths)
    got = rlkern.gae(
        rewards, values, cu_seqlens=bounds, mask=mask, gamma=gamma, lam=lam, whiten=whiten
    )
    want = reference.forward(rewards.double(), values.double(), bounds, mask, gamma, lam, whiten)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-6)


ONES = torch.ones(6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": [1.0]}, TypeError, "rewards to be a Tensor, got list"),
        ({"rewards": ONES.int()}, TypeError, "rewards of dtype float32"),
        (
            {"rewards": torch.ones(1, 2, 3)},
            ValueError,
            r"rewards of shape \(T,\) or \(B, L\), got \(1, 2, 3\)",
        ),
        ({"values": ONES[:5]}, ValueError, r"values of shape \(T,\) = \(6,\), got \(5,\)"),
        ({"values": ONES.to("meta")}, ValueError, "values on cpu like rewards, got meta"),
        ({"values": None}, TypeError, "values to be a Tensor, got NoneType"),
        ({"mask": ONES}, TypeError, "mask of dtype bool, got float32"),
        ({"cu_seqlens": None}, ValueError, r"cu_seqlens of shape \(S \+ 1,\) with packed rewards"),
        (
            {"cu_seqlens": torch.tensor([0, 4])},
            ValueError,
            r"cu_seqlens to rise from 0 to T = 6, got \[0, 4\]",
        ),
        (
            {"rewards": ONES.view(2, 3), "values": ONES.view(2, 3)},
            ValueError,
            r"rewards of shape \(T,\) with cu_seqlens, got \(2, 3\)",
        ),
        ({"gamma": 1.5}, ValueError, r"gamma in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, ValueError, r"lam in \[0, 1\], got -0.1"),
        ({"lam": NAN}, ValueError, r"lam in \[0, 1\], got nan"),
        ({"gamma": "1"}, TypeError, "gamma to be a number, got str"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"rewards": ONES, "values": ONES, "cu_seqlens": torch.tensor([0, 6])} | change
    with pytest.raises(error, match=f"^gae: .*{message}"):
        rlkern.gae(arguments.pop("rewards"), arguments.pop("values"), **arguments)
