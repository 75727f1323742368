"""Triton kernels of `value_loss`: a program a sequence, whose sums are added in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
MERGE_BLOCK = 256
# of reference.py
TOKENS, FILLED_SEQUENCES, ALL_SEQUENCES = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NUM_METRICS = 3


@triton.jit
def _bound(cu_seqlens, i, tokens):
    """Where sequence i begins, in [0, T] whatever cu_seqlens holds."""
    at = tl.load(cu_seqlens + i).to(tl.int64)
    return tl.minimum(tl.maximum(at, 0), tokens)


@triton.jit
def _length_kernel(cu_seqlens, mask, lengths, tokens, BLOCK_T: tl.constexpr):
    i = tl.program_id(0)
    begin = _bound(cu_seqlens, i, tokens)
    end = _bound(cu_seqlens, i + 1, tokens)
    length = tl.maximum(end - begin, 0)
    if mask is not None:
        number = tl.zeros((BLOCK_T,), tl.int64)
        for base in range(begin, end, BLOCK_T):
            position = base + tl.arange(0, BLOCK_T)
            number += (tl.load(mask + position, mask=position < end, other=0) != 0).to(tl.int64)
        length = tl.sum(number, 0)
    tl.store(lengths + i, length)


@triton.jit
def _divisor_kernel(lengths, divisors, sequences, DENOMINATOR: tl.constexpr, BLOCK_S: tl.constexpr):
    """divisors: the tokens that count, and what losses are divided by; both at least 1."""
    tokens = tl.zeros((BLOCK_S,), tl.int64)
    filled = tl.zeros((BLOCK_S,), tl.int64)
    for base in range(0, sequences, BLOCK_S):
        i = base + tl.arange(0, BLOCK_S)
        length = tl.load(lengths + i, mask=i < sequences, other=0)
        tokens += length
        filled += (length > 0).to(tl.int64)
    count = tl.maximum(tl.sum(tokens, 0), 1)
    divisor = count * 0 + 1
    if DENOMINATOR == TOKENS:
        divisor = count
    if DENOMINATOR == FILLED_SEQUENCES:
        divisor = tl.maximum(tl.sum(filled, 0), 1)
    if DENOMINATOR == ALL_SEQUENCES:
        divisor = divisor * sequences
    tl.store(divisors, count)
    tl.store(divisors + 1, divisor)


@triton.jit
def _token_kernel(
    values,
    returns,
    old_values,
    cu_seqlens,
    mask,
    lengths,
    divisors,
    grad,
    partials,
    tokens,
    sequences,
    width,
    scale,
    DIVIDE_BY_LENGTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """partials: (3, S) of weighted losses, clipped tokens and values."""
    i = tl.program_id(0)
    begin = _bound(cu_seqlens, i, tokens)
    end = _bound(cu_seqlens, i + 1, tokens)
    weight = tl.full((), 0.0, tl.float64) + scale
    weight = weight / tl.load(divisors + 1).to(tl.float64)
    if DIVIDE_BY_LENGTH:
        weight = weight / tl.maximum(tl.load(lengths + i), 1).to(tl.float64)
    losses = tl.zeros((BLOCK_T,), tl.float64)
    over = tl.zeros((BLOCK_T,), tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float64)
    for base in range(begin, end, BLOCK_T):
        position = base + tl.arange(0, BLOCK_T)
        inside = position < end
        counts = inside
        if mask is not None:
            counts = counts & (tl.load(mask + position, mask=inside, other=0) != 0)
        # masked slots may hold NaN or inf: they are not read
        v = tl.load(values + position, mask=counts, other=0.0)
        r = tl.load(returns + position, mask=counts, other=0.0)
        error = v - r
        squared = error * error
        clipped = counts & (squared < 0)
        if old_values is not None:
            old = tl.load(old_values + position, mask=counts, other=0.0)
            # written as selects, not minimum and maximum: a NaN must get through
            held = tl.where(v >= old - width, v, old - width)
            held = tl.where(held <= old + width, held, old + width)
            other = (held - r) * (held - r)
            clipped = counts & (other > squared)
            kept = tl.where(other <= squared, squared, squared + other)
            squared = tl.where(clipped, other, kept)
        losses += squared.to(tl.float64)
        over += clipped.to(tl.int32)
        total += v.to(tl.float64)
        if grad is not None:
            slope = tl.where(clipped, 0.0, weight.to(tl.float32) * error)
            tl.store(grad + position, slope, mask=inside)
    tl.store(partials + i, weight * tl.sum(losses, 0))
    tl.store(partials + sequences + i, tl.sum(over, 0).to(tl.float64))
    tl.store(partials + 2 * sequences + i, tl.sum(total, 0))


@triton.jit
def _sum(partials, count, BLOCK_S: tl.constexpr):
    total = tl.zeros((BLOCK_S,), tl.float64)
    for base in range(0, count, BLOCK_S):
        i = base + tl.arange(0, BLOCK_S)
        total += tl.load(partials + i, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _merge_kernel(partials, lengths, divisors, loss, metrics, sequences, BLOCK_S: tl.constexpr):
    share = 1.0 / tl.load(divisors).to(tl.float64)
    tl.store(loss, (0.5 * _sum(partials, sequences, BLOCK_S)).to(tl.float32))
    tl.store(metrics, _sum(lengths, sequences, BLOCK_S).to(tl.float32))
    clipped = _sum(partials + sequences, sequences, BLOCK_S)
    tl.store(metrics + 1, (clipped * share).to(tl.float32))
    total = _sum(partials + 2 * sequences, sequences, BLOCK_S)
    tl.store(metrics + 2, (total * share).to(tl.float32))


def forward(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    cliprange: float,
    denominator: int,
    divide_by_length: bool,
    scale: float,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, sequences = values.shape[0], cu_seqlens.shape[0] - 1
    # tokens outside of all sequences have no gradient
    grad = values.new_zeros(tokens if want_grad else 0)
    if tokens == 0 or sequences == 0:
        return values.new_zeros(()), values.new_zeros(NUM_METRICS), grad
    loss, metrics = values.new_empty(()), values.new_empty((NUM_METRICS,))
    lengths = cu_seqlens.new_empty((sequences,), dtype=torch.int64)
    divisors = cu_seqlens.new_empty((2,), dtype=torch.int64)
    partials = values.new_empty((3, sequences), dtype=torch.float64)
    _length_kernel[(sequences,)](cu_seqlens, mask, lengths, tokens, BLOCK_T=BLOCK, num_warps=4)
    _divisor_kernel[(1,)](
        lengths, divisors, sequences, DENOMINATOR=denominator, BLOCK_S=MERGE_BLOCK, num_warps=4
    )
    _token_kernel[(sequences,)](
        values,
        returns,
        old_values,
        cu_seqlens,
        mask,
        lengths,
        divisors,
        grad if want_grad else None,
        partials,
        tokens,
        sequences,
        cliprange,
        scale,
        DIVIDE_BY_LENGTH=divide_by_length,
        BLOCK_T=BLOCK,
        num_warps=4,
    )
    _merge_kernel[(1,)](
        partials, lengths, divisors, loss, metrics, sequences, BLOCK_S=MERGE_BLOCK, num_warps=4
    )
    return loss, metrics, grad
