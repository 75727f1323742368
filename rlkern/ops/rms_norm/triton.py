"""Triton kernels of `rms_norm`: a program a row, or some heads of a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import rounded

# elements of a program that takes several heads
BLOCK = 2048


@triton.jit
def _rows(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of any width, read twice: the second time from cache."""
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * WIDTH
    sums = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, WIDTH, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        v = tl.load(x + row + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        sums += v * v
    inverse = 1.0 / tl.sqrt_rn(tl.sum(sums) / WIDTH + eps)
    for begin in range(0, WIDTH, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        v = tl.load(x + row + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        w = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        y = w * rounded(v * inverse, dtype).to(tl.float32)
        tl.store(out + row + d, rounded(y, dtype), mask=d < WIDTH)


@triton.jit
def _heads(
    x,
    weight,
    cos,
    sin,
    out,
    heads,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    live = (head < heads)[:, None] & (d < WIDTH)[None, :]
    base = token * heads * WIDTH
    # an element, and the one that it is turned with
    turned = d < 2 * HALF
    partner = tl.where(d < HALF, d + HALF, tl.where(turned, d - HALF, d))
    at = base + head[:, None] * WIDTH + d[None, :]
    other_at = base + head[:, None] * WIDTH + partner[None, :]
    y = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    other = tl.load(x + other_at, mask=live & turned[None, :], other=0.0).to(tl.float32)
    if weight is not None:
        inverse = 1.0 / tl.sqrt_rn(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
        w = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
        w_other = tl.load(weight + partner, mask=turned, other=0.0).to(tl.float32)[None, :]
        y = rounded(w * rounded(y * inverse, dtype).to(tl.float32), dtype).to(tl.float32)
        other = w_other * rounded(other * inverse, dtype).to(tl.float32)
        other = rounded(other, dtype).to(tl.float32)
    angle = token * HALF + tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    c = rounded(c, dtype).to(tl.float32)
    s = rounded(tl.where(d < HALF, -s, s), dtype).to(tl.float32)
    y = rounded(y * c[None, :], dtype).to(tl.float32)
    y += rounded(other * s[None, :], dtype).to(tl.float32)
    tl.store(out + at, rounded(y, dtype), mask=live)


def forward(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    out = torch.empty_like(x)
    if not x.numel():
        return out
    width = x.shape[-1]
    block_d = triton.next_power_of_2(width)
    if cos is None or sin is None:
        if weight is None:
            return out.copy_(x)
        rows = x.numel() // width
        _rows[(rows,)](x, weight, out, eps, WIDTH=width, BLOCK_D=min(BLOCK, block_d))
        return out
    tokens, heads, _ = x.shape
    block_h = min(triton.next_power_of_2(heads), max(1, BLOCK // block_d))
    _heads[(tokens, triton.cdiv(heads, block_h))](
        x,
        weight,
        cos,
        sin,
        out,
        heads,
        eps,
        WIDTH=width,
        HALF=cos.shape[1],
        BLOCK_H=block_h,
        BLOCK_D=block_d,
    )
    return out
