"""NVFP4 in plain torch, bit by bit and recipe by recipe: the specification.

A is max |w| of the tensor, b that of a block, both by their bits (a NaN counts as larger than all);
S = 2688 / A, g = A / 2688; s8 = E4M3(scale), s = float(s8). In float32, as bracketed:

                       scale              element            decoded with
    te                 b (S (1/6))        w / (s (1/S))      g
    vllm               S (b (1/6))        w / (s (1/S))      1/S
    compressed_tensors S (b / 6)          w / (s / S)        1/S
    torchao            (b / 6) / g        w ((1/g) / s)      g
    modelopt           b / (6 g)          w / (s g)          g
    fouroversix        (b / 6) S          w / (s (1/S))      g

te, vllm and fouroversix multiply by the reciprocal of the divisor that is shown; S of
compressed_tensors is 2688 (1 / A). Special cases are in docs/ops/quantize_nvfp4.md.

Four over six, for te and fouroversix: S = 1536 / A, g = A / 1536. A block is encoded with the scale
(b / 6) S, and with 1.5 times that; the second is taken where the error of ((code s) A) / 1536,
summed over the block, is smaller. Errors are summed from left to right, by fouroversix those of
elements i and i + 8 first.
"""

import torch
from torch import Tensor

from rlkern.ops.quantize_fp8 import reference as fp8

RECIPES = ("te", "vllm", "compressed_tensors", "torchao", "modelopt", "fouroversix")
"""The schema carries a recipe as its index here; csrc and Triton follow the same order."""
RULES = (None, "mse", "mae")
"""How four over six adds up errors, by its index in the schema; None: one candidate alone."""
ADDS_ZERO = ("compressed_tensors", "modelopt", "fouroversix")
"""Recipes whose sign is that of x < 0 or sign(x): adding 0 makes +0 of -0."""
_MOST = torch.finfo(torch.float32).max
_TINY = torch.finfo(torch.float32).tiny
_SIXTH = 1.0 / 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def e2m1(x: Tensor) -> Tensor:
    """The codes nearest to float32 x, ties to even, saturating; 7 where x is NaN."""
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude.clamp(max=0x40C00000)  # 6
    # codes stand twice as far apart from 2 and again from 4 on: an adder each for the rounding
    far = (a >= 0x40000000).int() + (a >= 0x40800000).int()
    adder = 0x4A800000 + (far << 23)
    steps = (a.view(torch.float32) + adder.view(torch.float32)).view(torch.int32) - adder
    sign = torch.where(magnitude > 0x7F800000, 0, (bits >> 28) & 8)
    return ((steps + 2 * far) | sign).to(torch.uint8)


def philox(block: Tensor, seed: int, upper: Tensor | None = None) -> list[Tensor]:
    """The four random words (int64, below 2^32) of Philox4x32-10 for counters that are int64.

    upper: the upper half of counters of 128 bits.
    """
    mask = 0xFFFFFFFF

    def product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
        high = ((a >> 16) * b + ((a & 0xFFFF) * b >> 16)) >> 16
        return high, (a * b) & mask

    upper = torch.zeros_like(block) if upper is None else upper
    c = [block & mask, (block >> 32) & mask, upper & mask, (upper >> 32) & mask]
    key0, key1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high_a, low_a = product(c[0], 0xD2511F53)
        high_b, low_b = product(c[2], 0xCD9E8D57)
        c = [high_b ^ c[1] ^ key0, low_b, high_a ^ c[3] ^ key1, low_a]
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return c


