"""Triton kernels of `shared_prefix_attention`: forward, dq, and dk with dv.

Rows and keys share one table of tiles, cut from the first row of every pack. The smallest and the
largest subtree_end of a tile say which rows see all or none of its keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import finite, multiply, rounded, softcap_slope, softcapped


@triton.jit
def _pack_of(tile, cu_seqlens, tile_offsets, tile_packs):
    """The first tile of a tile's pack, the pack's end, and the tile's first row."""
    pack = tl.load(tile_packs + tile)
    first_tile = tl.load(tile_offsets + pack)
    begin = tl.load(cu_seqlens + pack)
    return first_tile, begin, tl.load(cu_seqlens + pack + 1)


@triton.jit
def _rows_of(x, row, live, head, heads, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of the rows of x (T, heads, WIDTH)."""
    d = tl.arange(0, BLOCK_D)
    at = (row.to(tl.int64) * heads + head) * WIDTH
    return tl.load(
        x + at[:, None] + d[None, :], mask=live[:, None] & (d < WIDTH)[None, :], other=0.0
    )


@triton.jit
def _put_rows(x, value, row, live, head, heads, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = (row.to(tl.int64) * heads + head) * WIDTH
    mask = live[:, None] & (d < WIDTH)[None, :]
    tl.store(x + at[:, None] + d[None, :], rounded(value, x.dtype.element_ty), mask=mask)


@triton.jit
def _tile_kernel(
    subtree_end,
    cu_seqlens,
    tile_offsets,
    tile_packs,
    nearest,
    furthest,
    packs,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    low, high = 0, 0
    if tl.load(tile_packs + tile) < packs:
        first, begin, end = _pack_of(tile, cu_seqlens, tile_offsets, tile_packs)
        row = begin + (tile - first) * BLOCK + tl.arange(0, BLOCK)
        ends = tl.load(subtree_end + row, mask=row < end, other=0)
        low = tl.min(tl.where(row < end, ends, 2147483647))
        high = tl.max(ends)
    tl.store(nearest + tile, low)
    tl.store(furthest + tile, high)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    subtree_end,
    cu_seqlens,
    tile_offsets,
    tile_packs,
    nearest,
    furthest,
    out,
    lse,
    packs,
    heads,
    kv_heads,
    scale,
    softcap,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # tiles with the most keys first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(tile_packs + tile) < packs:
        first, begin, end = _pack_of(tile, cu_seqlens, tile_offsets, tile_packs)
        row_begin = begin + (tile - first) * BLOCK
        row_end = tl.minimum(row_begin + BLOCK, end)
        m = row_begin + tl.arange(0, BLOCK)
        live = m < end
        queries = _rows_of(q, m, live, head, heads, WIDTH, BLOCK_D)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for other in range(first, tile + 1):
            if tl.load(furthest + other) > row_begin:
                n = begin + (other - first) * BLOCK + tl.arange(0, BLOCK)
                keys = _rows_of(k, n, n < end, head // GROUP, kv_heads, WIDTH, BLOCK_D)
                s = multiply(queries, tl.trans(keys), tl.zeros((BLOCK, BLOCK), tl.float32)) * scale
                if HAS_CAP:
                    s = softcapped(s, 1.0, softcap)
                if (other == tile) | (tl.load(nearest + other) < row_end):
                    ends = tl.load(subtree_end + n, mask=n < end, other=0)
                    seen = (n[None, :] <= m[:, None]) & (m[:, None] < ends[None, :])
                    s = tl.where(seen, s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                anchor = finite(higher)
                decay = tl.exp(top - anchor)
                p = tl.exp(s - anchor[:, None])
                total = total * decay + tl.sum(p, 1)
                values = _rows_of(v, n, n < end, head // GROUP, kv_heads, WIDTH, BLOCK_D)
                acc = multiply(rounded(p, values.dtype), values, acc * decay[:, None])
                top = higher
        mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        _put_rows(out, mean, m, live, head, heads, WIDTH, BLOCK_D)
        tl.store(lse + m.to(tl.int64) * heads + head, finite(top) + tl.log(total), mask=live)


@triton.jit
def _delta_kernel(
    grad_out,
    grad_lse,
    out,
    delta,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_out . out - grad_lse of each row and head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    g = _rows_of(grad_out, row, live, 0, 1, WIDTH, BLOCK_D).to(tl.float32)
    o = _rows_of(out, row, live, 0, 1, WIDTH, BLOCK_D).to(tl.float32)
    mean = tl.sum(g * o, 1)
    if grad_lse is not None:
        mean -= tl.load(grad_lse + row, mask=live, other=0.0)
    tl.store(delta + row, mean, mask=live)


@triton.jit
def _norm_of(lse, at, live):
    """+inf for rows that see nothing: their weights are then 0."""
    norm = tl.load(lse + at, mask=live, other=float("inf"))
    return tl.where(norm == float("-inf"), float("inf"), norm)


@triton.jit
def _dq_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    subtree_end,
    cu_seqlens,
    tile_offsets,
    tile_packs,
    nearest,
    furthest,
    grad_q,
    packs,
    heads,
    kv_heads,
    scale,
    softcap,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(tile_packs + tile) < packs:
        first, begin, end = _pack_of(tile, cu_seqlens, tile_offsets, tile_packs)
        row_begin = begin + (tile - first) * BLOCK
        row_end = tl.minimum(row_begin + BLOCK, end)
        m = row_begin + tl.arange(0, BLOCK)
        live = m < end
        at = m.to(tl.int64) * heads + head
        norm = _norm_of(lse, at, live)
        mean = tl.load(delta + at, mask=live, other=0.0)
        queries = _rows_of(q, m, live, head, heads, WIDTH, BLOCK_D)
        g = _rows_of(grad_out, m, live, head, heads, WIDTH, BLOCK_D)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for other in range(first, tile + 1):
            if tl.load(furthest + other) > row_begin:
                n = begin + (other - first) * BLOCK + tl.arange(0, BLOCK)
                keys = _rows_of(k, n, n < end, head // GROUP, kv_heads, WIDTH, BLOCK_D)
                values = _rows_of(v, n, n < end, head // GROUP, kv_heads, WIDTH, BLOCK_D)
                s = multiply(queries, tl.trans(keys), tl.zeros((BLOCK, BLOCK), tl.float32)) * scale
                dp = multiply(g, tl.trans(values), tl.zeros((BLOCK, BLOCK), tl.float32))
                ds = dp - mean[:, None]
                if HAS_CAP:
                    s = softcapped(s, 1.0, softcap)
                    ds *= softcap_slope(s, 1.0, softcap)
                if (other == tile) | (tl.load(nearest + other) < row_end):
                    ends = tl.load(subtree_end + n, mask=n < end, other=0)
                    seen = (n[None, :] <= m[:, None]) & (m[:, None] < ends[None, :])
                    s = tl.where(seen, s, float("-inf"))
                ds *= tl.exp(s - norm[:, None])
                acc = multiply(rounded(ds, keys.dtype), keys, acc)
        _put_rows(grad_q, acc * scale, m, live, head, heads, WIDTH, BLOCK_D)


@triton.jit
def _dkv_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    subtree_end,
    cu_seqlens,
    tile_offsets,
    tile_packs,
    nearest,
    furthest,
    grad_k,
    grad_v,
    packs,
    heads,
    kv_heads,
    scale,
    softcap,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of keys over the rows that see it, of all query heads and branches in order."""
    # the first tiles of a pack are seen by the most rows
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if tl.load(tile_packs + tile) < packs:
        first, begin, end = _pack_of(tile, cu_seqlens, tile_offsets, tile_packs)
        n = begin + (tile - first) * BLOCK + tl.arange(0, BLOCK)
        own = n < end
        ends = tl.load(subtree_end + n, mask=own, other=0)
        low = tl.load(nearest + tile)
        last = first + tl.cdiv(tl.minimum(tl.load(furthest + tile), end) - begin, BLOCK)
        keys = _rows_of(k, n, own, kv_head, kv_heads, WIDTH, BLOCK_D)
        values = _rows_of(v, n, own, kv_head, kv_heads, WIDTH, BLOCK_D)
        dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for step in range(0, GROUP * (last - tile)):
            head = kv_head * GROUP + step // (last - tile)
            other = tile + step % (last - tile)
            row_begin = begin + (other - first) * BLOCK
            m = row_begin + tl.arange(0, BLOCK)
            live = m < end
            at = m.to(tl.int64) * heads + head
            queries = _rows_of(q, m, live, head, heads, WIDTH, BLOCK_D)
            g = _rows_of(grad_out, m, live, head, heads, WIDTH, BLOCK_D)
            s = multiply(keys, tl.trans(queries), tl.zeros((BLOCK, BLOCK), tl.float32)) * scale
            dp = multiply(values, tl.trans(g), tl.zeros((BLOCK, BLOCK), tl.float32))
            ds = dp - tl.load(delta + at, mask=live, other=0.0)[None, :]
            if HAS_CAP:
                s = softcapped(s, 1.0, softcap)
                ds *= softcap_slope(s, 1.0, softcap)
            if (other == tile) | (low < row_begin + BLOCK):
                seen = (n[:, None] <= m[None, :]) & (m[None, :] < ends[:, None])
                s = tl.where(seen, s, float("-inf"))
            p = tl.exp(s - _norm_of(lse, at, live)[None, :])
            ds *= p
            dv = multiply(rounded(p, g.dtype), g, dv)
            dk = multiply(rounded(ds, queries.dtype), queries, dk)
        _put_rows(grad_k, dk * scale, n, own, kv_head, kv_heads, WIDTH, BLOCK_D)
        _put_rows(grad_v, dv, n, own, kv_head, kv_heads, WIDTH, BLOCK_D)


class _Tiles(NamedTuple):
    """Of all packs, one after another; a table of fixed size, so that nothing waits for it."""

    cu_seqlens: Tensor
    offsets: Tensor  # int32 [S], the first tile of each pack
    packs: Tensor  # int32 [tiles], S for those that are too many
    nearest: Tensor  # int32 [tiles]
    furthest: Tensor


def _tiles(subtree_end: Tensor, cu_seqlens: Tensor, block: int) -> _Tiles:
    packs = cu_seqlens.shape[0] - 1
    count = triton.cdiv(subtree_end.shape[0], block) + packs
    ends = ((cu_seqlens.diff() + block - 1) // block).cumsum(0, dtype=torch.int32)
    tile = torch.arange(count, device=ends.device, dtype=torch.int32)
    of_tile = torch.searchsorted(ends, tile, right=True, out_int32=True)
    offsets = torch.nn.functional.pad(ends, (1, 0))
    nearest, furthest = (tile.new_empty(count) for _ in range(2))
    _tile_kernel[(count,)](
        subtree_end,
        cu_seqlens,
        offsets,
        of_tile,
        nearest,
        furthest,
        packs,
        BLOCK=block,
        num_warps=1,
    )
    return _Tiles(cu_seqlens, offsets, of_tile, nearest, furthest)


def _constants(q: Tensor, k: Tensor, softcap: float) -> dict:
    """What all kernels are compiled for."""
    width = q.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    # rows that are not aligned take an address register for each element, a soft cap two values
    row_bytes, wide = block_d * q.element_size(), q.element_size() > 2
    small = row_bytes > (128 if wide else 256) or width % 16 or softcap > 0
    constants = {
        "GROUP": q.shape[1] // k.shape[1],
        "WIDTH": width,
        "HAS_CAP": softcap > 0,
        "BLOCK": 16 if row_bytes > 512 else 32 if small else 64,
        "BLOCK_D": block_d,
        "num_warps": min(8, max(2, block_d // (16 if wide else 64))) if small else 8,
        "num_stages": 2,
    }
    return constants


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((tokens, heads), dtype=torch.float32)
    if tokens and q.numel():
        constants = _constants(q, k, softcap)
        tiles = _tiles(subtree_end, cu_seqlens, constants["BLOCK"])
        _forward_kernel[(tiles.packs.shape[0], heads)](
            q,
            k,
            v,
            subtree_end,
            *tiles,
            out,
            lse,
            cu_seqlens.shape[0] - 1,
            heads,
            k.shape[1],
            scale,
            softcap,
            **constants,
        )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, width = q.shape
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    if not q.numel():
        return grad_q, grad_k, grad_v
    constants = _constants(q, k, softcap)
    tiles = _tiles(subtree_end, cu_seqlens, constants["BLOCK"])
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(tokens * heads, 32),)](
        grad_out,
        grad_lse,
        out,
        delta,
        tokens * heads,
        WIDTH=width,
        BLOCK=32,
        BLOCK_D=constants["BLOCK_D"],
        num_warps=4,
    )
    shared = (grad_out, q, k, v, lse, delta, subtree_end, *tiles)
    sizes = (cu_seqlens.shape[0] - 1, heads, k.shape[1], scale, softcap)
    count = tiles.packs.shape[0]
    _dq_kernel[(count, heads)](*shared, grad_q, *sizes, **constants)
    # twice the sums
    constants["num_warps"] = min(8, 2 * constants["num_warps"])
    _dkv_kernel[(count, k.shape[1])](*shared, grad_k, grad_v, *sizes, **constants)
    return grad_q, grad_k, grad_v
