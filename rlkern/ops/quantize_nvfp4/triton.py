"""Triton kernel of `quantize_nvfp4`: a program a tile of blocks, after a launch for max |w|."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import philox
from rlkern.ops._triton_quant import (
    INFINITY_BITS,
    LEAST_FLOAT,
    MAGNITUDE,
    MOST_FLOAT,
    bits_of,
    counts_of,
    e2m1,
    e4m3,
    float_of,
    from_e2m1,
    from_e4m3,
    new_counts,
    sum_counts,
    tensor_amax,
)

# In the order of RECIPES in reference.py.
TE = tl.constexpr(0)
VLLM = tl.constexpr(1)
COMPRESSED_TENSORS = tl.constexpr(2)
TORCHAO = tl.constexpr(3)
MODELOPT = tl.constexpr(4)
FOUROVERSIX = tl.constexpr(5)
# A program's tile of elements.
HIGH, WIDE = 16, 128


@triton.jit
def _global(amax, RECIPE: tl.constexpr, LARGEST: tl.constexpr):
    """(S, what decodes)."""
    encode = tl.div_rn(LARGEST, amax)
    decode = tl.div_rn(amax, LARGEST)
    if RECIPE == TE:
        encode = tl.where(amax > 0, encode, 1.0)
        encode = tl.where(encode < MOST_FLOAT, encode, MOST_FLOAT)
        encode = tl.where(encode == 0, 1.0, encode)
    elif RECIPE == FOUROVERSIX:
        encode = tl.where(amax == 0, 1.0, encode)
        encode = tl.where(encode > MOST_FLOAT, MOST_FLOAT, encode)
    elif RECIPE < TORCHAO:
        if RECIPE == COMPRESSED_TENSORS:
            encode = tl.div_rn(1.0, tl.where(amax < LEAST_FLOAT, LEAST_FLOAT, amax)) * LARGEST
        encode = tl.where((bits_of(encode) & MAGNITUDE) < INFINITY_BITS, encode, 1.0)
        decode = tl.div_rn(1.0, encode)
    return encode, decode


@triton.jit
def _te_factor(s, encode, RECIPE: tl.constexpr):
    factor = tl.div_rn(1.0, s * tl.div_rn(1.0, encode))
    if RECIPE == FOUROVERSIX:
        return tl.where(s == 0, 0.0, factor)
    return tl.where(factor > MOST_FLOAT, MOST_FLOAT, factor)


@triton.jit
def _scaled(x, factor, RECIPE: tl.constexpr):
    if RECIPE == COMPRESSED_TENSORS or RECIPE == MODELOPT:  # noqa: SIM108, SIM109
        v = tl.div_rn(x, factor)
    else:
        v = x * factor
    if RECIPE == COMPRESSED_TENSORS or RECIPE >= MODELOPT:
        # +0 of -0
        v = tl.where(v == 0, 0.0, v)
    return v


@triton.jit
def _random_bytes(block, seed):
    """(..., 16) bytes of blocks, as csrc/include/rlkern/math/philox.h has them."""
    zero = tl.zeros_like(block)
    c0, c1, c2, c3 = philox(block, zero, seed)
    element = tl.arange(0, 16)[None, None, :]
    word = tl.where(element < 4, c0[:, :, None], c1[:, :, None])
    word = tl.where(element < 8, word, tl.where(element < 12, c2[:, :, None], c3[:, :, None]))
    return ((word >> (8 * (element % 4)).to(tl.uint32)) & 0xFF).to(tl.int32)


@triton.jit
def _e2m1_stochastic(x, byte):
    bits = bits_of(x)
    magnitude = bits & MAGNITUDE
    a = tl.minimum(magnitude, 0x40C00000)
    power = tl.maximum(a & INFINITY_BITS, 0x3F800000)
    up = bits_of(float_of(a) + byte.to(tl.float32) * float_of(power - (9 << 23)))
    below1 = (up >= 0x3F000000).to(tl.int32)
    code = tl.where(up >= 0x3F800000, (up >> 22) - 252, below1)
    return code | tl.where(magnitude > INFINITY_BITS, 0, (bits >> 28) & 8)


@triton.jit
def _scale(b, encode, decode, RECIPE: tl.constexpr):
    """(codes, factor or divisor of elements) of blocks' largest magnitudes b."""
    if RECIPE == TE:
        code = e4m3(b * (encode * (1.0 / 6.0)))
        factor = _te_factor(from_e4m3(code), encode, RECIPE)
    elif RECIPE == FOUROVERSIX:
        code = e4m3(tl.div_rn(b, 6.0) * encode)
        factor = _te_factor(from_e4m3(code), encode, RECIPE)
    elif RECIPE == VLLM:
        code = e4m3(encode * (b * (1.0 / 6.0)))
        step = from_e4m3(code) * tl.div_rn(1.0, encode)
        factor = tl.where(step == 0, 0.0, tl.div_rn(1.0, step))
    elif RECIPE == COMPRESSED_TENSORS:
        code = e4m3(encode * tl.div_rn(b, 6.0))
        code = tl.where(code == 0, 0x20, code)
        factor = tl.div_rn(from_e4m3(code), encode)
    elif RECIPE == TORCHAO:
        scale = tl.div_rn(tl.div_rn(b, 6.0), decode)
        code = e4m3(tl.where(scale < 0.015625, 0.015625, scale))
        factor = tl.div_rn(tl.div_rn(1.0, decode), from_e4m3(code))
    else:
        scale = tl.div_rn(b, 6.0 * decode)
        scale = tl.where(scale == 0, 1.0, scale)
        code = e4m3(tl.where(scale < 0.001953125, 0.001953125, scale))
        factor = from_e4m3(code) * decode
    return code, factor


