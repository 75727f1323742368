"""Triton kernels of `sparse_linear_logprob`: a program a token, over its kept rows in blocks.

The reads of those rows are what it costs: products and sums run on the ordinary float32 units.
Gradients: one number per slot of kept_ids, from the logits that the forward kept; then the hidden
states by token, and the weight by token id, from the slots sorted by id. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import (
    clamped,
    exp_below,
    finite,
    gradient_constants,
    inverse,
    rounded,
    softcap_slope,
    softcapped,
)

# Slots and columns of a tile, and warps: 64 float32 sums a thread, 512 bytes of each 16-bit row.
# Rows that do not start at multiples of 16 elements are read element by element, each with an
# address of its own in a register, which a small tile leaves free.
ALIGNED = (32, 256, 4)
UNALIGNED = (16, 64, 4)
# Slots of a token's statistics at a time where no weight is read.
BLOCK_SLOTS = 128


@triton.jit
def _range(kept_offsets, row, slots):
    """The slots of a row, in [0, N] whatever kept_offsets holds."""
    begin = tl.load(kept_offsets + row)
    end = tl.load(kept_offsets + row + 1)
    return tl.minimum(tl.maximum(begin, 0), slots), tl.minimum(tl.maximum(end, 0), slots)


@triton.jit
def _kept(kept_ids, slot, end, vocab):
    """The ids of the slots, and which of them count."""
    ids = tl.load(kept_ids + slot, mask=slot < end, other=-1).to(tl.int64)
    return ids, (ids >= 0) & (ids < vocab)


# A slice of the hidden states must not choose another layout, and so another order of the sums.
@triton.jit(do_not_specialize_on_alignment=["hidden"])
def _forward_kernel(
    hidden,
    weight,
    bias,
    targets,
    kept_ids,
    kept_offsets,
    row_temperature,
    logprob,
    logsumexp,
    entropy,
    sum_sq_prob,
    is_top1,
    logits,
    target_slot,
    vocab,
    depth,
    slots,
    stride_hidden,
    stride_weight,
    temperature,
    logit_scale,
    softcap,
    ignore_index,
    HAS_CAP: tl.constexpr,
    ROUND: tl.constexpr,
    WANT_LOGITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range(kept_offsets, row, slots)
    target = tl.load(targets + row)
    inv = inverse(row_temperature, row, temperature, logit_scale, HAS_CAP)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    dot = tl.zeros((), tl.float32)
    squares = tl.zeros((), tl.float32)
    target_logit = tl.zeros((), tl.float32)
    hit = tl.full((), -1, tl.int64)
    number = tl.zeros((), tl.int32)
    token = hidden + row * stride_hidden
    for start in range(begin, end, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        ids, counts = _kept(kept_ids, slot, end, vocab)
        kept_rows = weight + tl.where(counts, ids, 0)[:, None] * stride_weight
        acc = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
        for first in range(0, depth, BLOCK_H):
            k = first + tl.arange(0, BLOCK_H)
            h = tl.load(token + k, mask=k < depth, other=0.0).to(tl.float32)
            inside = counts[:, None] & (k < depth)[None, :]
            w = tl.load(kept_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            acc += w * h[None, :]
        x = tl.sum(acc, 1)
        if bias is not None:
            x += tl.load(bias + ids, mask=counts, other=0.0).to(tl.float32)
        if ROUND:
            x = rounded(x, tl.bfloat16).to(tl.float32)
        x = tl.where(counts, x, float("-inf"))
        if WANT_LOGITS:
            tl.store(logits + slot, x, mask=slot < end)
        if HAS_CAP:
            x = tl.where(counts, softcapped(x, logit_scale, softcap), float("-inf"))
        # the first slot that holds the target; N is past the last
        match = tl.min(tl.where(counts & (ids == target), slot, slots), 0)
        is_first = (match < slots) & (hit < 0)
        here = tl.sum(tl.where(slot == match, x, 0.0), 0)
        target_logit = tl.where(is_first, here, target_logit)
        hit = tl.where(is_first, match, hit)
        number += tl.sum(counts.to(tl.int32), 0)
        new_top = tl.maximum(top, tl.max(x, 0))
        anchor = finite(new_top)
        scale, shift = exp_below(top, anchor, inv)
        e, d = exp_below(x, anchor, inv)
        e = tl.where(counts, e, 0.0)
        dot = scale * (dot + total * shift) + tl.sum(e * d, 0)
        total = scale * total + tl.sum(e, 0)
        squares = scale * scale * squares + tl.sum(e * e, 0)
        top = new_top
    log_sum = tl.log(total)
    value = (target_logit - top) * inv - log_sum
    in_vocab = (target >= 0) & (target < vocab)
    other = tl.where(in_vocab & (number > 0), float("-inf"), float("nan"))
    value = tl.where(hit >= 0, value, other)
    ignored = target == ignore_index
    tl.store(logprob + row, tl.where(ignored, 0.0, value))
    # a NaN equals nothing
    is_first = (hit >= 0) & (target_logit >= top) & (value == value) & (target != ignore_index)
    tl.store(is_top1 + row, is_first)
    tl.store(logsumexp + row, tl.where(number > 0, top * inv + log_sum, float("-inf")))
    tl.store(entropy + row, tl.where(number > 0, log_sum - dot / total, 0.0))
    tl.store(sum_sq_prob + row, tl.where(number > 0, squares / (total * total), 0.0))
    if WANT_LOGITS:
        tl.store(target_slot + row, tl.where(ignored, -1, hit))


@triton.jit
def _slot_gradient_kernel(
    grad_logprob,
    grad_logsumexp,
    grad_entropy,
    kept_ids,
    kept_offsets,
    logits,
    target_slot,
    logsumexp,
    entropy,
    row_temperature,
    d,
    key,
    row_of,
    vocab,
    slots,
    temperature,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    WANT_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dx of every slot of a row; its id and row for the sort, where that is needed."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range(kept_offsets, row, slots)
    hit = tl.load(target_slot + row)
    inv = inverse(row_temperature, row, temperature, logit_scale, HAS_CAP)
    a = 0.0
    if grad_logprob is not None:
        # a log-prob of a target that was not kept is a constant
        a = tl.where(hit >= 0, tl.load(grad_logprob + row), 0.0)
    constant, b = gradient_constants(a, grad_logsumexp, grad_entropy, entropy, row)
    lse = tl.load(logsumexp + row)
    for start in range(begin, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        ids, counts = _kept(kept_ids, slot, end, vocab)
        x = tl.load(logits + slot, mask=counts, other=float("-inf"))
        y = x
        if HAS_CAP:
            y = softcapped(x, logit_scale, softcap)
        log_p = clamped(y * inv - lse)
        # a logit of -inf has p = 0, also in a row that has no other
        value = tl.where(x == float("-inf"), 0.0, tl.exp(log_p) * (constant - b * log_p))
        value = (value + tl.where(slot == hit, a, 0.0)) * inv
        if HAS_CAP:
            value *= softcap_slope(y, logit_scale, softcap)
        tl.store(d + slot, tl.where(counts, value, 0.0), mask=slot < end)
        if WANT_KEY:
            tl.store(key + slot, tl.where(counts, ids, vocab), mask=slot < end)
            tl.store(row_of + slot, tl.zeros_like(ids) + row, mask=slot < end)


@triton.jit
def _hidden_gradient_kernel(
    weight,
    kept_ids,
    kept_offsets,
    d,
    grad_hidden,
    vocab,
    depth,
    slots,
    stride_weight,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range(kept_offsets, row, slots)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for start in range(begin, end, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        ids, counts = _kept(kept_ids, slot, end, vocab)
        scale = tl.load(d + slot, mask=counts, other=0.0)
        kept_rows = weight + tl.where(counts, ids, 0)[:, None] * stride_weight
        inside = counts[:, None] & (k < depth)[None, :]
        acc += scale[:, None] * tl.load(kept_rows + k[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    total = tl.sum(acc, 0).to(grad_hidden.dtype.element_ty)
    tl.store(grad_hidden + row * depth + k, total, mask=k < depth)


@triton.jit(do_not_specialize_on_alignment=["hidden"])
def _weight_gradient_kernel(
    hidden,
    d,
    order,
    row_of,
    starts,
    grad_weight,
    depth,
    stride_hidden,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token id: the slots that hold it, in their order; zeros where there are none."""
    token_id = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + token_id)
    end = tl.load(starts + token_id + 1)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for start in range(begin, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        slot = tl.load(order + at, mask=at < end, other=0)
        scale = tl.load(d + slot, mask=at < end, other=0.0)
        row = tl.load(row_of + slot, mask=at < end, other=0)
        inside = (at < end)[:, None] & (k < depth)[None, :]
        h = tl.load(hidden + row[:, None] * stride_hidden + k[None, :], mask=inside, other=0.0)
        acc += scale[:, None] * h.to(tl.float32)
    total = tl.sum(acc, 0).to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + token_id * depth + k, total, mask=k < depth)


