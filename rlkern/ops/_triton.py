"""What Triton kernels of several ops need."""

import os

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16 in tl.dot (seen in triton 3.9): kernels
# widen the operands first when it runs them. The products are exact either way.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def inverse(temperature, logit_scale, HAS_CAP: tl.constexpr):
    """1 / temperature, with the scale where no soft cap takes it."""
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
