"""Triton kernels of `smc_resample`: a program a group, first for the weights, then for parents."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
# rows that a program finds the parents of at a time
ROWS = 64


@triton.jit
def _weigh_kernel(
    log_weights, u, cu_seqlens, children, ess, new, ess_threshold, BLOCK: tl.constexpr
):
    """children[j]: how many rows descend from those up to j; -1 where the group stays."""
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens + group)
    stop = tl.load(cu_seqlens + group + 1)
    offset = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    odd = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, stop, BLOCK):
        at = start + offset
        x = tl.load(log_weights + at, mask=at < stop, other=float("-inf"))
        odd += ((x != x) | (x == float("inf"))).to(tl.int32)
        tops = tl.where(x > tops, x, tops)
    top = tl.max(tops, 0)
    regular = (tl.sum(odd, 0) == 0) & (top > float("-inf"))
    anchor = tl.where(regular, top, 0.0).to(tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    last = tl.full((BLOCK,), -1, tl.int64)
    for start in range(first, stop, BLOCK):
        at = start + offset
        x = tl.load(log_weights + at, mask=at < stop, other=float("-inf"))
        w = tl.exp(tl.where(regular, x, float("-inf")).to(tl.float64) - anchor)
        sums += w
        squares += w * w
        last = tl.maximum(last, tl.where(w > 0, at, -1))
    total = tl.sum(sums, 0)
    # divisors of a group that stays are never 0
    size = total * total / tl.where(regular, tl.sum(squares, 0), 1.0)
    n = (stop - first).to(tl.float64)
    nothing = tl.where(tl.sum(odd, 0) == 0, 0.0, float("nan"))
    tl.store(ess + group, tl.where(regular, size.to(tl.float32), nothing))
    resamples = regular & (size < n * ess_threshold)
    final = tl.max(last, 0)
    share = tl.where(regular, total, 1.0)
    mean = (anchor + tl.log(share / tl.where(n > 0, n, 1.0))).to(tl.float32)
    low = tl.load(u + group).to(tl.float64)
    before = tl.zeros((), tl.float64)
    for start in range(first, stop, BLOCK):
        at = start + offset
        x = tl.load(log_weights + at, mask=at < stop, other=float("-inf"))
        w = tl.exp(tl.where(regular, x, float("-inf")).to(tl.float64) - anchor)
        upto = (before + tl.cumsum(w, 0)) / share
        before += tl.sum(w, 0)
        count = tl.ceil(upto * n - low).to(tl.int64)
        count = tl.where(at >= final, stop - first, count)
        tl.store(children + at, tl.where(resamples, count, -1), mask=at < stop)
        tl.store(new + at, tl.where(resamples, mean, x), mask=at < stop)


@triton.jit
def _parents_kernel(cu_seqlens, children, parents, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens + group)
    stop = tl.load(cu_seqlens + group + 1)
    offset = tl.arange(0, BLOCK)
    for start in range(first, stop, BLOCK):
        row = start + offset
        before = tl.zeros((BLOCK,), tl.int64)
        stays = tl.zeros((BLOCK,), tl.int64)
        for other in range(first, stop, 32):
            at = other + tl.arange(0, 32)
            count = tl.load(children + at, mask=at < stop, other=1 << 62)
            passed = (count[None, :] <= (row - first)[:, None]) & (count >= 0)[None, :]
            before += tl.sum(passed.to(tl.int64), 1)
            stays += tl.sum((count < 0).to(tl.int64), 0)
        parent = tl.where(stays > 0, row, first + before)
        tl.store(parents + row, parent, mask=row < stop)


def forward(
    log_weights: Tensor, u: Tensor, cu_seqlens: Tensor, ess_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, groups = log_weights.shape[0], cu_seqlens.shape[0] - 1
    parents = log_weights.new_empty((rows,), dtype=torch.int64)
    children = log_weights.new_empty((rows,), dtype=torch.int64)
    ess, new = log_weights.new_empty((groups,)), log_weights.new_empty((rows,))
    if groups:
        _weigh_kernel[(groups,)](
            log_weights, u, cu_seqlens, children, ess, new, ess_threshold, BLOCK=BLOCK, num_warps=4
        )
        _parents_kernel[(groups,)](cu_seqlens, children, parents, BLOCK=ROWS, num_warps=4)
    return parents, ess, new
