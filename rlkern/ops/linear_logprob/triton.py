"""Triton kernels of `linear_logprob`, and the two ways to its statistics.

In chunks: torch's matmul writes the logits of some vocabulary entries in float32 into a buffer,
which the kernels of `logprob_from_logits` fold into statistics, chunk after chunk. Fused: a program
owns a block of tokens and a stretch of the vocabulary, and folds each tile of logits where it was
multiplied out; no logit is stored. The backward recomputes the logits in chunks and stores them
as their gradient, which feeds the two remaining products: four matmuls in all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._logprob import Rows, Scalars, Stats, empty_stats
from rlkern.ops._triton import INTERPRETED, exp_below, finite, inverse
from rlkern.ops.logprob_from_logits.triton import (
    PARTIALS,
    SPLIT,
    fold,
    gradient,
    merge,
    new_partial,
    offset_of,
    pick,
    processed,
    store_partial,
    top,
    without_masked,
)

# T, V and bytes of H of a tile, warps and stages. Rows that start and end at multiples of 16
# elements are copied asynchronously: operand tiles three deep in flight (72 KiB; sm_120 has 99 KiB
# a block), and 64 x 128 accumulators over eight warps leave registers for the softmax on every
# architecture. Other rows are loaded element by element through registers, which a small tile
# leaves free.
ALIGNED = (64, 128, 128, 8, 3)
UNALIGNED = (32, 64, 64, 4, 1)
# Logits in the buffer at a time: 256 MiB, and their gradients in 16 bits half as much.
CHUNK_ELEMENTS = 64 * 2**20
# Stretches of the vocabulary in the fused kernel.
FUSED_SPLIT = 8192
FUSED_MAX_SPLITS = 16
# (compute capability, T, H, V), the sizes rounded up to powers of two, where the fused kernel was
# measured faster than chunks. No measurement on a GPU has been made.
FUSED_FASTER: frozenset[tuple[tuple[int, int], int, int, int]] = frozenset()


@triton.jit
def _logits_tile(
    hidden,
    weight,
    row,
    column,
    rows,
    width,
    depth,
    stride_hidden,
    stride_weight,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """hidden[row] @ weight[column]^T in float32."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    # int64: V * H and T * H pass 2^31
    hidden_rows = hidden + row.to(tl.int64)[:, None] * stride_hidden
    weight_rows = weight + column.to(tl.int64)[None, :] * stride_weight
    for start in range(0, depth, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        a = tl.load(
            hidden_rows + k[None, :],
            mask=(row < rows)[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight_rows + k[:, None],
            mask=(column < width)[None, :] & (k < depth)[:, None],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


# not recompiled, and the same bits, for another number of rows
@triton.jit(do_not_specialize=["rows"])
def _logits_kernel(
    hidden,
    weight,
    logits,
    rows,
    width,
    depth,
    stride_hidden,
    stride_weight,
    stride_logits,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits_tile(
        hidden,
        weight,
        row,
        column,
        rows,
        width,
        depth,
        stride_hidden,
        stride_weight,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        WIDEN,
    )
    out = logits + row.to(tl.int64)[:, None] * stride_logits + column[None, :]
    tl.store(out, x, mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def _fused_kernel(
    hidden,
    weight,
    bias,
    vocab_mask,
    targets,
    row_temperature,
    partial,
    rows,
    vocab,
    depth,
    stride_hidden,
    stride_weight,
    split_size,
    splits,
    temperature,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    valid = row < rows
    # the last block reads row 0 where it has no row of its own
    known = tl.where(valid, row, 0)
    target = offset_of(tl.load(targets + known), 0, vocab)
    inv = tl.zeros((BLOCK_T,), tl.float32)
    inv += inverse(row_temperature, known, temperature, logit_scale, HAS_CAP)
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    dot = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    hit = tl.zeros((BLOCK_T,), tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, vocab), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = _logits_tile(
            hidden,
            weight,
            row,
            column,
            rows,
            vocab,
            depth,
            stride_hidden,
            stride_weight,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            WIDEN,
        )
        inside = (column < vocab)[None, :]
        x, allowed = processed(
            x,
            bias,
            vocab_mask,
            column[None, :],
            inside,
            logit_scale,
            softcap,
            HAS_CAP,
            ROUND,
        )
        x = tl.where(allowed, x, float("-inf"))
        hit += tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
        higher = tl.maximum(highest, tl.max(x, 1))
        anchor = finite(higher)
        scale, shift = exp_below(highest, anchor, inv)
        e, d = exp_below(x, anchor[:, None], inv[:, None])
        dot = scale * (dot + total * shift) + tl.sum(e * d, 1)
        total = scale * total + tl.sum(e, 1)
        squares = scale * scale * squares + tl.sum(e * e, 1)
        highest = higher
    store_partial(
        partial, row.to(tl.int64), split, splits, highest, total, dot, squares, hit, valid
    )


class Head(NamedTuple):
    """hidden @ weight^T + bias, and how its logits are multiplied out."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch_invariant: bool
    chunk_size: int  # 0: chosen here


class Chunk(NamedTuple):
    """Some rows' logits of some vocabulary entries."""

    rows: slice
    first: int
    logits: Tensor
    """float32, without bias; overwritten by the next one"""


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> tuple:
    """rest: *Rows, *Scalars, topk, batch_invariant, chunk_size."""
    rows, scalars, topk = Rows(*rest[:4]), Scalars(*rest[4:10]), rest[10]
    head = Head(hidden, weight, bias, *rest[11:])
    stats = empty_stats(hidden, hidden.shape[0], rows.ids, topk)
    if _path(head, rows, scalars, topk) == "fused":
        partial = _fused_partial(head, rows, scalars)
    else:
        partial = _partial_of(_chunks(head, scalars), head, rows, scalars, topk, stats)
    merge(partial, rows, scalars, stats)
    return tuple(stats)


def backward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    """args: gradients of logprob, logsumexp, entropy and id_logprob, hidden, weight, bias, *Rows,
    logsumexp, entropy, *Scalars, batch_invariant, chunk_size, need_hidden, need_weight, need_bias.

    Every row takes part: to drop those without a gradient, their number would have to be known
    on the host.
    """
    return backward_kept(*args[:-3], None, None, *args[-3:])


def backward_kept(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    """backward with `kept, weight_sum` before the needs: the logits of forward_keep, or None; the
    others are multiplied out again. And where to add the weight's gradient, or None."""
    *args, kept, weight_sum, need_hidden, need_weight, need_bias = args
    grads, (hidden, weight, bias), rows = args[:4], args[4:7], Rows(*args[7:11])
    logsumexp, entropy, scalars = *args[11:13], Scalars(*args[13:19])
    head = Head(hidden, weight, bias, *args[19:21])
    (count, depth), vocab = hidden.shape, weight.shape[0]
    need_weight = need_weight and weight_sum is None

    def zeros(*shape: int) -> Tensor:
        return hidden.new_zeros(shape, dtype=torch.float32)

    d_hidden = zeros(count if need_hidden else 0, depth)
    # the padding of the vocabulary gets 0
    grad_weight = weight.new_zeros((vocab if need_weight else 0, depth))
    grad_bias = weight.new_zeros((vocab if need_bias else 0,))
    known = None
    if kept is not None and kept.numel() > 0:
        kept = kept.view(count, -1)
        known = kept[:, : min(kept.shape[1], scalars.vocab_size)]
    in_place = hidden.dtype == torch.float32
    rounded = hidden.new_empty((0,))
    for part, first, logits in _chunks(head, scalars, known, multiplied_out=True):
        if rounded.numel() < logits.shape[0] * _padded(logits.shape[1]) and not in_place:
            rounded = hidden.new_empty((logits.shape[0] * _padded(logits.shape[1]),))
        columns = slice(first, first + logits.shape[1])
        d_logits = logits if in_place else _block(rounded, logits.shape)
        gradient(
            tuple(None if g is None else g[part] for g in grads),
            logits,
            first,
            bias,
            _of(rows, part),
            logsumexp[part],
            entropy[part],
            scalars,
            d_logits,
        )
        if part.start == 0:
            d_weight = zeros(logits.shape[1] if need_weight else 0, depth)
            d_bias = zeros(logits.shape[1] if need_bias else 0)
        if need_hidden:
            d_hidden[part] += matmul_fp32(d_logits, weight[columns])
        if weight_sum is not None:
            weight_sum[columns] += matmul_fp32(d_logits.T, hidden[part])
        if need_weight:
            d_weight += matmul_fp32(d_logits.T, hidden[part])
        if need_bias:
            d_bias += d_logits.sum(0, dtype=torch.float32)
        if part.stop >= count:
            grad_weight[columns] = d_weight
            grad_bias[columns] = d_bias
    return d_hidden.to(hidden.dtype), grad_weight, grad_bias


def forward_keep(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> tuple:
    """rest: forward's, then keep_bytes. Keeps the logits of the first columns, without bias: all of
    them, or as many whole chunks of the statistics as keep_bytes hold."""
    rows, scalars, topk = Rows(*rest[:4]), Scalars(*rest[4:10]), rest[10]
    head = Head(hidden, weight, bias, *rest[11:13])
    stats = empty_stats(hidden, hidden.shape[0], rows.ids, topk)
    count, columns = hidden.shape[0], rest[13] // 4 // max(1, hidden.shape[0])
    columns = columns // SPLIT * SPLIT if columns < scalars.vocab_size else scalars.vocab_size
    kept = hidden.new_empty((count * _padded(columns) if columns else 0,), dtype=torch.float32)
    chunks = _chunks(head, scalars, _block(kept, (count, columns)) if columns else None)
    merge(_partial_of(chunks, head, rows, scalars, topk, stats), rows, scalars, stats)
    return (*stats, kept)


def _path(head: Head, rows: Rows, scalars: Scalars, topk: int) -> str:
    """Which way to the statistics: "chunks" or "fused".

    A chunk_size under the smallest chunk, SPLIT, asks for no buffer at all. The fused kernel has
    neither ids nor top-k, and sums in another order than chunks, whose bits a batch-invariant call
    keeps for every chunk_size.
    """
    if topk or rows.ids is not None or head.batch_invariant:
        return "chunks"
    if head.chunk_size:
        return "fused" if head.chunk_size < SPLIT else "chunks"
    sizes = (*head.hidden.shape, scalars.vocab_size)
    shape = tuple(triton.next_power_of_2(size) for size in sizes)
    device = head.hidden.device
    capability = torch.cuda.get_device_capability(device) if head.hidden.is_cuda else (0, 0)
    return "fused" if (capability, *shape) in FUSED_FASTER else "chunks"


def _partial_of(
    chunks: Iterator[Chunk], head: Head, rows: Rows, scalars: Scalars, topk: int, stats: Stats
) -> Tensor:
    """Folds all chunks; fills the parts of stats that hold logits of ids and the top-k."""
    partial = new_partial(head.hidden, head.hidden.shape[0], scalars.vocab_size)
    stats.id_logprob.fill_(float("nan"))
    # a full top-k of nothing, which every token is above
    stats.topk_values.fill_(float("-inf"))
    stats.topk_ids.fill_(-1)
    for part, first, logits in chunks:
        mine = _of(rows, part)
        fold(logits, first, head.bias, mine, scalars, partial[part])
        if rows.ids is not None:
            pick(logits, first, mine.ids, head.bias, mine, scalars, stats.id_logprob[part])
        if topk:
            values, ids = top(logits, first, head.bias, mine, scalars, topk)
            values = torch.cat([stats.topk_values[part], values], 1)
            ids = torch.cat([stats.topk_ids[part], ids], 1)
            stats.topk_values[part], best = values.topk(topk)
            stats.topk_ids[part] = without_masked(stats.topk_values[part], ids.gather(1, best))
    return partial


def _fused_partial(head: Head, rows: Rows, scalars: Scalars) -> Tensor:
    hidden, weight = head.hidden, head.weight
    (count, depth), vocab = hidden.shape, scalars.vocab_size
    tile = _tile(hidden, weight)
    splits = max(1, min(FUSED_MAX_SPLITS, triton.cdiv(vocab, FUSED_SPLIT)))
    split_size = triton.cdiv(triton.cdiv(vocab, splits), tile["BLOCK_V"]) * tile["BLOCK_V"]
    partial = hidden.new_empty((count, PARTIALS.value, splits), dtype=torch.float32)
    if count == 0:
        return partial
    _fused_kernel[(triton.cdiv(count, tile["BLOCK_T"]), splits)](
        hidden,
        weight,
        head.bias,
        rows.vocab_mask,
        rows.targets,
        rows.row_temperature,
        partial,
        count,
        vocab,
        depth,
        hidden.stride(0),
        weight.stride(0),
        split_size,
        splits,
        scalars.temperature,
        scalars.logit_scale,
        scalars.softcap,
        HAS_CAP=scalars.softcap > 0,
        ROUND=scalars.round_logits,
        **tile,
    )
    return partial


def _chunks(
    head: Head, scalars: Scalars, kept: Tensor | None = None, multiplied_out: bool = False
) -> Iterator[Chunk]:
    """The logits by vocabulary, then by rows: those of the first columns in `kept`, where they may
    have been multiplied out before, the others each in the same buffer."""
    hidden, weight, vocab = head.hidden, head.weight, scalars.vocab_size
    tokens, done = hidden.shape[0], 0 if kept is None else kept.shape[1]
    count, width = _buffer_shape(head, vocab)
    rows = [slice(begin, begin + count) for begin in range(0, tokens, max(1, count))]
    if done and not multiplied_out:
        if tokens:
            multiply(hidden, weight[:done], kept, head.batch_invariant)
            yield Chunk(slice(0, tokens), 0, kept)
    else:
        # what is made of one chunk is in the way of the next: none is larger for being kept
        for first in range(0, done, width):
            for part in rows:
                yield Chunk(part, first, kept[part, first : first + width])
    if done == vocab:
        return
    buffer = hidden.new_empty((count * width,), dtype=torch.float32)
    for first in range(done, vocab, width):
        entries = weight[first : min(first + width, vocab)]
        for part in rows:
            mine = hidden[part]
            logits = _block(buffer, (mine.shape[0], entries.shape[0]))
            multiply(mine, entries, logits, head.batch_invariant)
            yield Chunk(part, first, logits)


def _buffer_shape(head: Head, vocab: int) -> tuple[int, int]:
    """Of one chunk's logits: a multiple of SPLIT columns, or the whole vocabulary; as many rows as
    fit."""
    count = head.hidden.shape[0]
    wanted = head.chunk_size or CHUNK_ELEMENTS // max(1, count)
    width = min(max(1, wanted // SPLIT) * SPLIT, _padded(vocab))
    return min(count, CHUNK_ELEMENTS // width), width


def _padded(columns: int) -> int:
    """Rows begin at multiples of 16 elements, for wide loads and the same layout everywhere."""
    return triton.cdiv(max(1, columns), 16) * 16


def _block(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    width = _padded(shape[1])
    return buffer[: shape[0] * width].view(shape[0], width)[:, : shape[1]]


def _of(rows: Rows, part: slice) -> Rows:
    """vocab_mask is every row's."""
    cut = (None if value is None else value[part] for value in rows)
    return Rows(*cut)._replace(vocab_mask=rows.vocab_mask)


def multiply(hidden: Tensor, weight: Tensor, out: Tensor, batch_invariant: bool) -> None:
    """out = hidden @ weight^T, the float32 accumulator kept.

    Our own kernel has tiles and an order of sums that nothing changes, and IEEE products: it also
    serves float32 where torch is set to round operands to TF32.
    """
    tf32 = hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if not (batch_invariant or tf32):
        if hidden.is_cuda and hidden.dtype != torch.float32:
            torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
        else:
            torch.mm(hidden.float(), weight.float().T, out=out)
        return
    tile = _tile(hidden, weight)
    grid = triton.cdiv(out.shape[0], tile["BLOCK_T"]), triton.cdiv(out.shape[1], tile["BLOCK_V"])
    _logits_kernel[grid](
        hidden,
        weight,
        out,
        *out.shape,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        out.stride(0),
        **tile,
    )


def _tile(hidden: Tensor, weight: Tensor) -> dict[str, int]:
    size = hidden.element_size()
    aligned = hidden.shape[1] % 16 == 0 and all(
        t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (hidden, weight)
    )
    block_t, block_v, depth_bytes, warps, stages = ALIGNED if aligned else UNALIGNED
    return {
        "BLOCK_T": block_t,
        "BLOCK_V": block_v,
        "BLOCK_H": depth_bytes // size,
        "WIDEN": INTERPRETED,
        "num_warps": warps,
        "num_stages": stages,
    }


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the float32 accumulator kept; torch has that for 16-bit inputs on CUDA only."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
