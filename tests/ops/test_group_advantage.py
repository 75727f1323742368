"""Group-relative advantages: the op itself; its compositions in test_group_advantage_methods.py."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.group_advantage import reference
from rlkern.ops.group_advantage.reference import KINDS
from rlkern.testing.numerics import assert_same_bits

OP = "group_advantage"
NAN, INF = float("nan"), float("inf")


def oracle(rewards, group_ids, kind, epsilon):
    """The formulas of verl and TRL in numpy, in float64, for groups of at least two rows.

    verl/trainer/ppo/core_algos.py: compute_grpo_outcome_advantage, compute_rloo_outcome_advantage
    (their form R n/(n-1) - mean n/(n-1)), compute_grpo_passk_outcome_advantage;
    trl/trainer/grpo_trainer.py: scale_rewards="batch"; SkyRL: compute_maxrl_advantage.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    out = np.empty_like(rewards)
    for i, group in enumerate(group_ids):
        mine = rewards[group_ids == group]
        n = len(mine)
        if kind == "grpo":
            out[i] = (rewards[i] - mine.mean()) / (mine.std(ddof=1) + epsilon)
        elif kind == "dr_grpo":
            out[i] = rewards[i] - mine.mean()
        elif kind == "rloo":
            out[i] = rewards[i] * n / (n - 1) - mine.mean() * n / (n - 1)
        elif kind == "maxrl":
            out[i] = (rewards[i] - mine.mean()) / (mine.mean() + epsilon)
        elif kind in ("passk", "grpo_passk"):
            second, best = np.sort(mine)[-2:]
            wins = i == np.flatnonzero((group_ids == group) & (rewards == best))[0]
            scale = mine.std(ddof=1) + epsilon if kind == "grpo_passk" else 1.0
            out[i] = (best - second) / scale if wins else 0.0
        else:
            out[i] = (rewards[i] - mine.mean()) / (rewards.std(ddof=1) + epsilon)
    return out


def run(kernel, rewards, group_ids, kind, num_groups=None, epsilon=1e-6, mask=None, weights=None):
    num_groups = rewards.shape[0] if num_groups is None else num_groups
    return kernel.forward(rewards, group_ids, mask, weights, KINDS.index(kind), num_groups, epsilon)


def shuffled(rows, groups, seed=0):
    """Random ids of which each group has at least two rows."""
    generator = torch.Generator().manual_seed(seed)
    twice = torch.arange(groups).repeat(2)
    rest = torch.randint(groups, (rows - 2 * groups,), generator=generator)
    return torch.cat([twice, rest])[torch.randperm(rows, generator=generator)]


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    checks.check_budget(OP, device, dtype)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_same_bits_twice_and_on_any_number_of_threads(device):
    checks.check_deterministic(OP, device, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_what_trainers_compute(device, kind):
    """To the last bit of float32 but one, whatever the offset of the rewards."""
    for rows, groups, offset in ((64, 8, 0.0), (501, 37, 0.0), (300, 20, 1e4), (4096, 1, -3.0)):
        group_ids = shuffled(rows, groups)
        rewards = torch.randn(rows) + offset
        want = oracle(rewards.numpy(), group_ids.numpy(), kind, 1e-4)
        ulp = np.spacing(np.abs(want).astype(np.float32))
        for kernel in checks.kernels(OP, device):
            if kernel.name == "reference":
                continue
            got = run(kernel, rewards.to(device), group_ids.to(device), kind, groups, 1e-4).cpu()
            error = np.abs(got.double().numpy() - want) / ulp
            assert error.max() <= 1.0, f"{kernel.name} {kind} {rows}x{groups}: {error.max()} ulp"


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "batch_std"])
def test_closer_to_float64_than_torch(kind):
    """Where the mean is a thousand times the spread, float32 sums lose what we keep."""
    rewards = 1000.0 + torch.rand(512, 16)
    group_ids = torch.arange(512).repeat_interleave(16)
    truth = torch.from_numpy(oracle(rewards.flatten().numpy(), group_ids.numpy(), kind, 1e-6))
    deviation = rewards - rewards.mean(1, keepdim=True)
    torchs = {
        "grpo": deviation / (rewards.std(1, keepdim=True) + 1e-6),
        "dr_grpo": deviation,
        "rloo": deviation * 16 / 15,
        "batch_std": deviation / (rewards.std() + 1e-6),
    }[kind].flatten()
    ours = rlkern.group_advantage(rewards.flatten(), group_ids, kind=kind)
    assert (ours - truth).abs().max() < 0.1 * (torchs - truth).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_a_group_of_one_and_equal_rewards_give_exactly_zero(device, kind, epsilon):
    ones = torch.arange(7).to(device)
    third = shuffled(30, 3).to(device)
    for kernel in checks.kernels(OP, device):
        assert (run(kernel, torch.randn(7).to(device), ones, kind, None, epsilon) == 0).all()
        for dtype in (*checks.DTYPES, torch.float64):
            # 0.1 in float64 too, of which ten do not sum to 1
            equal = torch.full((30,), 0.1, dtype=dtype, device=device)
            got = run(kernel, equal, third, kind, None, epsilon)
            assert (got == 0).all(), f"{kernel.name} {dtype}"
        # one equal group beside others that are not
        mixed = torch.where(third == 1, 0.7, torch.randn(30).to(device))
        got = run(kernel, mixed, third, kind, None, epsilon)
        assert (got[third == 1] == 0).all(), kernel.name
        winners = 2 if kind in ("passk", "grpo_passk") else int((third != 1).sum())
        assert (got[third != 1] != 0).sum() == winners, kernel.name


