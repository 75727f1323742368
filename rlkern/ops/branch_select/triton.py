"""Triton kernel of `branch_select`: a program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 256


@triton.jit
def _kernel(
    log_probs,
    ids,
    entropy,
    embedding,
    branch,
    diversity,
    count,
    m,
    top,
    vocab,
    stride,
    width,
    tau_abs,
    tau_rel,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    at = row * count + index
    x = tl.load(log_probs + at, mask=index < count, other=float("-inf"))
    token = tl.load(ids + at, mask=index < count, other=-1)
    p = tl.exp(x)
    largest = tl.sum(tl.where(index == 0, p, 0.0), 0)
    passes = (p > tau_abs) & (largest - p < tau_rel) & (token >= 0) & (index > 0)
    tl.store(branch + row * m + index, passes, mask=index < m)
    if embedding is not None:
        known = (index < top) & (token >= 0) & (token < vocab)
        p = tl.where(known, p, 0.0)
        # by the wanted token's row: -1 and what has none read nothing
        rows = embedding + tl.where(known, token, 0)[:, None] * stride
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)[None, :]
            e = tl.load(rows + h, mask=known[:, None] & (h < width), other=0.0).to(tl.float32)
            squares += tl.sum(e * e, 1)
        scale = p / tl.sqrt(tl.where(squares == 0.0, 1.0, squares))
        length = tl.zeros((BLOCK_H,), tl.float32)
        for start in range(0, width, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)[None, :]
            e = tl.load(rows + h, mask=known[:, None] & (h < width), other=0.0).to(tl.float32)
            mean = tl.sum(e * scale[:, None], 0)
            length += mean * mean
        found = tl.sum(p * p, 0) - tl.sum(length, 0)
        tl.store(diversity + row, tl.load(entropy + row) * found)


def forward(
    log_probs: Tensor,
    ids: Tensor,
    entropy: Tensor,
    embedding: Tensor | None,
    m: int,
    top: int,
    tau_abs: float,
    tau_rel: float,
) -> tuple[Tensor, Tensor]:
    rows, count = log_probs.shape
    branch = log_probs.new_empty((rows, m), dtype=torch.bool)
    diversity = log_probs.new_empty((0 if embedding is None else rows,))
    if rows:
        vocab, width = (0, 0) if embedding is None else embedding.shape
        block = triton.next_power_of_2(max(2, count))
        _kernel[(rows,)](
            log_probs,
            ids,
            entropy,
            embedding,
            branch,
            diversity,
            count,
            m,
            top,
            vocab,
            0 if embedding is None else embedding.stride(0),
            width,
            tau_abs,
            tau_rel,
            BLOCK=block,
            BLOCK_H=max(16, min(BLOCK_H, 8192 // block)),
            num_warps=4,
        )
    return branch, diversity
