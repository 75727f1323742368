"""Triton kernels of `logprob_from_logits`: a program a row, the row in blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import inverse, softcap_slope, softcapped

# The largest block of which a row of float32 stays in registers at eight warps.
BLOCK = 4096
# Below this, exp is 0 in float32: clamping there keeps 0 * -inf out of the entropy.
UNDERFLOW = tl.constexpr(-104.0)


@triton.jit
def _forward_kernel(
    logits,
    targets,
    row_temperature,
    logprob,
    logsumexp,
    entropy,
    vocab,
    stride,
    temperature,
    logit_scale,
    softcap,
    ignore_index,
    HAS_CAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64: T * V passes 2^31 at 128 k vocabulary and 16 k tokens
    row = tl.program_id(0).to(tl.int64)
    if row_temperature is not None:
        temperature = tl.load(row_temperature + row)
    inv = inverse(temperature, logit_scale, HAS_CAP)
    base = logits + row * stride
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    dot = tl.zeros((), tl.float32)
    for start in range(0, vocab, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(base + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        if HAS_CAP:
            x = softcapped(x, logit_scale, softcap)
            x = tl.where(column < vocab, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        # while all logits are -inf any finite reference point gives sums of 0
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        shift = (tl.where(top == float("-inf"), anchor, top) - anchor) * inv
        shift = tl.where(shift < UNDERFLOW, UNDERFLOW, shift)
        scale = tl.exp(shift)
        d = (x - anchor) * inv
        # written as a where, not a maximum: a NaN logit must reach the result
        d = tl.where(d < UNDERFLOW, UNDERFLOW, d)
        e = tl.exp(d)
        dot = scale * (dot + total * shift) + tl.sum(e * d, 0)
        total = scale * total + tl.sum(e, 0)
        top = new_top
    log_sum = tl.log(total)
    target = tl.load(targets + row)
    in_vocab = (target >= 0) & (target < vocab)
    hit = tl.load(base + tl.where(in_vocab, target, 0), mask=in_vocab, other=float("nan"))
    hit = hit.to(tl.float32)
    if HAS_CAP:
        hit = softcapped(hit, logit_scale, softcap)
    value = (hit - top) * inv - log_sum
    tl.store(logprob + row, tl.where(target == ignore_index, 0.0, value))
    tl.store(logsumexp + row, top * inv + log_sum)
    if WANT_ENTROPY:
        tl.store(entropy + row, log_sum - dot / total)


@triton.jit
def _backward_kernel(
    grad_logprob,
    grad_logsumexp,
    grad_entropy,
    logits,
    targets,
    logsumexp,
    entropy,
    row_temperature,
    grad_logits,
    vocab,
    stride,
    temperature,
    logit_scale,
    softcap,
    ignore_index,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row_temperature is not None:
        temperature = tl.load(row_temperature + row)
    inv = inverse(temperature, logit_scale, HAS_CAP)
    target = tl.load(targets + row)
    a = 0.0
    if grad_logprob is not None:
        a = tl.where(target == ignore_index, 0.0, tl.load(grad_logprob + row))
    # dL/dz_j = a 1[j = t] + p_j (c - a - b H - b log p_j)
    constant = -a
    if grad_logsumexp is not None:
        constant += tl.load(grad_logsumexp + row)
    b = 0.0
    if grad_entropy is not None:
        b = tl.load(grad_entropy + row)
        constant -= b * tl.load(entropy + row)
    lse = tl.load(logsumexp + row)
    column = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + row * stride + column, mask=column < vocab, other=0.0).to(tl.float32)
    if HAS_CAP:
        x = softcapped(x, logit_scale, softcap)
    log_p = x * inv - lse
    log_p = tl.where(log_p < UNDERFLOW, UNDERFLOW, log_p)
    d = tl.exp(log_p) * (constant - b * log_p) + tl.where(column == target, a, 0.0)
    d = d * inv
    if HAS_CAP:
        d = d * softcap_slope(x, logit_scale, softcap)
    out = grad_logits + row * vocab + column
    tl.store(out, d.to(grad_logits.dtype.element_ty), mask=column < vocab)


def forward(
    logits: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    logprob = logits.new_empty((rows,), dtype=torch.float32)
    logsumexp = logits.new_empty((rows,), dtype=torch.float32)
    entropy = logits.new_empty((rows if want_entropy else 0,), dtype=torch.float32)
    if rows:
        _forward_kernel[(rows,)](
            logits,
            targets,
            row_temperature,
            logprob,
            logsumexp,
            entropy,
            vocab,
            logits.stride(0),
            temperature,
            logit_scale,
            softcap,
            ignore_index,
            HAS_CAP=softcap > 0,
            WANT_ENTROPY=want_entropy,
            BLOCK_V=_block(vocab),
            num_warps=8,
        )
    return logprob, logsumexp, entropy


def backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    rows, vocab = logits.shape
    grad_logits = logits.new_empty((rows, vocab))
    if grad_logits.numel():
        block = _block(vocab)
        _backward_kernel[(rows, triton.cdiv(vocab, block))](
            grad_logprob,
            grad_logsumexp,
            grad_entropy,
            logits,
            targets,
            logsumexp,
            entropy,
            row_temperature,
            grad_logits,
            vocab,
            logits.stride(0),
            temperature,
            logit_scale,
            softcap,
            ignore_index,
            HAS_CAP=softcap > 0,
            BLOCK_V=block,
            num_warps=8,
        )
    return grad_logits


def _block(vocab: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(vocab, 16)))
