"""Triton kernels of softmax statistics over blocks of logits: `logprob_from_logits`.

A block is some columns of all rows: the logits that were given, or a float32 chunk of those that
`linear_logprob` multiplies out. `fold` reads a block once, in splits of 4096 columns, and writes
each split's partial statistics; `merge` makes a row's results of them in a fixed order; `pick`
reads the logits of chosen tokens out of a block; `gradient` turns a block into its gradient.
Splits are cut by the vocabulary alone, so a row's bits depend neither on the rows beside it nor on
how the vocabulary was cut into blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._logprob import Rows, Scalars, Stats, empty_stats
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

# The columns of a program: 16 float32 a thread at eight warps. Blocks begin at multiples of it.
SPLIT = 4096
# Columns of a program that writes gradients: with more a thread, ptxas spills for occupancy's sake.
GRADIENT_BLOCK = 2048
# What a split leaves: max, sum e^d, sum e^d d, sum e^2d, the target's logit.
PARTIALS = tl.constexpr(5)
# Tokens that are picked at a time.
BLOCK_IDS = 32
# Elements of what torch.topk works on at a time.
TOPK_ELEMENTS = 64 * 2**20


@triton.jit
def processed(
    x,
    bias,
    vocab_mask,
    column,
    inside,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    ROUND: tl.constexpr,
):
    """(the capped logit of x, whether the token may occur) for columns of the vocabulary."""
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if ROUND:
        x = rounded(x, tl.bfloat16).to(tl.float32)
    if HAS_CAP:
        x = softcapped(x, logit_scale, softcap)
    allowed = inside
    if vocab_mask is not None:
        allowed = inside & (tl.load(vocab_mask + column, mask=inside, other=0) != 0)
    return x, allowed


@triton.jit
def store_partial(partial, row, split, splits, top, total, dot, squares, hit, valid):
    """partial is (rows, PARTIALS, splits), so that merge reads a row straight through."""
    out = partial + row * PARTIALS * splits + split
    tl.store(out, top, mask=valid)
    tl.store(out + splits, total, mask=valid)
    tl.store(out + 2 * splits, dot, mask=valid)
    tl.store(out + 3 * splits, squares, mask=valid)
    tl.store(out + 4 * splits, hit, mask=valid)


@triton.jit
def offset_of(token, first, width):
    """Where a block has the token: 32 bits, which compare faster; -1 where it has not."""
    offset = token - first
    return tl.where((offset >= 0) & (offset < width), offset, -1).to(tl.int32)


@triton.jit(do_not_specialize=["splits"])
def _fold_kernel(
    block,
    bias,
    vocab_mask,
    targets,
    row_temperature,
    partial,
    first,
    width,
    stride,
    splits,
    temperature,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    ROUND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # int64: T * V passes 2^31 at 128 k vocabulary and 16 k tokens
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * SPLIT + tl.arange(0, SPLIT)
    inside = offset < width
    inv = inverse(row_temperature, row, temperature, logit_scale, HAS_CAP)
    x = tl.load(block + row * stride + offset, mask=inside, other=0.0).to(tl.float32)
    x, allowed = processed(
        x, bias, vocab_mask, first + offset, inside, logit_scale, softcap, HAS_CAP, ROUND
    )
    x = tl.where(allowed, x, float("-inf"))
    target = offset_of(tl.load(targets + row), first, width)
    hit = tl.sum(tl.where(offset == target, x, 0.0), 0)
    top = tl.max(x, 0)
    e, d = exp_below(x, finite(top), inv)
    split = first // SPLIT + tl.program_id(1)
    total, dot, squares = tl.sum(e, 0), tl.sum(e * d, 0), tl.sum(e * e, 0)
    store_partial(partial, row, split, splits, top, total, dot, squares, hit, True)


@triton.jit
def _to_logprobs(values, ids, row, count, top, log_sum, inv, ignore_index, BLOCK: tl.constexpr):
    """A row's capped logits become log-probs: 0 where the id is ignore_index; of a top-k, whose ids
    are None, -inf where there is no token."""
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = row * count + k
        logit = tl.load(values + at, mask=k < count, other=0.0)
        value = (logit - top) * inv - log_sum
        if ids is not None:
            token = tl.load(ids + at, mask=k < count, other=0)
            value = tl.where(token == ignore_index, 0.0, value)
        else:
            value = tl.where(logit == float("-inf"), logit, value)
        tl.store(values + at, value, mask=k < count)


@triton.jit(do_not_specialize=["splits", "ids_count", "topk"])
def _merge_kernel(
    partial,
    targets,
    ids,
    row_temperature,
    logprob,
    logsumexp,
    entropy,
    sum_sq_prob,
    is_top1,
    id_logprob,
    topk_values,
    splits,
    ids_count,
    topk,
    vocab_size,
    temperature,
    logit_scale,
    ignore_index,
    HAS_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    inv = inverse(row_temperature, row, temperature, logit_scale, HAS_CAP)
    split = tl.arange(0, SPLITS)
    valid = split < splits
    part = partial + row * PARTIALS * splits + split
    part_top = tl.load(part, mask=valid, other=float("-inf"))
    part_total = tl.load(part + splits, mask=valid, other=0.0)
    part_dot = tl.load(part + 2 * splits, mask=valid, other=0.0)
    part_squares = tl.load(part + 3 * splits, mask=valid, other=0.0)
    hit = tl.sum(tl.load(part + 4 * splits, mask=valid, other=0.0), 0)
    top = tl.max(part_top, 0)
    scale, shift = exp_below(part_top, finite(top), inv)
    total = tl.sum(scale * part_total, 0)
    dot = tl.sum(scale * (part_dot + part_total * shift), 0)
    squares = tl.sum(scale * scale * part_squares, 0)
    log_sum = tl.log(total)
    in_vocab = (target >= 0) & (target < vocab_size)
    value = tl.where(in_vocab, (hit - top) * inv - log_sum, float("nan"))
    tl.store(logprob + row, tl.where(target == ignore_index, 0.0, value))
    tl.store(logsumexp + row, top * inv + log_sum)
    tl.store(entropy + row, log_sum - dot / total)
    tl.store(sum_sq_prob + row, squares / (total * total))
    # a row with a NaN has none
    is_top = in_vocab & (target != ignore_index) & (hit >= top) & (total == total)
    tl.store(is_top1 + row, is_top)
    if ids is not None:
        _to_logprobs(id_logprob, ids, row, ids_count, top, log_sum, inv, ignore_index, BLOCK_IDS)
    _to_logprobs(topk_values, None, row, topk, top, log_sum, inv, ignore_index, BLOCK_IDS)


@triton.jit(do_not_specialize=["count"])
def _pick_kernel(
    block,
    bias,
    vocab_mask,
    ids,
    picked,
    first,
    width,
    stride,
    count,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    """picked (rows, count) takes the capped logits of the ids that lie in the block."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, count, BLOCK_IDS):
        k = start + tl.arange(0, BLOCK_IDS)
        token = tl.load(ids + row * count + k, mask=k < count, other=-1)
        inside = (token >= first) & (token < first + width)
        offset = tl.where(inside, token - first, 0)
        x = tl.load(block + row * stride + offset, mask=inside, other=0.0).to(tl.float32)
        x, allowed = processed(
            x, bias, vocab_mask, token, inside, logit_scale, softcap, HAS_CAP, ROUND
        )
        tl.store(picked + row * count + k, tl.where(allowed, x, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["ids_count"])
def _gradient_kernel(
    grad_logprob,
    grad_logsumexp,
    grad_entropy,
    grad_ids,
    block,
    bias,
    vocab_mask,
    targets,
    ids,
    row_temperature,
    logsumexp,
    entropy,
    d_block,
    first,
    width,
    stride,
    written,
    d_stride,
    ids_count,
    temperature,
    logit_scale,
    softcap,
    ignore_index,
    HAS_CAP: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    """Columns from width to written are padding and get 0; d_block may be block."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    offset = begin + tl.arange(0, BLOCK)
    inside = offset < width
    inv = inverse(row_temperature, row, temperature, logit_scale, HAS_CAP)
    x = tl.load(block + row * stride + offset, mask=inside, other=0.0).to(tl.float32)
    x, allowed = processed(
        x, bias, vocab_mask, first + offset, inside, logit_scale, softcap, HAS_CAP, ROUND
    )
    a = 0.0
    target = tl.load(targets + row)
    if grad_logprob is not None:
        a = tl.where(target == ignore_index, 0.0, tl.load(grad_logprob + row))
    constant, b = gradient_constants(a, grad_logsumexp, grad_entropy, entropy, row)
    if grad_ids is not None:
        for start in range(0, ids_count, BLOCK_IDS):
            k = start + tl.arange(0, BLOCK_IDS)
            token = tl.load(ids + row * ids_count + k, mask=k < ids_count, other=0)
            g = tl.load(grad_ids + row * ids_count + k, mask=k < ids_count, other=0.0)
            constant -= tl.sum(tl.where(token == ignore_index, 0.0, g), 0)
    log_p = clamped(x * inv - tl.load(logsumexp + row))
    d = tl.exp(log_p) * (constant - b * log_p)
    d += tl.where(offset == offset_of(target, first, width), a, 0.0)
    if grad_ids is not None:
        for k in range(ids_count):
            token = tl.load(ids + row * ids_count + k)
            at = offset_of(token, first, width)
            # most ids lie elsewhere
            if (at >= begin) & (at < begin + BLOCK) & (token != ignore_index):
                d += tl.where(offset == at, tl.load(grad_ids + row * ids_count + k), 0.0)
    d = d * inv
    if HAS_CAP:
        d = d * softcap_slope(x, logit_scale, softcap)
    d = rounded(tl.where(allowed, d, 0.0), d_block.dtype.element_ty)
    tl.store(d_block + row * d_stride + offset, d, mask=offset < written)


def new_partial(like: Tensor, rows: int, vocab_size: int) -> Tensor:
    """What `fold` fills: the splits of every block that begins at a multiple of SPLIT."""
    return like.new_empty(
        (rows, PARTIALS.value, triton.cdiv(vocab_size, SPLIT)), dtype=torch.float32
    )


def fold(
    block: Tensor, first: int, bias: Tensor | None, rows: Rows, scalars: Scalars, partial: Tensor
) -> None:
    """block holds the columns from `first`, a multiple of SPLIT, of the rows."""
    if block.numel() == 0:
        return
    _fold_kernel[(block.shape[0], triton.cdiv(block.shape[1], SPLIT))](
        block,
        bias,
        rows.vocab_mask,
        rows.targets,
        rows.row_temperature,
        partial,
        first,
        block.shape[1],
        block.stride(0),
        partial.shape[2],
        scalars.temperature,
        scalars.logit_scale,
        scalars.softcap,
        HAS_CAP=scalars.softcap > 0,
        ROUND=scalars.round_logits,
        SPLIT=SPLIT,
        num_warps=8,
    )


def merge(partial: Tensor, rows: Rows, scalars: Scalars, stats: Stats) -> None:
    """Fills stats; id_logprob and topk_values hold capped logits before and log-probs after."""
    count, _, splits = partial.shape
    if count == 0:
        return
    _merge_kernel[(count,)](
        partial,
        rows.targets,
        rows.ids,
        rows.row_temperature,
        *stats[:7],
        splits,
        stats.id_logprob.shape[1],
        stats.topk_values.shape[1],
        scalars.vocab_size,
        scalars.temperature,
        scalars.logit_scale,
        scalars.ignore_index,
        HAS_CAP=scalars.softcap > 0,
        SPLITS=triton.next_power_of_2(max(splits, 1)),
        BLOCK_IDS=BLOCK_IDS,
        num_warps=1,
    )


def pick(
    block: Tensor,
    first: int,
    ids: Tensor,
    bias: Tensor | None,
    rows: Rows,
    scalars: Scalars,
    picked: Tensor,
) -> None:
    """Capped logits of (rows, K) ids, -inf where masked; others than the block's stay."""
    if ids.numel() == 0 or block.shape[1] == 0:
        return
    _pick_kernel[(block.shape[0],)](
        block,
        bias,
        rows.vocab_mask,
        ids,
        picked,
        first,
        block.shape[1],
        block.stride(0),
        ids.shape[1],
        scalars.logit_scale,
        scalars.softcap,
        HAS_CAP=scalars.softcap > 0,
        ROUND=scalars.round_logits,
        BLOCK_IDS=BLOCK_IDS,
        num_warps=1,
    )


def top(
    block: Tensor, first: int, bias: Tensor | None, rows: Rows, scalars: Scalars, topk: int
) -> tuple[Tensor, Tensor]:
    """(capped logits, ids) of the block's topk largest, or of all where it has fewer.

    Scale, soft cap and temperature keep the order: torch.topk sees the logits before them.
    """
    columns = slice(first, first + block.shape[1])
    topk = min(topk, block.shape[1])
    ids = rows.targets.new_empty((block.shape[0], topk))
    step = max(1, TOPK_ELEMENTS // max(1, block.shape[1]))
    for begin in range(0, block.shape[0], step):
        part = block[begin : begin + step]
        if bias is not None:
            part = part.float() + bias[columns]
        if scalars.round_logits:
            part = part.bfloat16()
        if rows.vocab_mask is not None:
            part = part.masked_fill(~rows.vocab_mask[columns], float("-inf"))
        ids[begin : begin + step] = part.topk(topk).indices + first
    values = block.new_empty(ids.shape, dtype=torch.float32)
    pick(block, first, ids, bias, rows, scalars, values)
    return values, ids


def without_masked(values: Tensor, ids: Tensor) -> Tensor:
    """The ids, -1 where there was no token left."""
    return ids.masked_fill(values == float("-inf"), -1)


def gradient(
    grads: tuple[Tensor | None, ...],
    block: Tensor,
    first: int,
    bias: Tensor | None,
    rows: Rows,
    logsumexp: Tensor,
    entropy: Tensor,
    scalars: Scalars,
    d_block: Tensor,
) -> None:
    """grads: of logprob, logsumexp, entropy and the log-probs at ids.

    d_block has the rows of block and at least its columns; it may be the same memory.
    """
    if d_block.numel() == 0:
        return
    _gradient_kernel[(block.shape[0], triton.cdiv(d_block.shape[1], GRADIENT_BLOCK))](
        *grads,
        block,
        bias,
        rows.vocab_mask,
        rows.targets,
        rows.ids,
        rows.row_temperature,
        logsumexp,
        entropy,
        d_block,
        first,
        block.shape[1],
        block.stride(0),
        d_block.shape[1],
        d_block.stride(0),
        0 if grads[3] is None else rows.ids.shape[1],
        scalars.temperature,
        scalars.logit_scale,
        scalars.softcap,
        scalars.ignore_index,
        HAS_CAP=scalars.softcap > 0,
        ROUND=scalars.round_logits,
        BLOCK=GRADIENT_BLOCK,
        BLOCK_IDS=BLOCK_IDS,
        num_warps=8,
    )


def forward(logits: Tensor, *rest: object) -> tuple[Tensor, ...]:
    """rest: *Rows, *Scalars, topk."""
    rows, scalars, topk = Rows(*rest[:4]), Scalars(*rest[4:10]), rest[10]
    count, block = logits.shape[0], logits[:, : scalars.vocab_size]
    stats = empty_stats(logits, count, rows.ids, topk)
    partial = new_partial(logits, count, scalars.vocab_size)
    fold(block, 0, None, rows, scalars, partial)
    if rows.ids is not None:
        stats.id_logprob.fill_(float("nan"))
        pick(block, 0, rows.ids, None, rows, scalars, stats.id_logprob)
    if topk:
        values, ids = top(block, 0, None, rows, scalars, topk)
        stats.topk_values.copy_(values)
        stats.topk_ids.copy_(without_masked(values, ids))
    merge(partial, rows, scalars, stats)
    return tuple(stats)


def backward(*args: object) -> Tensor:
    """args: gradients of logprob, logsumexp, entropy and id_logprob, logits, *Rows, logsumexp,
    entropy, *Scalars."""
    grad = args[4].new_empty(args[4].shape)
    _gradient_into(grad, *args)
    return grad


def backward_inplace(*args: object) -> None:
    """The same, written over the logits."""
    _gradient_into(args[4], *args)


def _gradient_into(out: Tensor, *args: object) -> None:
    grads, logits, rows, (lse, entropy) = args[:4], args[4], Rows(*args[5:9]), args[9:11]
    scalars = Scalars(*args[11:])
    block = logits[:, : scalars.vocab_size]
    gradient(grads, block, 0, None, rows, lse, entropy, scalars, out)
