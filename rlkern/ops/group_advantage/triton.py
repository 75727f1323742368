"""Triton kernels of `group_advantage` and `group_moments`: rows sorted by group, a program a group.

The sort is stable and the sums of a group are taken in its own order alone, without atomics: the
same bits at every run, and however the rows of different groups are mixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# In the order of KINDS in reference.py.
GRPO = tl.constexpr(0)
RLOO = tl.constexpr(2)
BATCH_STD = tl.constexpr(3)
MAXRL = tl.constexpr(4)
PASSK = tl.constexpr(5)
GRPO_PASSK = tl.constexpr(6)
BLOCK_ROWS = 256
# A group of a common size fits one block; larger ones take several.
LARGEST_GROUP_BLOCK = 2048


@triton.jit
def _key_kernel(group_ids, mask, key, rows, num_groups, BLOCK: tl.constexpr):
    # rows that count nowhere sort behind the last group
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    group = tl.load(group_ids + row, mask=live, other=-1)
    counted = (group >= 0) & (group < num_groups)
    if mask is not None:
        counted = counted & (tl.load(mask + row, mask=live, other=0) != 0)
    tl.store(key + row, tl.where(counted, group, num_groups), mask=live)


@triton.jit
def _deviations(rewards, weights, order, base, end, first, BLOCK: tl.constexpr):
    """r - first and the weight of the rows order[base : base + BLOCK], 0 past the group's end."""
    at = base + tl.arange(0, BLOCK)
    live = at < end
    row = tl.load(order + at, mask=live, other=0)
    r = tl.load(rewards + row, mask=live, other=0.0).to(tl.float64)
    weight = live.to(tl.float64)
    if weights is not None:
        weight = tl.load(weights + row, mask=live, other=0.0)
    return tl.where(live, r - first, 0.0), weight


@triton.jit
def _moments_kernel(rewards, weights, order, starts, moments, num_groups, BLOCK: tl.constexpr):
    """moments: (4, num_groups) of count, first reward, mean - first, sum of squared deviations."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    row = tl.load(order + start, mask=start < end, other=0)
    first = tl.load(rewards + row, mask=start < end, other=0.0).to(tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.float64)
    for base in range(start, end, BLOCK):
        shifted, weight = _deviations(rewards, weights, order, base, end, first, BLOCK)
        sums += weight * shifted
        counts += weight
    count = tl.sum(counts, 0)
    # without weight there is no mean, but 0 times NaN is still to be seen
    mean = tl.sum(sums, 0) / tl.where(count > 0, count, 1.0)
    # an infinite reward makes the whole group NaN, wherever it stands in it
    mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
    squares = tl.zeros((BLOCK,), tl.float64)
    for base in range(start, end, BLOCK):
        shifted, weight = _deviations(rewards, weights, order, base, end, first, BLOCK)
        deviation = tl.where(weight > 0, shifted - mean, 0.0)
        squares += weight * (deviation * deviation)
    tl.store(moments + group, count)
    tl.store(moments + num_groups + group, first)
    tl.store(moments + 2 * num_groups + group, mean)
    tl.store(moments + 3 * num_groups + group, tl.sum(squares, 0))


@triton.jit
def _best_kernel(rewards, order, starts, winners, leads, BLOCK: tl.constexpr):
    """Of each group the first row with its largest reward, and how far it is ahead."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    best = tl.full((), float("-inf"), tl.float64)
    second = best
    winner = start
    for base in range(start, end, BLOCK):
        at = base + tl.arange(0, BLOCK)
        live = at < end
        row = tl.load(order + at, mask=live, other=0)
        r = tl.load(rewards + row, mask=live, other=float("-inf")).to(tl.float64)
        here = tl.max(r, 0)
        place = tl.min(tl.where(r == here, at, end), 0)
        next_best = tl.max(tl.where(at == place, float("-inf"), r), 0)
        second = tl.maximum(tl.minimum(best, here), tl.maximum(second, next_best))
        winner = tl.where(here > best, place, winner)
        best = tl.maximum(best, here)
    tl.store(winners + group, tl.load(order + winner, mask=start < end, other=0))
    alone = second == float("-inf")
    tl.store(leads + group, tl.where(alone, 0.0, best) - tl.where(alone, 0.0, second))


