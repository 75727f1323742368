"""Triton kernels of `group_advantage`: rows sorted by group, a program a group, then the rows.

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
def _deviations(rewards, order, base, end, first, BLOCK: tl.constexpr):
    """r - first for the rows order[base : base + BLOCK] of a group, 0 past its end."""
    at = base + tl.arange(0, BLOCK)
    live = at < end
    row = tl.load(order + at, mask=live, other=0)
    r = tl.load(rewards + row, mask=live, other=0.0).to(tl.float64)
    return tl.where(live, r - first, 0.0), live


@triton.jit
def _moments_kernel(rewards, order, starts, moments, num_groups, BLOCK: tl.constexpr):
    """moments: (4, num_groups) of count, first reward, mean - first, sum of squared deviations."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    count = (end - start).to(tl.float64)
    row = tl.load(order + start, mask=start < end, other=0)
    first = tl.load(rewards + row, mask=start < end, other=0.0).to(tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for base in range(start, end, BLOCK):
        shifted, _ = _deviations(rewards, order, base, end, first, BLOCK)
        sums += shifted
    mean = tl.sum(sums, 0) / tl.where(count > 0, count, 1.0)
    # an infinite reward makes the whole group NaN, wherever it stands in it
    mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
    squares = tl.zeros((BLOCK,), tl.float64)
    for base in range(start, end, BLOCK):
        shifted, live = _deviations(rewards, order, base, end, first, BLOCK)
        deviation = tl.where(live, shifted - mean, 0.0)
        squares += deviation * deviation
    tl.store(moments + group, count)
    tl.store(moments + num_groups + group, first)
    tl.store(moments + 2 * num_groups + group, mean)
    tl.store(moments + 3 * num_groups + group, tl.sum(squares, 0))


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
    advantages,
    rows,
    num_groups,
    epsilon,
    KIND: tl.constexpr,
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
    denominator = tl.full((BLOCK,), 1.0, tl.float64)
    if KIND == GRPO:
        squares = tl.load(moments + 3 * num_groups + group, mask=counted, other=0.0)
        denominator = tl.sqrt(squares / tl.where(count > 1, count - 1, 1.0)) + epsilon
    if KIND == RLOO:
        denominator = (count - 1) / count
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
    kind: int,
    num_groups: int,
    epsilon: float,
) -> Tensor:
    rows = rewards.shape[0]
    double = rewards.dtype == torch.float64
    advantages = rewards.new_empty((rows,), dtype=torch.float64 if double else torch.float32)
    if rows == 0:
        return advantages
    key = torch.empty_like(group_ids)
    grid = (triton.cdiv(rows, BLOCK_ROWS),)
    _key_kernel[grid](group_ids, mask, key, rows, num_groups, BLOCK=BLOCK_ROWS)
    in_order, order = torch.sort(key, stable=True)
    edges = torch.arange(num_groups + 1, device=key.device)
    starts = torch.searchsorted(in_order, edges)
    moments = rewards.new_empty((4, num_groups), dtype=torch.float64)
    if num_groups:
        block = _group_block(rows, num_groups)
        _moments_kernel[(num_groups,)](
            rewards, order, starts, moments, num_groups, BLOCK=block, num_warps=max(1, block // 256)
        )
    _rows_kernel[grid](
        rewards,
        mask,
        key,
        moments,
        advantages,
        rows,
        num_groups,
        epsilon,
        KIND=kind,
        BLOCK=BLOCK_ROWS,
    )
    return advantages


def _group_block(rows: int, num_groups: int) -> int:
    average = triton.next_power_of_2(triton.cdiv(rows, num_groups))
    return min(LARGEST_GROUP_BLOCK, max(32, average))