@triton.jit
def _bias_gradient_kernel(d, order, starts, grad_bias, BLOCK: tl.constexpr):
    """One token id: the sum of d over the slots that hold it."""
    token_id = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + token_id)
    end = tl.load(starts + token_id + 1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        slot = tl.load(order + at, mask=at < end, other=0)
        acc += tl.load(d + slot, mask=at < end, other=0.0)
    tl.store(grad_bias + token_id, tl.sum(acc, 0).to(grad_bias.dtype.element_ty))


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    round_logits: bool,
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, depth), slots = hidden.shape, kept_ids.shape[0]
    logprob = hidden.new_empty((rows,), dtype=torch.float32)
    logsumexp = hidden.new_empty((rows,), dtype=torch.float32)
    entropy = hidden.new_empty((rows,), dtype=torch.float32)
    sum_sq_prob = hidden.new_empty((rows,), dtype=torch.float32)
    is_top1 = hidden.new_empty((rows,), dtype=torch.bool)
    logits = hidden.new_empty((slots if want_logits else 0,), dtype=torch.float32)
    target_slot = targets.new_empty((rows if want_logits else 0,), dtype=torch.int64)
    if rows:
        _forward_kernel[(rows,)](
            hidden,
            weight,
            bias,
            targets,
            kept_ids,
            kept_offsets,
            row_temperature,
            logprob,
            logsumexp,
            entropy,
            sum_sq_prob,
            is_top1,
            logits,
            target_slot,
            weight.shape[0],
            depth,
            slots,
            hidden.stride(0),
            weight.stride(0),
            temperature,
            logit_scale,
            softcap,
            ignore_index,
            HAS_CAP=softcap > 0,
            ROUND=round_logits,
            WANT_LOGITS=want_logits,
            **_tile(weight),
        )
    return logprob, logsumexp, entropy, sum_sq_prob, is_top1, logits, target_slot


def backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    logits: Tensor,
    target_slot: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, depth), vocab, slots = hidden.shape, weight.shape[0], kept_ids.shape[0]
    grad_hidden = hidden.new_empty((rows if need_hidden else 0, depth))
    grad_weight = weight.new_empty((vocab if need_weight else 0, depth))
    grad_bias = weight.new_empty((vocab if need_bias else 0,))
    if slots == 0 or rows == 0:
        return grad_hidden.zero_(), grad_weight.zero_(), grad_bias.zero_()
    by_id = need_weight or need_bias
    d = hidden.new_empty((slots,), dtype=torch.float32)
    # slots of no row sort behind the last id
    key = torch.full((slots if by_id else 0,), vocab, device=hidden.device)
    row_of = torch.empty_like(key)
    _slot_gradient_kernel[(rows,)](
        grad_logprob,
        grad_logsumexp,
        grad_entropy,
        kept_ids,
        kept_offsets,
        logits,
        target_slot,
        logsumexp,
        entropy,
        row_temperature,
        d,
        key,
        row_of,
        vocab,
        slots,
        temperature,
        logit_scale,
        softcap,
        HAS_CAP=softcap > 0,
        WANT_KEY=by_id,
        BLOCK=BLOCK_SLOTS,
        num_warps=1,
    )
    if need_hidden and depth:
        tile = _tile(weight)
        _hidden_gradient_kernel[(rows, triton.cdiv(depth, tile["BLOCK_H"]))](
            weight,
            kept_ids,
            kept_offsets,
            d,
            grad_hidden,
            vocab,
            depth,
            slots,
            weight.stride(0),
            **tile,
        )
    if by_id and vocab:
        in_order, order = torch.sort(key, stable=True)
        starts = torch.searchsorted(in_order, torch.arange(vocab + 1, device=key.device))
    if need_weight and vocab and depth:
        tile = _tile(hidden)
        _weight_gradient_kernel[(vocab, triton.cdiv(depth, tile["BLOCK_H"]))](
            hidden,
            d,
            order,
            row_of,
            starts,
            grad_weight,
            depth,
            hidden.stride(0),
            **tile,
        )
    if need_bias and vocab:
        _bias_gradient_kernel[(vocab,)](d, order, starts, grad_bias, BLOCK=BLOCK_SLOTS, num_warps=1)
    return grad_hidden, grad_weight, grad_bias


def _tile(matrix: Tensor) -> dict[str, int]:
    """By the matrix whose rows are gathered; a part of its rows has the same tile."""
    aligned = matrix.shape[1] % 16 == 0 and matrix.stride(0) % 16 == 0
    block_k, block_h, warps = ALIGNED if aligned else UNALIGNED
    return {"BLOCK_K": block_k, "BLOCK_H": block_h, "num_warps": warps}