@triton.jit
def _batch_std(moments, num_groups, BLOCK: tl.constexpr):
    """Standard deviation of all rows: squares within groups, and between their means."""
    counts = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for base in range(0, num_groups, BLOCK):
        group = base + tl.arange(0, BLOCK)
        live = group < num_groups
        count = tl.load(moments + group, mask=live, other=0.0)
        first = tl.load(moments + num_groups + group, mask=live, other=0.0)
        mean = tl.load(moments + 2 * num_groups + group, mask=live, other=0.0)
        counts += count
        sums += count * (first + mean)
    count_all = tl.sum(counts, 0)
    mean_all = tl.sum(sums, 0) / tl.where(count_all > 0, count_all, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for base in range(0, num_groups, BLOCK):
        group = base + tl.arange(0, BLOCK)
        live = group < num_groups
        count = tl.load(moments + group, mask=live, other=0.0)
        first = tl.load(moments + num_groups + group, mask=live, other=0.0)
        mean = tl.load(moments + 2 * num_groups + group, mask=live, other=0.0)
        within = tl.load(moments + 3 * num_groups + group, mask=live, other=0.0)
        between = first + mean - mean_all
        squares += within + count * between * between
    return tl.sqrt(tl.sum(squares, 0) / tl.where(count_all > 1, count_all - 1, 1.0))


@triton.jit
def _rows_kernel(
    rewards,
    mask,
    key,
    moments,
    winners,
    leads,
    advantages,
    rows,
    num_groups,
    epsilon,
    KIND: tl.constexpr,
    BY_STD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    group = tl.load(key + row, mask=live, other=0)
    counted = live & (group < num_groups)
    count = tl.load(moments + group, mask=counted, other=1.0)
    first = tl.load(moments + num_groups + group, mask=counted, other=0.0)
    mean = tl.load(moments + 2 * num_groups + group, mask=counted, other=0.0)
    deviation = tl.load(rewards + row, mask=counted, other=0.0).to(tl.float64) - first - mean
    # a group without weight has advantages of 0, or NaN
    deviation = tl.where((count > 0) | (mean != mean), deviation, 0.0)
    if winners is not None:
        wins = row == tl.load(winners + group, mask=counted, other=-1)
        lead = tl.load(leads + group, mask=counted, other=0.0)
        deviation = tl.where(mean == mean, tl.where(wins, lead, 0.0), float("nan"))
    denominator = tl.full((BLOCK,), 1.0, tl.float64)
    if BY_STD:
        squares = tl.load(moments + 3 * num_groups + group, mask=counted, other=0.0)
        denominator = tl.sqrt(squares / tl.where(count > 1, count - 1, 1.0)) + epsilon
    if KIND == RLOO:
        denominator = (count - 1) / tl.where(count > 0, count, 1.0)
    if KIND == MAXRL:
        denominator = first + mean + epsilon
    if KIND == BATCH_STD:
        denominator = tl.zeros((BLOCK,), tl.float64) + (
            _batch_std(moments, num_groups, BLOCK) + epsilon
        )
    # a denominator of 0 belongs to one row or to equal rewards: deviations of 0 stay so
    value = deviation / tl.where(denominator == 0, 1.0, denominator)
    value = tl.where(counted, value, float("nan"))
    if mask is not None:
        value = tl.where(tl.load(mask + row, mask=live, other=0) != 0, value, 0.0)
    tl.store(advantages + row, value.to(advantages.dtype.element_ty), mask=live)


def forward(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    kind: int,
    num_groups: int,
    epsilon: float,
) -> Tensor:
    rows = rewards.shape[0]
    double = rewards.dtype == torch.float64
    advantages = rewards.new_empty((rows,), dtype=torch.float64 if double else torch.float32)
    if rows == 0:
        return advantages
    key, order, starts, found = _by_group(rewards, group_ids, mask, weights, num_groups)
    winners = leads = None
    if kind in (PASSK.value, GRPO_PASSK.value):
        winners = torch.empty_like(starts)
        leads = rewards.new_empty((num_groups,), dtype=torch.float64)
        if num_groups:
            block = _group_block(rows, num_groups)
            _best_kernel[(num_groups,)](
                rewards, order, starts, winners, leads, BLOCK=block, num_warps=max(1, block // 256)
            )
    _rows_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        rewards,
        mask,
        key,
        found,
        winners,
        leads,
        advantages,
        rows,
        num_groups,
        epsilon,
        KIND=kind,
        BY_STD=kind in (GRPO.value, GRPO_PASSK.value),
        BLOCK=BLOCK_ROWS,
    )
    return advantages


def moments(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    num_groups: int,
) -> Tensor:
    if rewards.shape[0] == 0:
        return rewards.new_zeros((3, num_groups), dtype=torch.float64)
    *_, found = _by_group(rewards, group_ids, mask, weights, num_groups)
    count, first, offset, squares = found
    mean = torch.where((count == 0) & (offset == 0), 0.0, first + offset)
    return torch.stack([count, mean, (squares / torch.where(count > 1, count - 1, 1.0)).sqrt()])


def _by_group(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's group, the rows sorted by it, where groups begin, and their moments."""
    rows = rewards.shape[0]
    key = torch.empty_like(group_ids)
    grid = (triton.cdiv(rows, BLOCK_ROWS),)
    _key_kernel[grid](group_ids, mask, key, rows, num_groups, BLOCK=BLOCK_ROWS)
    in_order, order = torch.sort(key, stable=True)
    edges = torch.arange(num_groups + 1, device=key.device)
    starts = torch.searchsorted(in_order, edges)
    found = rewards.new_empty((4, num_groups), dtype=torch.float64)
    if num_groups:
        block = _group_block(rows, num_groups)
        _moments_kernel[(num_groups,)](
            rewards,
            weights,
            order,
            starts,
            found,
            num_groups,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    return key, order, starts, found


def _group_block(rows: int, num_groups: int) -> int:
    average = triton.next_power_of_2(triton.cdiv(rows, num_groups))
    return min(LARGEST_GROUP_BLOCK, max(32, average))
