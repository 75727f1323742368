"""Triton kernels of `gae`: a program a sequence, in blocks from its end, each a scan.

No atomics. The order of operations depends on a sequence's length and mask alone; whitening adds
the sequences' sums in their order.
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
MERGE_BLOCK = 256


@triton.jit
def _bound(cu_seqlens, i, tokens):
    """Where sequence i begins, in [0, T] whatever cu_seqlens holds."""
    at = tl.load(cu_seqlens + i).to(tl.int64)
    return tl.minimum(tl.maximum(at, 0), tokens)


@triton.jit
def _least(a, b):
    return tl.minimum(a, b)


@triton.jit
def _then(decay_a, sum_a, decay_b, sum_b):
    """x -> decay x + sum, first a, then b."""
    return decay_b * decay_a, decay_b * sum_a + sum_b


@triton.jit
def _scan_kernel(
    rewards,
    values,
    cu_seqlens,
    mask,
    advantages,
    returns,
    moments,
    tokens,
    sequences,
    gamma,
    gamma_rest,
    decay,
    decay_rest,
    BLOCK_T: tl.constexpr,
):
    """moments, where asked for: (4, S) of count, first advantage, sums of A - first and squares."""
    sequence = tl.program_id(0).to(tl.int64)
    begin = _bound(cu_seqlens, sequence, tokens)
    end = _bound(cu_seqlens, sequence + 1, tokens)
    # scalars come in float32: 0.999 off by 1e-8 would be off by 1e-5 a thousand tokens on
    zero = tl.full((), 0.0, tl.float64)
    gamma = zero + gamma + gamma_rest
    decay = zero + decay + decay_rest
    lane = tl.arange(0, BLOCK_T)
    # the next token that counts, and its advantage
    nearest = end
    carry = zero
    number = zero
    first = zero
    total = tl.zeros((BLOCK_T,), tl.float64)
    squares = tl.zeros((BLOCK_T,), tl.float64)
    for base in range(0, end - begin, BLOCK_T):
        # lanes run back in time
        position = end - 1 - base - lane
        counts = position >= begin
        following = position + 1
        usable = counts & (following < end)
        if mask is not None:
            counts = counts & (tl.load(mask + position, mask=counts, other=0) != 0)
            usable = usable & (tl.load(mask + following, mask=usable, other=0) != 0)
        # the least position after each lane that counts; lane 0 of a later block has its own
        after = tl.associative_scan(tl.where(usable, following, tokens), 0, _least)
        after = tl.minimum(after, nearest)
        reward = tl.load(rewards + position, mask=counts, other=0.0).to(tl.float64)
        value = tl.load(values + position, mask=counts, other=0.0).to(tl.float64)
        next_value = tl.load(values + after, mask=counts & (after < end), other=0.0)
        delta = reward + gamma * next_value.to(tl.float64) - value
        share = tl.where(counts, decay, 1.0)
        product, inner = tl.associative_scan((share, tl.where(counts, delta, 0.0)), 0, _then)
        advantage = inner + product * carry
        kept = tl.where(counts, advantage, 0.0)
        inside = position >= begin
        tl.store(advantages + position, kept.to(advantages.dtype.element_ty), mask=inside)
        result = tl.where(counts, advantage + value, 0.0)
        tl.store(returns + position, result.to(returns.dtype.element_ty), mask=inside)
        if moments is not None:
            place = tl.min(tl.where(counts, lane, BLOCK_T), 0)
            candidate = tl.sum(tl.where(lane == place, kept, 0.0), 0)
            first = tl.where(number == 0, candidate, first)
            shifted = tl.where(counts, advantage - first, 0.0)
            total += shifted
            squares += shifted * shifted
            number += tl.sum(counts.to(tl.float64), 0)
        carry = tl.sum(tl.where(lane == BLOCK_T - 1, advantage, 0.0), 0)
        nearest = tl.minimum(nearest, tl.min(tl.where(counts, position, tokens), 0))
    if moments is not None:
        tl.store(moments + sequence, number)
        tl.store(moments + sequences + sequence, first)
        tl.store(moments + 2 * sequences + sequence, tl.sum(total, 0))
        tl.store(moments + 3 * sequences + sequence, tl.sum(squares, 0))


@triton.jit
def _merge_kernel(moments, whole, sequences, BLOCK_S: tl.constexpr):
    """whole: mean of all advantages, and what multiplies a deviation from it."""
    number = tl.zeros((BLOCK_S,), tl.float64)
    sums = tl.zeros((BLOCK_S,), tl.float64)
    for base in range(0, sequences, BLOCK_S):
        i = base + tl.arange(0, BLOCK_S)
        live = i < sequences
        count = tl.load(moments + i, mask=live, other=0.0)
        first = tl.load(moments + sequences + i, mask=live, other=0.0)
        number += count
        sums += count * first + tl.load(moments + 2 * sequences + i, mask=live, other=0.0)
    count_all = tl.sum(number, 0)
    mean_all = tl.sum(sums, 0) / tl.maximum(count_all, 1.0)
    squares = tl.zeros((BLOCK_S,), tl.float64)
    for base in range(0, sequences, BLOCK_S):
        i = base + tl.arange(0, BLOCK_S)
        live = i < sequences
        count = tl.load(moments + i, mask=live, other=0.0)
        shift = tl.load(moments + sequences + i, mask=live, other=0.0) - mean_all
        total = tl.load(moments + 2 * sequences + i, mask=live, other=0.0)
        within = tl.load(moments + 3 * sequences + i, mask=live, other=0.0)
        # squares of A - first + shift
        squares += tl.where(count > 0, within + 2.0 * shift * total + count * shift * shift, 0.0)
    variance = tl.sum(squares, 0) / tl.maximum(count_all - 1.0, 1.0)
    tl.store(whole, mean_all)
    tl.store(whole + 1, 1.0 / tl.sqrt(variance + 1e-8))


@triton.jit
def _whiten_kernel(raw, cu_seqlens, mask, whole, advantages, tokens, BLOCK_T: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    begin = _bound(cu_seqlens, sequence, tokens)
    end = _bound(cu_seqlens, sequence + 1, tokens)
    mean = tl.load(whole)
    scale = tl.load(whole + 1)
    for base in range(begin, end, BLOCK_T):
        position = base + tl.arange(0, BLOCK_T)
        inside = position < end
        counts = inside
        if mask is not None:
            counts = counts & (tl.load(mask + position, mask=inside, other=0) != 0)
        value = (tl.load(raw + position, mask=counts, other=0.0) - mean) * scale
        value = tl.where(counts, value, 0.0)
        tl.store(advantages + position, value.to(advantages.dtype.element_ty), mask=inside)


def forward(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    tokens, sequences = rewards.shape[0], cu_seqlens.shape[0] - 1
    # tokens outside of all sequences stay 0
    advantages, returns = rewards.new_zeros(tokens), rewards.new_zeros(tokens)
    if tokens == 0 or sequences == 0:
        return advantages, returns
    raw, moments = advantages, None
    if whiten:
        raw = rewards.new_empty((tokens,), dtype=torch.float64)
        moments = rewards.new_empty((4, sequences), dtype=torch.float64)
    _scan_kernel[(sequences,)](
        rewards,
        values,
        cu_seqlens,
        mask,
        raw,
        returns,
        moments,
        tokens,
        sequences,
        *_in_two(gamma),
        *_in_two(gamma * lam),
        BLOCK_T=BLOCK,
        num_warps=4,
    )
    if whiten:
        whole = rewards.new_empty((2,), dtype=torch.float64)
        _merge_kernel[(1,)](moments, whole, sequences, BLOCK_S=MERGE_BLOCK, num_warps=4)
        _whiten_kernel[(sequences,)](
            raw, cu_seqlens, mask, whole, advantages, tokens, BLOCK_T=BLOCK, num_warps=4
        )
    return advantages, returns


def _in_two(number: float) -> tuple[float, float]:
    """Two float32 numbers with that sum, to 48 bits."""
    high = ctypes.c_float(number).value
    return high, number - high
