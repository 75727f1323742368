"""Triton kernels of `linear_logprob`.

Forward: a program owns a block of tokens and a stretch of the vocabulary, and folds each tile of
logits into running statistics; a second kernel merges the stretches in order. No logit is stored.
Backward: logits are recomputed a chunk of the vocabulary at a time and stored as their gradient,
which feeds the two remaining products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import INTERPRETED, inverse, softcap_slope, softcapped

# T, V and bytes of H of a tile, warps and stages. Rows that start and end at multiples of 16
# elements are copied asynchronously: operand tiles three deep in flight (72 KiB; sm_120 has 99 KiB
# a block), and 64 x 128 accumulators over eight warps leave registers for the softmax on every
# architecture. Other rows are loaded element by element through registers, which a small tile
# leaves free.
ALIGNED = (64, 128, 128, 8, 3)
UNALIGNED = (32, 64, 64, 4, 1)
# Stretches of the vocabulary: fixed by V alone, so that a token's bits do not depend on T.
SPLIT_V = 8192
MAX_SPLITS = 16
# Elements of the logit gradients that exist at a time.
CHUNK_ELEMENTS = 64 * 2**20
UNDERFLOW = tl.constexpr(-104.0)


@triton.jit
def _logits_tile(
    hidden,
    weight,
    row,
    column,
    rows,
    vocab,
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
            mask=(column < vocab)[None, :] & (k < depth)[:, None],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    targets,
    row_temperature,
    partial,
    rows,
    vocab,
    depth,
    stride_hidden,
    stride_weight,
    split_size,
    temperature,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    valid = row < rows
    target = tl.load(targets + row, mask=valid, other=-1)
    temperatures = tl.zeros_like(row).to(tl.float32) + temperature
    if row_temperature is not None:
        temperatures = tl.load(row_temperature + row, mask=valid, other=1.0)
    inv = inverse(temperatures, logit_scale, HAS_CAP)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    dot = tl.zeros((BLOCK_T,), tl.float32)
    hit = tl.zeros((BLOCK_T,), tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, vocab), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = _logits_tile(
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
        if HAS_CAP:
            z = softcapped(z, logit_scale, softcap)
        hit += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        z = tl.where((column < vocab)[None, :], z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        shift = (tl.where(top == float("-inf"), anchor, top) - anchor) * inv
        shift = tl.where(shift < UNDERFLOW, UNDERFLOW, shift)
        scale = tl.exp(shift)
        d = (z - anchor[:, None]) * inv[:, None]
        d = tl.where(d < UNDERFLOW, UNDERFLOW, d)
        e = tl.exp(d)
        dot = scale * (dot + total * shift) + tl.sum(e * d, 1)
        total = scale * total + tl.sum(e, 1)
        top = new_top
    out = partial + (split * 4).to(tl.int64) * rows + row
    tl.store(out, top, mask=valid)
    tl.store(out + rows, total, mask=valid)
    tl.store(out + 2 * rows, dot, mask=valid)
    tl.store(out + 3 * rows, hit, mask=valid)


@triton.jit
def _merge_kernel(
    partial,
    targets,
    row_temperature,
    logprob,
    logsumexp,
    entropy,
    rows,
    vocab,
    splits,
    temperature,
    logit_scale,
    ignore_index,
    HAS_CAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    target = tl.load(targets + row, mask=valid, other=-1)
    temperatures = tl.zeros_like(row).to(tl.float32) + temperature
    if row_temperature is not None:
        temperatures = tl.load(row_temperature + row, mask=valid, other=1.0)
    inv = inverse(temperatures, logit_scale, HAS_CAP)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    hit = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        part = partial + tl.cast(split, tl.int64) * 4 * rows + row
        part_top = tl.load(part, mask=valid, other=float("-inf"))
        part_total = tl.load(part + rows, mask=valid, other=0.0)
        part_dot = tl.load(part + 2 * rows, mask=valid, other=0.0)
        hit += tl.load(part + 3 * rows, mask=valid, other=0.0)
        new_top = tl.maximum(top, part_top)
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        old_shift = (tl.where(top == float("-inf"), anchor, top) - anchor) * inv
        old_shift = tl.where(old_shift < UNDERFLOW, UNDERFLOW, old_shift)
        part_shift = (tl.where(part_top == float("-inf"), anchor, part_top) - anchor) * inv
        part_shift = tl.where(part_shift < UNDERFLOW, UNDERFLOW, part_shift)
        old_scale = tl.exp(old_shift)
        part_scale = tl.exp(part_shift)
        dot = old_scale * (dot + total * old_shift)
        dot += part_scale * (part_dot + part_total * part_shift)
        total = old_scale * total + part_scale * part_total
        top = new_top
    log_sum = tl.log(total)
    value = (hit - top) * inv - log_sum
    in_vocab = (target >= 0) & (target < vocab)
    value = tl.where(in_vocab, value, float("nan"))
    tl.store(logprob + row, tl.where(target == ignore_index, 0.0, value), mask=valid)
    tl.store(logsumexp + row, top * inv + log_sum, mask=valid)
    if WANT_ENTROPY:
        tl.store(entropy + row, log_sum - dot / total, mask=valid)


@triton.jit
def _logit_gradient_kernel(
    grad_logprob,
    grad_logsumexp,
    grad_entropy,
    hidden,
    weight,
    targets,
    logsumexp,
    entropy,
    row_temperature,
    d_logits,
    rows,
    vocab,
    depth,
    stride_hidden,
    stride_weight,
    first_column,
    width,
    temperature,
    logit_scale,
    softcap,
    ignore_index,
    HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offset = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = first_column + offset
    valid = row < rows
    target = tl.load(targets + row, mask=valid, other=-1)
    temperatures = tl.zeros_like(row).to(tl.float32) + temperature
    if row_temperature is not None:
        temperatures = tl.load(row_temperature + row, mask=valid, other=1.0)
    inv = inverse(temperatures, logit_scale, HAS_CAP)
    # dL/dz_j = a 1[j = t] + p_j (c - a - b H - b log p_j)
    a = tl.zeros((BLOCK_T,), tl.float32)
    if grad_logprob is not None:
        a = tl.load(grad_logprob + row, mask=valid, other=0.0)
        a = tl.where(target == ignore_index, 0.0, a)
    constant = -a
    if grad_logsumexp is not None:
        constant += tl.load(grad_logsumexp + row, mask=valid, other=0.0)
    b = tl.zeros((BLOCK_T,), tl.float32)
    if grad_entropy is not None:
        b = tl.load(grad_entropy + row, mask=valid, other=0.0)
        constant -= b * tl.load(entropy + row, mask=valid, other=0.0)
    lse = tl.load(logsumexp + row, mask=valid, other=0.0)
    z = _logits_tile(
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
    if HAS_CAP:
        z = softcapped(z, logit_scale, softcap)
    log_p = z * inv[:, None] - lse[:, None]
    log_p = tl.where(log_p < UNDERFLOW, UNDERFLOW, log_p)
    d = tl.exp(log_p) * (constant[:, None] - b[:, None] * log_p)
    d += tl.where(column[None, :] == target[:, None], a[:, None], 0.0)
    d = d * inv[:, None]
    if HAS_CAP:
        d = d * softcap_slope(z, logit_scale, softcap)
    out = d_logits + row.to(tl.int64)[:, None] * width + offset[None, :]
    mask = valid[:, None] & (offset < width)[None, :]
    tl.store(out, d.to(d_logits.dtype.element_ty), mask=mask)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    logprob = hidden.new_empty((rows,), dtype=torch.float32)
    logsumexp = hidden.new_empty((rows,), dtype=torch.float32)
    entropy = hidden.new_empty((rows if want_entropy else 0,), dtype=torch.float32)
    if rows == 0:
        return logprob, logsumexp, entropy
    tile = _tile(hidden, weight)
    splits = max(1, min(MAX_SPLITS, triton.cdiv(vocab, SPLIT_V)))
    split_size = triton.cdiv(triton.cdiv(vocab, splits), tile["BLOCK_V"]) * tile["BLOCK_V"]
    partial = hidden.new_empty((splits, 4, rows), dtype=torch.float32)
    _forward_kernel[(triton.cdiv(rows, tile["BLOCK_T"]), splits)](
        hidden,
        weight,
        targets,
        row_temperature,
        partial,
        rows,
        vocab,
        depth,
        hidden.stride(0),
        weight.stride(0),
        split_size,
        temperature,
        logit_scale,
        softcap,
        HAS_CAP=softcap > 0,
        **tile,
    )
    _merge_kernel[(triton.cdiv(rows, 128),)](
        partial,
        targets,
        row_temperature,
        logprob,
        logsumexp,
        entropy,
        rows,
        vocab,
        splits,
        temperature,
        logit_scale,
        ignore_index,
        HAS_CAP=softcap > 0,
        WANT_ENTROPY=want_entropy,
        BLOCK=128,
        num_warps=4,
    )
    return logprob, logsumexp, entropy


def backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    grad_weight = weight.new_empty((vocab if need_weight else 0, depth))
    total = hidden.new_zeros((rows if need_hidden else 0, depth), dtype=torch.float32)
    if rows == 0:
        return total.to(hidden.dtype), grad_weight.zero_()
    tile = _tile(hidden, weight)
    block_t, block_v = tile["BLOCK_T"], tile["BLOCK_V"]
    chunk = max(block_v, CHUNK_ELEMENTS // rows // block_v * block_v)
    buffer = hidden.new_empty(rows * min(chunk, vocab))
    for first in range(0, vocab, chunk):
        width = min(chunk, vocab - first)
        d_logits = buffer[: rows * width].view(rows, width)
        _logit_gradient_kernel[(triton.cdiv(rows, block_t), triton.cdiv(width, block_v))](
            grad_logprob,
            grad_logsumexp,
            grad_entropy,
            hidden,
            weight,
            targets,
            logsumexp,
            entropy,
            row_temperature,
            d_logits,
            rows,
            vocab,
            depth,
            hidden.stride(0),
            weight.stride(0),
            first,
            width,
            temperature,
            logit_scale,
            softcap,
            ignore_index,
            HAS_CAP=softcap > 0,
            **tile,
        )
        if need_hidden:
            total += _matmul_fp32(d_logits, weight[first : first + width])
        if need_weight:
            grad_weight[first : first + width] = _matmul_fp32(d_logits.T, hidden)
    return total.to(hidden.dtype), grad_weight


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


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the float32 accumulator kept; torch has that for 16-bit inputs on CUDA only."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
