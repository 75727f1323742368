"""Triton kernels of `segment_reduce`: a program a sequence, in blocks from its beginning.

No atomics. The order of a sum depends on the sequence's length alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 128 k tokens are 64 steps, and a lane's sums are float64 pairs of registers: 16 a thread.
BLOCK = 2048
BACKWARD_BLOCK = 512


@triton.jit
def _bound(cu_seqlens, i, tokens):
    """Where sequence i begins, in [0, T] whatever cu_seqlens holds."""
    at = tl.load(cu_seqlens + i).to(tl.int64)
    return tl.minimum(tl.maximum(at, 0), tokens)


@triton.jit
def _forward_kernel(
    values, cu_seqlens, mask, out, count, tokens, MEAN: tl.constexpr, BLOCK_T: tl.constexpr
):
    segment = tl.program_id(0)
    begin = _bound(cu_seqlens, segment, tokens)
    end = _bound(cu_seqlens, segment + 1, tokens)
    total = tl.zeros((BLOCK_T,), tl.float64)
    number = tl.zeros((BLOCK_T,), tl.int32)
    for base in range(begin, end, BLOCK_T):
        position = base + tl.arange(0, BLOCK_T)
        counts = position < end
        if mask is not None:
            counts = counts & (tl.load(mask + position, mask=counts, other=0) != 0)
        total += tl.load(values + position, mask=counts, other=0.0).to(tl.float64)
        if MEAN:
            number += counts.to(tl.int32)
    result = tl.sum(total, 0)
    if MEAN:
        how_many = tl.sum(number, 0)
        result = result / tl.maximum(how_many, 1).to(tl.float64)
        tl.store(count + segment, how_many.to(tl.float32))
    tl.store(out + segment, result.to(tl.float32))


@triton.jit
def _backward_kernel(
    grad,
    cu_seqlens,
    mask,
    count,
    grad_values,
    tokens,
    segments,
    steps,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = position < tokens
    # the last bound at or before the position, by halving [low, high)
    low = tl.full((BLOCK_T,), -1, tl.int32)
    high = tl.zeros((BLOCK_T,), tl.int32) + segments + 1
    for _ in range(steps):
        open_ = high - low > 1
        middle = low + (high - low) // 2
        bound = tl.load(cu_seqlens + middle, mask=live & open_, other=0).to(tl.int64)
        low = tl.where(open_ & (bound <= position), middle, low)
        high = tl.where(open_ & (bound > position), middle, high)
    counts = live & (low >= 0) & (low < segments)
    if mask is not None:
        counts = counts & (tl.load(mask + position, mask=counts, other=0) != 0)
    each = tl.load(grad + low, mask=counts, other=0.0)
    if MEAN:
        number = tl.load(count + low, mask=counts, other=1.0)
        each = tl.div_rn(each, tl.where(number < 1.0, 1.0, number))
    tl.store(grad_values + position, each.to(grad_values.dtype.element_ty), mask=live)


def forward(
    values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, mean: bool
) -> tuple[Tensor, Tensor]:
    segments = cu_seqlens.shape[0] - 1
    out = values.new_empty((segments,), dtype=torch.float32)
    count = values.new_empty((segments if mean else 0,), dtype=torch.float32)
    if segments:
        _forward_kernel[(segments,)](
            values,
            cu_seqlens,
            mask,
            out,
            count,
            values.shape[0],
            MEAN=mean,
            BLOCK_T=BLOCK,
            num_warps=4,
        )
    return out, count


def backward(
    grad: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    count: Tensor,
    mean: bool,
) -> Tensor:
    tokens, segments = values.shape[0], cu_seqlens.shape[0] - 1
    grad_values = values.new_empty((tokens,))
    if tokens:
        _backward_kernel[(triton.cdiv(tokens, BACKWARD_BLOCK),)](
            grad,
            cu_seqlens,
            mask,
            count,
            grad_values,
            tokens,
            segments,
            (segments + 2).bit_length(),
            MEAN=mean,
            BLOCK_T=BACKWARD_BLOCK,
            num_warps=4,
        )
    return grad_values