def test_equal_rewards_in_plain_torch():
    """What the exact 0 is for: the rounding of a mean, divided by itself and 1e-6."""
    rewards = torch.full((8,), 0.7)
    torchs = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert torchs.abs().max() > 0.05
    assert (rlkern.group_advantage(rewards, torch.zeros(8, dtype=torch.int64)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_no_groups(device, kind):
    empty, none = torch.empty(0).to(device), torch.empty(0, dtype=torch.int64).to(device)
    for kernel in checks.kernels(OP, device):
        assert run(kernel, empty, none, kind, 0).shape == (0,)
        assert run(kernel, empty, none, kind, 5).shape == (0,)
    assert rlkern.group_advantage(empty, none, kind=kind).shape == (0,)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("first", [True, False])
def test_a_reward_that_is_no_number_breaks_its_group(device, kind, value, first):
    group_ids = shuffled(40, 4)
    members = (group_ids == 2).nonzero()[:, 0]
    rewards = torch.randn(40)
    rewards[members[0 if first else -1]] = value
    broken = torch.ones(40, dtype=torch.bool) if kind == "batch_std" else group_ids == 2
    for kernel in checks.kernels(OP, device):
        got = run(kernel, rewards.to(device), group_ids.to(device), kind).cpu()
        assert got.isnan().tolist() == broken.tolist(), kernel.name
        assert got[~broken].isfinite().all(), kernel.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_row_is_as_if_absent(device, kind):
    group_ids = shuffled(60, 6)
    mask = torch.rand(60) < 0.7
    rewards = torch.where(mask, torch.randn(60), NAN)
    # an id out of range is not read either
    hidden = torch.where(mask, group_ids, 99)
    for kernel in checks.kernels(OP, device):
        got = run(
            kernel, rewards.to(device), hidden.to(device), kind, 6, 1e-6, mask.to(device)
        ).cpu()
        want = run(kernel, rewards[mask].to(device), group_ids[mask].to(device), kind, 6).cpu()
        assert (got[~mask] == 0).all(), kernel.name
        assert_same_bits(f"{kernel.name} kept rows", got[mask], want)


def test_everything_masked(device):
    rewards, group_ids = torch.full((5,), NAN).to(device), torch.zeros(5, dtype=torch.int64)
    mask = torch.zeros(5, dtype=torch.bool).to(device)
    for kernel in checks.kernels(OP, device):
        for kind in KINDS:
            got = run(kernel, rewards, group_ids.to(device), kind, 5, 1e-6, mask)
            assert (got == 0).all(), f"{kernel.name} {kind}"


@pytest.mark.parametrize("kind", KINDS)
def test_mixing_the_rows_of_groups_changes_no_bit(device, kind):
    """The same rows in any order that keeps the order within each group."""
    group_ids = shuffled(333, 21)
    rewards = torch.randn(333) * 3
    in_blocks = torch.sort(group_ids, stable=True).indices
    renumbered = torch.randperm(21)[group_ids]
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue

        def result(rows, ids, kernel=kernel):
            return run(kernel, rewards[rows].to(device), ids[rows].to(device), kind, 21).cpu()

        got = result(slice(None), group_ids)
        assert_same_bits(f"{kernel.name} in blocks", result(in_blocks, group_ids), got[in_blocks])
        if kind != "batch_std":
            assert_same_bits(f"{kernel.name} renumbered", result(slice(None), renumbered), got)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_give_nan_and_stay_in_bounds(device, kind):
    rewards = torch.randn(6).to(device)
    group_ids = torch.tensor([0, -1, 0, 2, 2**40, -(2**40)]).to(device)
    inside = torch.tensor([True, False, True, False, False, False]).to(device)
    for kernel in checks.kernels(OP, device):
        got = run(kernel, rewards, group_ids, kind, 2)
        assert got.isnan().tolist() == (~inside).tolist(), kernel.name
        want = run(kernel, rewards[inside], group_ids[inside], kind, 2)
        assert_same_bits(f"{kernel.name} kept rows", got[inside], want)
        assert run(kernel, rewards, group_ids, kind, 0).isnan().all(), kernel.name


def test_scalars_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    rewards = torch.tensor([1.0, 2.0, 4.0, 9.0, 3.0])
    group_ids = torch.tensor([0, 0, 0, 1, 1])
    seen = []
    for kind in range(len(KINDS)):
        for num_groups, epsilon in ((2, 0.375), (2, 5.0), (1, 0.375)):
            args = (rewards, group_ids, None, None, kind, num_groups, epsilon)
            got = torch.ops.rlkern.group_advantage(*args)
            want = reference.forward(*args)
            torch.testing.assert_close(got, want, equal_nan=True)
            assert got.isnan().tolist() == [False] * 3 + [num_groups == 1] * 2
            seen.append(got[:3].tolist())
    # epsilon matters to the kinds that divide, and each kind is another result
    assert len({tuple(s) for s in seen[0::3]}) == len(KINDS)
    assert seen[0] != seen[1]
    assert seen[9] != seen[10]
    assert seen[3] == seen[4]
    mask = torch.tensor([True, False, True, True, True])
    masked = torch.ops.rlkern.group_advantage(rewards, group_ids, mask, None, 1, 2, 0.0)
    assert masked.tolist() == [-1.5, 0.0, 1.5, 3.0, -3.0]
    weights = torch.tensor([1.0, 2.0, 5.0, 3.0, 1.0], dtype=torch.float64)
    weighted = torch.ops.rlkern.group_advantage(rewards, group_ids, None, weights, 1, 2, 0.0)
    assert weighted.tolist() == [-2.125, -1.125, 0.875, 1.5, -4.5]
    moments = torch.ops.rlkern.group_moments(rewards, group_ids, mask, weights, 4)
    # 1 once and 4 five times: squares 3.5^2 / 6 ... over 5
    want = [[6.0, 4.0, 0, 0], [3.5, 7.5, 0, 0], [1.5**0.5, 3.0, 0, 0]]
    torch.testing.assert_close(moments, torch.tensor(want, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"kind must be in \[0, 7\), got 7"):
        torch.ops.rlkern.group_advantage(rewards, group_ids, None, None, 7, 2, 0.0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "batch_std", "maxrl"])
def test_a_weight_is_a_number_of_copies(device, kind):
    group_ids, copies = shuffled(60, 6), torch.randint(1, 5, (60,))
    rewards = torch.rand(60)
    repeated = torch.arange(60).repeat_interleave(copies)
    mask = torch.rand(60) < 0.8
    for kernel in checks.kernels(OP, device):
        for kept in (None, mask):
            got = run(
                kernel,
                rewards.double().to(device),
                group_ids.to(device),
                kind,
                6,
                mask=None if kept is None else kept.to(device),
                weights=copies.double().to(device),
            ).cpu()
            every = repeated if kept is None else repeated[kept[repeated]]
            want = run(
                kernel, rewards[every].double().to(device), group_ids[every].to(device), kind, 6
            )
            torch.testing.assert_close(got[every], want.cpu(), rtol=1e-12, atol=1e-12)


def test_a_group_without_weight(device):
    rewards = torch.tensor([1.0, 2.0, 4.0, NAN, 3.0], device=device)
    group_ids = torch.tensor([0, 0, 1, 2, 2], device=device)
    weights = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=device)
    for kernel in checks.kernels(OP, device):
        for kind in ("grpo", "dr_grpo", "maxrl"):
            got = run(kernel, rewards, group_ids, kind, 3, weights=weights)
            assert (got[:3] == 0).all(), f"{kernel.name} {kind}"
            assert got[3:].isnan().all(), f"{kernel.name} {kind}"


@pytest.mark.parametrize("dtype", [*checks.DTYPES, torch.float64])
def test_moments(device, dtype):
    """Of groups with and without rows, masked, weighted, of one row, of a row that is no number."""
    group_ids = torch.where(torch.arange(80) % 9 == 8, 12, torch.arange(80) % 9)
    rewards = (torch.randn(80) + 5).to(dtype)
    rewards[4::9] = 0.1
    rewards[14], rewards[3] = NAN, INF
    mask = torch.rand(80) < 0.8
    mask[[14, 3]] = torch.tensor([True, False])
    for weights in (None, torch.randint(0, 4, (80,)).double()):
        want = torch.zeros(3, 14, dtype=torch.float64)
        for group in range(14):
            rows = mask & (group_ids == group)
            w = torch.ones(80, dtype=torch.float64) if weights is None else weights
            r = rewards[rows].double().repeat_interleave(w[rows].long())
            if len(r):
                spread = 0 * r[0] if len(r) == 1 else r.std()
                want[:, group] = torch.stack([w[rows].sum(), r.mean(), spread])
            if rewards[rows].isnan().any():
                want[1:, group] = NAN
        for kernel in checks.kernels(OP, device):
            moments = torch.ops.rlkern.group_moments
            if kernel.name != "native":
                moments = importlib.import_module(f"rlkern.ops.{OP}.{kernel.name}").moments
            args = (rewards, group_ids, mask, weights)
            args = [None if a is None else a.to(device) for a in args]
            got = moments(*args, 14).cpu()
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
            # equal rewards have no spread at all
            assert got[2, 4] == 0, kernel.name
            nothing = moments(*(None if a is None else a[:0] for a in args), 3)
            assert nothing.tolist() == [[0.0] * 3] * 3


def test_moments_opcheck(device):
    args = (torch.randn(9), torch.arange(9) // 3, torch.rand(9) < 0.7, torch.rand(9).double())
    args = [a.to(device) for a in args]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.rlkern.group_moments, (*args, 4), test_utils=tests)


def test_a_worked_example():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0])
    group_ids = torch.tensor([7, 7, 7, 7, 3], dtype=torch.int32)

    def advantages(kind):
        return rlkern.group_advantage(rewards, group_ids, kind=kind, num_groups=8, epsilon=0.0)

    root = 0.75**0.5  # deviations of 1/2 over a std of sqrt(4 (1/4) / 3)
    torch.testing.assert_close(advantages("grpo"), torch.tensor([root, -root, -root, root, 0]))
    assert advantages("dr_grpo").tolist() == [0.5, -0.5, -0.5, 0.5, 0.0]
    torch.testing.assert_close(
        advantages("rloo"), torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0]) * 2 / 3
    )
    spread = 1.5**0.5  # squares around the mean 1 are 0, 1, 1, 0, 4: 6 / 4
    torch.testing.assert_close(
        advantages("batch_std"), torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0]) / spread
    )