def random_bytes(w: Tensor, seed: int) -> Tensor:
    """A byte for each element: byte e % 4 of word e / 4 of its block's counter, the index."""
    blocks = torch.arange(w.numel() // 16, device=w.device)
    words = torch.stack(philox(blocks, seed), 1)[:, :, None]
    shifts = torch.tensor((0, 8, 16, 24), device=w.device)
    return ((words >> shifts) & 0xFF).view(w.shape)


def e2m1_stochastic(x: Tensor, byte: Tensor) -> Tensor:
    """Up by byte / 256 of the step from a code to the next, then down to a code."""
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude.clamp(max=0x40C00000).view(torch.float32)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    a = a + byte.float() / 256 * step
    code = sum((a >= v).int() for v in _E2M1[1:8])
    sign = torch.where(magnitude > 0x7F800000, 0, (bits >> 28) & 8)
    return (code | sign).to(torch.uint8)


def from_e4m3(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def e2m1_values(codes: Tensor) -> Tensor:
    """(N, K) codes as float32."""
    return torch.tensor(_E2M1, device=codes.device)[codes.long()]


def global_scales(amax: Tensor, recipe: int, largest: float) -> tuple[Tensor, Tensor]:
    """(S, what decodes) of () float32 max |w|; largest is 6 times the largest block scale."""
    name = RECIPES[recipe]
    encode, decode = fp8.over(largest, amax), fp8.divided(amax, largest)
    if name in ("te", "fouroversix"):
        encode = torch.where((amax > 0) | amax.isnan() & (name != "te"), encode, 1.0)
        encode = torch.where(encode > _MOST, _MOST, encode)
        return torch.where(encode == 0, 1.0, encode), decode
    if name in ("vllm", "compressed_tensors"):
        if name == "compressed_tensors":
            encode = fp8.over(1.0, torch.where(amax < _TINY, _TINY, amax)) * largest
        encode = torch.where(encode.isfinite(), encode, 1.0)
        return encode, fp8.over(1.0, encode)
    return encode, decode


def te_factor(s: Tensor, encode: Tensor, recipe: int) -> Tensor:
    """1 / (s (1 / S)); where s is 0 the largest float32, of fouroversix 0."""
    factor = fp8.over(1.0, s * fp8.over(1.0, encode))
    if RECIPES[recipe] == "fouroversix":
        return torch.where(s == 0, 0.0, factor)
    return torch.where(factor > _MOST, _MOST, factor)


def block_scales(b: Tensor, encode: Tensor, decode: Tensor, recipe: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes of the blocks' scales, and the factor, or divisor, of their elements."""
    name = RECIPES[recipe]
    if name in ("te", "fouroversix"):
        raw = b * (encode * _SIXTH) if name == "te" else fp8.divided(b, 6.0) * encode
        codes = fp8.e4m3(raw)
        return codes, te_factor(from_e4m3(codes), encode, recipe)
    if name == "vllm":
        codes = fp8.e4m3(encode * (b * _SIXTH))
        step = from_e4m3(codes) * fp8.over(1.0, encode)
        return codes, torch.where(step == 0, 0.0, fp8.over(1.0, step))
    if name == "compressed_tensors":
        codes = fp8.e4m3(encode * fp8.divided(b, 6.0))
        codes = torch.where(codes == 0, 0x20, codes)  # 0.125
        return codes, from_e4m3(codes) / encode
    if name == "torchao":
        scale = fp8.divided(b, 6.0) / decode
        codes = fp8.e4m3(torch.where(scale < 2.0**-6, 2.0**-6, scale))
        return codes, fp8.over(1.0, decode) / from_e4m3(codes)
    scale = b / (6.0 * decode)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = fp8.e4m3(torch.where(scale < 2.0**-9, 2.0**-9, scale))
    return codes, from_e4m3(codes) * decode


def candidate(
    w: Tensor, raw: Tensor, amax: Tensor, encode: Tensor, recipe: int, rule: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, codes of scales, errors by block) of block scales that are still float32."""
    scales = fp8.e4m3(raw)
    s = from_e4m3(scales)
    x = w * fp8.spread(te_factor(s, encode, recipe), w, 1, 16)
    codes = e2m1(x + 0.0 if RECIPES[recipe] in ADDS_ZERO else x)
    off = fp8.divided(e2m1_values(codes) * fp8.spread(s, w, 1, 16) * amax, 1536.0) - w
    off = (off.abs() if RULES[rule] == "mae" else off * off).view(*raw.shape, 16)
    if RECIPES[recipe] == "fouroversix":
        off = off[..., :8] + off[..., 8:]
    error = off[..., 0].clone()
    for i in range(1, off.shape[-1]):
        error += off[..., i]
    return codes, scales, error


def four_over_six(
    w: Tensor, b: Tensor, amax: Tensor, encode: Tensor, recipe: int, rule: int
) -> tuple[Tensor, Tensor]:
    """(codes, codes of scales)."""
    raw = fp8.divided(b, 6.0) * encode
    six, scales6, error6 = candidate(w, raw, amax, encode, recipe, rule)
    four, scales4, error4 = candidate(w, raw * 1.5, amax, encode, recipe, rule)
    better = error4 < error6
    codes = torch.where(fp8.spread(better, w, 1, 16), four, six)
    return codes, torch.where(better, scales4, scales6)


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
    """Packed codes (N, K / 2) uint8, scales (N, K / 16) as uint8, () float32 that decodes, counts
    as those of quantize_fp8.

    amax, where given, is () float32 and stands for A. previous: the packed codes of the weights
    before. square: blocks are 16 x 16, their scales repeated for each row. rule: that of four over
    six, for te and fouroversix. stochastic: rounded by random bits of seed, but not with a rule.
    """
    w = w.float()
    name = RECIPES[recipe]
    rows = w.shape[0]
    magnitude = w.abs()
    if name == "te":
        magnitude = torch.where(magnitude.isnan(), 0.0, magnitude)
    if amax is None:
        amax = fp8.block_amax(magnitude, 0, 0).view(-1)
        amax = amax[0] if amax.numel() else w.new_zeros(())
    amax = amax.view(())
    encode, decode = global_scales(amax, recipe, 1536.0 if rule else 2688.0)
    b = fp8.block_amax(magnitude, 16 if square else 1, 16)
    if square:
        b = b.repeat_interleave(16, 0)[:rows]
    if rule:
        codes, scales = four_over_six(w, b, amax, encode, recipe, rule)
        factor = te_factor(from_e4m3(scales), encode, recipe)
    else:
        scales, factor = block_scales(b, encode, decode, recipe)
    factor = fp8.spread(factor, w, 1, 16)
    x = w / factor if name in ("compressed_tensors", "modelopt") else w * factor
    x = x + 0.0 if name in ADDS_ZERO else x
    if not rule:
        codes = e2m1_stochastic(x, random_bytes(w, seed)) if stochastic else e2m1(x)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    if not statistics:
        return packed, scales, decode.clone(), w.new_empty((0,), dtype=torch.float64)
    values = e2m1_values(codes) * fp8.spread(from_e4m3(scales), w, 1, 16) * decode
    changed = None
    if previous is not None:
        other = packed ^ previous
        changed = ((other & 15) != 0).int() + (other > 15).int()
    return packed, scales, decode.clone(), fp8.counts(w, x, 6.0, codes & 7, values, changed)
