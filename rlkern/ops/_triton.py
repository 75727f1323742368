"""What Triton kernels of several ops need.

x are logits after their soft cap, z = x inv with inv = `inverse(...)`; a row's running statistics
over the columns seen so far are top = max x, and sums of e^d, e^d d and so on with
d = (x - top) inv (csrc/include/rlkern/math/softmax_stats.h).
"""

import os

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16 in tl.dot (seen in triton 3.9): kernels
# widen the operands first when it runs them. The products are exact either way.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRUNCATES = tl.constexpr(INTERPRETED)
# Below this, exp is 0 in float32: clamping there keeps 0 * -inf out of the entropy.
UNDERFLOW = tl.constexpr(-104.0)


@triton.jit
def inverse(row_temperature, row, temperature, logit_scale, HAS_CAP: tl.constexpr):
    """1 / the temperature of the rows, times the scale where no soft cap takes it."""
    if row_temperature is not None:
        temperature = tl.load(row_temperature + row)
    if HAS_CAP:
        return 1.0 / temperature
    return logit_scale / temperature


@triton.jit
def softcapped(x, logit_scale, softcap):
    """softcap tanh(logit_scale x / softcap), with tanh(u) = 1 - 2 / (e^{2u} + 1)."""
    e = tl.exp(x * (2.0 * logit_scale / softcap))
    return softcap * (1.0 - 2.0 / (e + 1.0))


@triton.jit
def softcap_slope(y, logit_scale, softcap):
    """The derivative of softcapped at the capped value y."""
    t = y / softcap
    return logit_scale * (1.0 - t * t)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x to the nearest of dtype, ties to even; the interpreter truncates to bfloat16."""
    if TRUNCATES and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def clamped(d):
    """No lower than exp reaches; a where, not a maximum, so that a NaN reaches the result."""
    return tl.where(d < UNDERFLOW, UNDERFLOW, d)


@triton.jit
def finite(top):
    """While all logits are -inf any finite reference point gives sums of 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def exp_below(x, anchor, inv):
    """(e^d, d) for d = (x - anchor) inv: of logits, or of sums that move to a higher anchor."""
    d = clamped((x - anchor) * inv)
    return tl.exp(d), d


@triton.jit
def gradient_constants(a, grad_logsumexp, grad_entropy, entropy, row):
    """(constant, b) of dL/dz_j = a 1[j = target] + p_j (constant - b log p_j).

    constant = c - a - b H, with c and b the gradients of logsumexp and entropy, 0 where None.
    """
    constant = -a
    if grad_logsumexp is not None:
        constant += tl.load(grad_logsumexp + row)
    b = 0.0
    if grad_entropy is not None:
        b = tl.load(grad_entropy + row)
        constant -= b * tl.load(entropy + row)
    return constant, b


@triton.jit
def _product_high(a, b):
    return tl.umulhi(a, tl.full(a.shape, b, tl.uint32))


@triton.jit
def philox(lower, upper, seed):
    """The four words of int64 halves of a counter (csrc/include/rlkern/math/philox.h)."""
    c0 = lower.to(tl.uint32)
    c1 = (lower >> 32).to(tl.uint32)
    c2 = upper.to(tl.uint32)
    c3 = (upper >> 32).to(tl.uint32)
    # a launcher passes a small one as 32 bits
    wide = tl.cast(seed, tl.int64)
    key0 = wide & 0xFFFFFFFF
    key1 = (wide >> 32) & 0xFFFFFFFF
    for _ in tl.static_range(10):
        high_a = _product_high(c0, 0xD2511F53)
        low_a = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        high_b = _product_high(c2, 0xCD9E8D57)
        low_b = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0 = high_b ^ c1 ^ key0.to(tl.uint32)
        c2 = high_a ^ c3 ^ key1.to(tl.uint32)
        c1 = low_b
        c3 = low_a
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