def test_no_gradient_goes_through():
    rewards = torch.randn(4, requires_grad=True)
    assert not rlkern.group_advantage(rewards, torch.zeros(4, dtype=torch.int64)).requires_grad


@pytest.mark.parametrize("dtype", [*checks.DTYPES, torch.float64])
def test_the_result_is_float32_and_strides_do_not_matter(dtype):
    group_ids = torch.randint(5, (20, 2))[:, 0]
    rewards = torch.randn(20, 3).to(dtype)[:, 1]
    got = rlkern.group_advantage(rewards, group_ids)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    want = rlkern.group_advantage(rewards.contiguous(), group_ids.int().contiguous())
    assert_same_bits("strided", got, want)


def test_more_rows_than_a_grid_dimension(device):
    rewards = torch.randn(70_000).to(device)
    group_ids = (torch.arange(70_000) // 7).to(device)
    got = rlkern.group_advantage(rewards, group_ids, kind="dr_grpo")
    want = rewards.view(-1, 7) - rewards.view(-1, 7).mean(1, keepdim=True)
    torch.testing.assert_close(got, want.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    def advantages(rewards, group_ids):
        return rlkern.group_advantage(rewards, group_ids, kind=kind, num_groups=4)

    rewards, group_ids = torch.randn(24), torch.randint(4, (24,))
    want = advantages(rewards, group_ids)
    assert_same_bits("compiled", checks.compiled(advantages)(rewards, group_ids), want)


def test_compiles_whole_with_the_number_of_groups_left_open():
    compiled = checks.compiled(rlkern.group_advantage)
    for rows in (24, 31, 12):
        rewards, group_ids = torch.randn(rows), torch.randint(4, (rows,))
        want = rlkern.group_advantage(rewards, group_ids)
        assert_same_bits("compiled", compiled(rewards, group_ids), want)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 200),
    groups=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([*checks.DTYPES, torch.float64]),
    ids=st.sampled_from([torch.int64, torch.int32]),
    binary=st.booleans(),
    offset=st.sampled_from([0.0, -7.25, 1e3]),
    kept=st.sampled_from([None, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, groups, kind, dtype, ids, binary, offset, kept, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(rows, generator=generator)
    rewards = ((rewards < 0.4).to(dtype) if binary else rewards.to(dtype)) + offset
    group_ids = torch.randint(groups, (rows,), generator=generator, dtype=ids)
    mask = None if kept is None else torch.rand(rows, generator=generator) < kept
    got = rlkern.group_advantage(rewards, group_ids, kind=kind, num_groups=groups, mask=mask)
    assert got.isfinite().all()
    count = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    assert (got[~count] == 0).all()
    if not count.any():
        return
    # advantages of a group sum to 0, and order its rows as the rewards do
    for group in group_ids[count].unique():
        member = count & (group_ids == group)
        if "passk" in kind:
            assert (got[member] != 0).sum() <= 1
        else:
            assert abs(got[member].double().sum()) <= 1e-5 * max(1.0, got[member].abs().sum())
        order = rewards[member].argsort(stable=True)
        # a negative mean turns maxrl around
        turned = kind == "maxrl" and rewards[member].mean() < 0
        assert ((got[member] * (-1 if turned else 1))[order].diff() >= 0).all() or "passk" in kind
    truth = reference.forward(
        rewards.double(), group_ids.long(), mask, None, KINDS.index(kind), groups, 1e-6
    )
    torch.testing.assert_close(got.double(), truth, rtol=2e-7, atol=1e-12)


REWARDS, IDS = torch.zeros(4), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": [1.0]}, TypeError, "expected rewards to be a Tensor, got list"),
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, TypeError, "expected rewards of dtype"),
        ({"rewards": torch.zeros(4, 1)}, ValueError, r"rewards of shape \(N,\), got \(4, 1\)"),
        ({"group_ids": [0, 1]}, TypeError, "expected group_ids to be a Tensor, got list"),
        ({"group_ids": IDS.float()}, TypeError, "group_ids of dtype int64 or int32, got float32"),
        (
            {"group_ids": IDS[:3]},
            ValueError,
            r"expected group_ids of shape \(N,\) = \(4,\), got \(3,\)",
        ),
        ({"group_ids": IDS.to("meta")}, ValueError, "group_ids on cpu like rewards, got meta"),
        (
            {"group_ids": torch.tensor([0, 1, -3, -9])},
            ValueError,
            r"group_ids in \[0, num_groups = 4\), got -3 at position 2",
        ),
        (
            {"group_ids": torch.tensor([0, 5, 1, 6]), "num_groups": 5},
            ValueError,
            r"group_ids in \[0, num_groups = 5\), got 5 at position 1",
        ),
        (
            {
                "group_ids": torch.tensor([9, 5, 1, 4], dtype=torch.int32),
                "mask": torch.tensor([False, True, True, True]),
            },
            ValueError,
            r"group_ids in \[0, num_groups = 4\), got 5 at position 1",
        ),
        ({"kind": "gae"}, ValueError, "one of ace, batch_std, .*, w_reinforce, got 'gae'"),
        ({"num_groups": -1}, ValueError, "num_groups to be at least 0, got -1"),
        ({"num_groups": 2.0}, TypeError, "expected num_groups to be an int, got float"),
        ({"num_groups": True}, TypeError, "expected num_groups to be an int, got bool"),
        ({"epsilon": -1e-6}, ValueError, "epsilon to be finite and at least 0, got -1e-06"),
        ({"epsilon": INF}, ValueError, "epsilon to be finite and at least 0, got inf"),
        ({"epsilon": NAN}, ValueError, "epsilon to be finite and at least 0, got nan"),
        ({"epsilon": "1"}, TypeError, "expected epsilon to be a number, got str"),
        ({"mask": [True] * 4}, TypeError, "expected mask to be a Tensor, got list"),
        ({"mask": torch.ones(4)}, TypeError, "expected mask of dtype bool, got float32"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask of shape \(N,\) = \(4,\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"rewards": REWARDS, "group_ids": IDS} | change
    with pytest.raises(error, match=f"^group_advantage: .*{message}"):
        rlkern.group_advantage(arguments.pop("rewards"), arguments.pop("group_ids"), **arguments)
