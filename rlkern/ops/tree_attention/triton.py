"""Triton kernels of `tree_attention`: partial results of all items, then each row's merge.

Tiles are the same for one row as for many, so that a row's bits do not depend on the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import finite, multiply, rounded, softcapped

BLOCK_M = 64


@triton.jit
def _item_kernel(
    q,
    k_cache,
    v_cache,
    rows,
    items,
    slots,
    partial,
    partial_lse,
    heads,
    kv_heads,
    scale,
    softcap,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    item = items + (tl.program_id(0) // kv_heads).to(tl.int64) * 6
    row_begin, row_count = tl.load(item), tl.load(item + 1)
    slot_begin, slot_count = tl.load(item + 2), tl.load(item + 3)
    part_begin = tl.load(item + 5)
    first = tl.program_id(1) * BLOCK
    if first < row_count * GROUP:
        # a row of the tile is a row of the item and one of the query heads that share these keys
        m = first + tl.arange(0, BLOCK)
        live = m < row_count * GROUP
        row, q_head = m // GROUP, head * GROUP + m % GROUP
        d = tl.arange(0, BLOCK_D)
        inside = d < WIDTH
        of_batch = tl.load(rows + row_begin + row, mask=live, other=0).to(tl.int64)
        at = (of_batch * heads + q_head) * WIDTH
        queries = tl.load(
            q + at[:, None] + d[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for base in range(0, slot_count, BLOCK_N):
            n = base + tl.arange(0, BLOCK_N)
            has = n < slot_count
            slot = tl.load(slots + slot_begin + n, mask=has, other=0).to(tl.int64)
            where = (slot * kv_heads + head) * WIDTH
            mask = has[:, None] & inside[None, :]
            keys = tl.load(k_cache + where[:, None] + d[None, :], mask=mask, other=0.0)
            s = multiply(queries, tl.trans(keys), tl.zeros((BLOCK, BLOCK_N), tl.float32)) * scale
            if HAS_CAP:
                s = softcapped(s, 1.0, softcap)
            s = tl.where(has[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            anchor = finite(higher)
            decay = tl.exp(top - anchor)
            p = tl.exp(s - anchor[:, None])
            total = total * decay + tl.sum(p, 1)
            values = tl.load(v_cache + where[:, None] + d[None, :], mask=mask, other=0.0)
            acc = multiply(rounded(p, values.dtype), values, acc * decay[:, None])
            top = higher
        part = (part_begin + row).to(tl.int64) * heads + q_head
        mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            partial + part[:, None] * WIDTH + d[None, :],
            mean,
            mask=live[:, None] & inside[None, :],
        )
        tl.store(partial_lse + part, finite(top) + tl.log(total), mask=live)


@triton.jit
def _merge_kernel(
    partial,
    partial_lse,
    rows,
    parts,
    part_offsets,
    out,
    lse,
    heads,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin, end = tl.load(part_offsets + row), tl.load(part_offsets + row + 1)
    top = tl.full((), float("-inf"), tl.float32)
    for i in range(begin, end):
        part = tl.load(parts + i).to(tl.int64) * heads + head
        top = tl.maximum(top, tl.load(partial_lse + part))
    top = finite(top)
    d = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    total = tl.zeros((), tl.float32)
    for i in range(begin, end):
        part = tl.load(parts + i).to(tl.int64) * heads + head
        weight = tl.exp(tl.load(partial_lse + part) - top)
        total += weight
        sums += weight * tl.load(partial + part * WIDTH + d, mask=d < WIDTH, other=0.0)
    mean = sums / tl.where(total == 0.0, 1.0, total)
    at = tl.load(rows + row).to(tl.int64) * heads + head
    tl.store(out + at * WIDTH + d, rounded(mean, out.dtype.element_ty), mask=d < WIDTH)
    tl.store(lse + at, top + tl.log(total))


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    items: Tensor,
    slots: Tensor,
    trees: Tensor,
    parts: Tensor,
    part_offsets: Tensor,
    chunk: int,
    max_rows: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    out = q.new_empty((batch, heads, width))
    lse = q.new_empty((batch, heads), dtype=torch.float32)
    partial = q.new_empty((parts.shape[0], heads, width), dtype=torch.float32)
    partial_lse = q.new_empty((parts.shape[0], heads), dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(width))
    if items.shape[0]:
        wide = block_d * q.element_size() >= 256
        _item_kernel[(items.shape[0] * kv_heads, triton.cdiv(max_rows * group, BLOCK_M))](
            q,
            k_cache,
            v_cache,
            rows,
            items,
            slots,
            partial,
            partial_lse,
            heads,
            kv_heads,
            scale,
            softcap,
            GROUP=group,
            WIDTH=width,
            HAS_CAP=softcap > 0,
            BLOCK=BLOCK_M,
            BLOCK_N=32 if wide else 64,
            BLOCK_D=block_d,
            num_warps=8 if block_d >= 64 else 4,
            num_stages=2,
        )
    if batch * heads:
        _merge_kernel[(batch * heads,)](
            partial,
            partial_lse,
            rows,
            parts,
            part_offsets,
            out,
            lse,
            heads,
            WIDTH=width,
            BLOCK_D=triton.next_power_of_2(max(1, width)),
            num_warps=2,
        )
    return out, lse