@triton.jit
def _halves(x, HIGH: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr):
    """Elements of even and of odd place of (HIGH, BLOCKS, COUNT)."""
    return tl.split(tl.reshape(x, (HIGH, BLOCKS, COUNT // 2, 2)))


@triton.jit
def _by_fours(x, HIGH: tl.constexpr, BLOCKS: tl.constexpr):
    """Elements 0, 1, 2 and 3 of (HIGH, BLOCKS, 4)."""
    even, odd = _halves(x, HIGH, BLOCKS, 4)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _sum_in_order(x, HIGH: tl.constexpr, BLOCKS: tl.constexpr, BY_HALVES: tl.constexpr):
    """Sums of sixteen elements from left to right; by halves, those of i and i + 8 first."""
    even, odd = _halves(x, HIGH, BLOCKS, 16)
    by0, by2 = _halves(even, HIGH, BLOCKS, 8)
    by1, by3 = _halves(odd, HIGH, BLOCKS, 8)
    x0, x4, x8, x12 = _by_fours(by0, HIGH, BLOCKS)
    x1, x5, x9, x13 = _by_fours(by1, HIGH, BLOCKS)
    x2, x6, x10, x14 = _by_fours(by2, HIGH, BLOCKS)
    x3, x7, x11, x15 = _by_fours(by3, HIGH, BLOCKS)
    if BY_HALVES:
        low = (x0 + x8) + (x1 + x9) + (x2 + x10) + (x3 + x11)
        return low + (x4 + x12) + (x5 + x13) + (x6 + x14) + (x7 + x15)
    low = x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
    return low + x8 + x9 + x10 + x11 + x12 + x13 + x14 + x15


@triton.jit
def _candidate(
    blocks,
    raw,
    amax,
    encode,
    RECIPE: tl.constexpr,
    SQUARES: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(codes of elements, of scales, errors, scaled elements) of block scales that are still
    float32."""
    scale = e4m3(raw)
    s = from_e4m3(scale)
    factor = _te_factor(s, encode, RECIPE)
    scaled = _scaled(blocks, factor[:, :, None], RECIPE)
    code = e2m1(scaled)
    off = tl.div_rn(from_e2m1(code) * s[:, :, None] * amax, 1536.0) - blocks
    off = off * off if SQUARES else tl.abs(off)
    return code, scale, _sum_in_order(off, HIGH, BLOCKS, RECIPE == FOUROVERSIX), scaled


@triton.jit(do_not_specialize=["seed"])
def _kernel(
    w,
    amax,
    codes,
    scales,
    decodes,
    previous,
    counts,
    seed,
    rows,
    columns,
    RECIPE: tl.constexpr,
    SQUARE: tl.constexpr,
    RULE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COUNTS: tl.constexpr,
    COMPARES: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    top = tl.load(amax)
    encode, decode = _global(top, RECIPE, 1536.0 if RULE else 2688.0)
    row = tl.program_id(0).to(tl.int64) * HIGH + tl.arange(0, HIGH)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(decodes, decode)
    live = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    x = tl.load(w + at, mask=live, other=0.0).to(tl.float32)
    blocks = tl.reshape(x, (HIGH, WIDE // 16, 16))
    magnitude = bits_of(blocks) & MAGNITUDE
    if RECIPE == TE:
        magnitude = tl.where(magnitude > INFINITY_BITS, 0, magnitude)
    most = tl.max(magnitude, 2)
    if SQUARE:
        most = tl.broadcast_to(tl.max(most, 0)[None, :], (HIGH, WIDE // 16))
    if RULE:
        raw = tl.div_rn(float_of(most), 6.0) * encode
        six, scale6, error6, scaled6 = _candidate(
            blocks, raw, top, encode, RECIPE, RULE == 1, HIGH, WIDE // 16
        )
        raw = raw * 1.5
        four, scale4, error4, scaled4 = _candidate(
            blocks, raw, top, encode, RECIPE, RULE == 1, HIGH, WIDE // 16
        )
        better = error4 < error6
        scale = tl.where(better, scale4, scale6)
        code = tl.where(better[:, :, None], four, six)
        v = tl.where(better[:, :, None], scaled4, scaled6)
    else:
        scale, factor = _scale(float_of(most), encode, decode, RECIPE)
        v = _scaled(blocks, factor[:, :, None], RECIPE)
        if STOCHASTIC:
            across = columns // 16
            block = tl.program_id(1) * (WIDE // 16) + tl.arange(0, WIDE // 16)
            index = row[:, None] * across + block[None, :]
            code = _e2m1_stochastic(v, _random_bytes(index, seed))
        else:
            code = e2m1(v)
    block = tl.program_id(1) * (WIDE // 16) + tl.arange(0, WIDE // 16)
    at_scale = row[:, None] * (columns // 16) + block[None, :]
    exists = (row < rows)[:, None] & (block < columns // 16)[None, :]
    tl.store(scales + at_scale, scale.to(tl.uint8), mask=exists)
    low, high = tl.split(tl.reshape(code, (HIGH, WIDE // 2, 2)))
    pair = tl.program_id(1) * (WIDE // 2) + tl.arange(0, WIDE // 2)
    at_pair = row[:, None] * (columns // 2) + pair[None, :]
    both = (row < rows)[:, None] & (pair < columns // 2)[None, :]
    tl.store(codes + at_pair, (low | (high << 4)).to(tl.uint8), mask=both)
    if COUNTS:
        changed = tl.zeros((HIGH, WIDE // 2, 2), tl.int32) != 0
        if COMPARES:
            before = tl.load(previous + at_pair, mask=both, other=0).to(tl.int32)
            changed = tl.join(low != (before & 15), high != (before >> 4))
        magnitude = code & 7
        value = from_e2m1(magnitude) * from_e4m3(scale)[:, :, None] * decode
        wide: tl.constexpr = (HIGH, WIDE // 16, 16)
        total = counts_of(
            tl.reshape(changed, wide),
            v,
            0x40C00000,
            blocks,
            magnitude,
            value,
            tl.reshape(live, wide),
        )
        mine = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(counts + mine * 8 + tl.arange(0, 8), total)


def forward(
    w: Tensor,
    amax: Tensor | None,
    previous: Tensor | None,
    recipe: int,
    square: bool,
    rule: int,
    stochastic: bool,
    seed: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = w.shape
    codes = w.new_empty((rows, columns // 2), dtype=torch.uint8)
    scales = w.new_empty((rows, columns // 16), dtype=torch.uint8)
    decode = w.new_empty((), dtype=torch.float32)
    amax = tensor_amax(w, ignores_nan=recipe == TE.value) if amax is None else amax
    # one program at least, which writes what decodes
    grid = (max(1, triton.cdiv(rows, HIGH)), max(1, triton.cdiv(columns, WIDE)))
    counts = new_counts(w, grid[0] * grid[1], statistics)
    _kernel[grid](
        w,
        amax,
        codes,
        scales,
        decode,
        # a pointer that nothing reads where there is none
        codes if previous is None else previous,
        counts,
        seed,
        rows,
        columns,
        RECIPE=recipe,
        SQUARE=square,
        RULE=rule,
        STOCHASTIC=bool(stochastic),
        COUNTS=bool(statistics),
        COMPARES=previous is not None,
        HIGH=HIGH,
        WIDE=WIDE,
        num_warps=4,
        # else a square and its addition are rounded once, unlike on CPU
        enable_fp_fusion=False,
    )
    return codes, scales, decode, sum_counts(counts, statistics)
