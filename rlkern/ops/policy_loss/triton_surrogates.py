"""The surrogates of reference.py in Triton, under the same names, and their derivatives.

Each returns (loss, d loss / d logprob, low, high, capped). Comparisons ask for what is outside, so
that a NaN gets through; selects stand where minimum and maximum would lose one.
"""

import triton
import triton.language as tl

(
    CLIP,
    DETACHED,
    SOFT_GATE,
    HAZARD,
    MASK,
    DPPO_TV,
    DPPO_KL,
    GAMMA_WEIGHT,
    FLIPPED,
    QUADRATIC,
    REGRESSION,
    DYNAMIC,
    GEOMETRIC,
    REINFORCE,
    SHAPED,
    BALANCED,
    SQUARED,
    HINGE,
    TAPERED,
    BANDED,
) = (tl.constexpr(i) for i in range(20))


@triton.jit
def bounded(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def times(a, u):
    """a u, and 0 where a is 0 whatever u is."""
    return tl.where(a == 0, 0.0, a * u)


@triton.jit
def _clipped(a, r, outside, low, high, cap):
    up, down = a > 0, a < 0
    above, below, past = up & (r > high), down & (r < low), down & (r > cap)
    u = tl.where(above, high, tl.where(below, low, tl.where(past, cap, r)))
    k = tl.where(above | below | past | outside, 0.0, r)
    return -times(a, u), -times(a, k), below, above, past


@triton.jit
def _weighted(live, a, weight, low, high, capped):
    grad = -times(a, weight)
    return tl.where(grad == 0, 0.0, grad * live), grad, low, high, capped


@triton.jit
def _masked(live, a, r, below, above, cap):
    out = below | above
    weight = tl.where(out, 0.0, tl.where(r > cap, cap, r))
    return _weighted(live, a, weight, below, above, (r > cap) & (out == 0))


@triton.jit
def soft_gate(a, r, outside, p0, p1):
    tau = tl.where(a > 0, p0, p1)
    s = tl.exp(-tau * (r - 1.0))
    gate = 1.0 / (1.0 + s)
    tail = s * gate
    k = tl.where(tail == 0, 0.0, 4.0 * gate * tail * r)
    k = tl.where(outside, 0.0, k)
    return -times(a, 4.0 / tau * gate), -times(a, k)


@triton.jit
def hazard(a, z, outside, p0, p1, p2, p3, p4, p5):
    y = z / p0
    e = tl.exp(-2.0 * tl.abs(y))
    q = 1.0 / (1.0 + e)
    size = p0 * (1.0 - e) * q
    psi = tl.where(y < 0, -size, size)
    tail = tl.log(1.0 + tl.exp(-size))
    up = tl.where(psi < 0, 0.0, psi) + tail
    down = tl.where(psi > 0, 0.0, -psi) + tail
    zeta = tl.exp(p1 * tl.log(up / p2)) + tl.exp(p3 * tl.log(down / p4))
    value = p5 * tl.exp(psi - zeta)
    k = tl.where(outside, 0.0, value * (4.0 * e * q * q))
    return -times(a, value), -times(a, k)


@triton.jit
def ratio_mask(live, a, r, decided, p0, p1, p2):
    ratio = tl.exp(decided)
    return _masked(live, a, r, (a < 0) & (ratio < p0), (a > 0) & (ratio > p1), p2)


@triton.jit
def dppo_tv(live, old, a, r, p0, p1, p2, p3):
    moved = tl.exp(live) - tl.exp(old)
    both, up = p3 != 0, a > 0
    below = (moved < -p0) & (both | (up == 0))
    above = (moved > p1) & (both | up)
    return _masked(live, a, r, below, above, p2)


@triton.jit
def dppo_kl(live, old, a, r, p0, p1, p2):
    now, then, up = tl.exp(live), tl.exp(old), a > 0
    rest = tl.log((1.0 - then + 1e-8) / (1.0 - now + 1e-8))
    kl = then * (old - live) + (1.0 - then) * rest
    below = (up == 0) & (kl > p0) & (now < then)
    above = up & (kl > p1) & (now > then)
    return _masked(live, a, r, below, above, p2)


@triton.jit
def gamma_weight(a, z, p0, p1, p2, p3, p4):
    """The weight alone."""
    k = tl.where(a >= 0, p0, p2)
    rate = tl.where(a >= 0, p1, p3)
    z = tl.where(z < p4, p4, z)
    return tl.exp(rate + k * z - rate * tl.exp(z))


@triton.jit
def flipped(live, a, r, outside, p0, p1, p2):
    up, down = a > 0, a < 0
    below, above = down & (r < p0), up & (r > p1)
    held = tl.where(below, p0, tl.where(above, p1, r))
    weight = tl.where(up, 1.0 / held, held)
    capped = weight > p2
    value = tl.where(capped, p2 * live, weight)
    k = tl.where(capped, p2, tl.where(below | above | outside, 0.0, weight))
    return -times(a, value), -times(a, k), below, above, capped & (a != 0)


@triton.jit
def quadratic(a, r, outside, p0):
    pull, linear = r - 1.0, times(a, r)
    return p0 * pull * pull - linear, tl.where(outside, 0.0, 2.0 * p0 * pull * r - linear)


@triton.jit
def dynamic(old, a, r, outside, p0, p1, p2):
    inverse = 4.0 / tl.exp(old)
    room = 1.0 - p0 * inverse
    low = 0.5 + 0.5 * tl.sqrt(tl.where(room < 0, 0.0, room))
    high = 0.5 + 0.5 * tl.sqrt(1.0 + p1 * inverse)
    most = tl.maximum(p2, 10.0)
    return _clipped(a, r, outside, low, tl.where(high > most, most, high), p2)


@triton.jit
def geometric(a, x, r, outside, p0, p1):
    below, above = (a < 0) & (x < p0), (a > 0) & (x > p1)
    k = tl.where(below | above | outside, 0.0, r)
    return -times(a, r), -times(a, k), below, above


@triton.jit
def shaped(live, a, p0):
    now = tl.exp(live)
    inverse = 1.0 / (now + p0)
    share = now * inverse
    return -times(a, share), -times(a, p0 * share * inverse)


@triton.jit
def balanced(live, old, a, p0):
    now = tl.exp(live)
    rest = 1.0 - now
    rest = tl.where(rest < 0, 0.0, rest)
    pull = tl.exp(p0 * tl.log(rest))
    pull = tl.where(rest == 0, tl.where(p0 == 0, 1.0, 0.0), pull)
    return -times(a, 2.0 * now / (1.5 * tl.exp(old) + 0.5) * pull)


@triton.jit
def hinge(a, x, p0, p1, p2):
    up = a > 0
    gap = tl.where(up, p0 - x, p2 * (x + p1))
    slope = tl.where(up, -1.0, p2)
    idle = gap <= 0
    size = tl.abs(a)
    loss = times(size, tl.where(idle, 0.0, gap))
    return loss, times(size, tl.where(idle, 0.0, slope)), (a < 0) & idle, up & idle


@triton.jit
def surrogate(
    live,
    old,
    a,
    x,
    decided,
    z,
    r,
    outside,
    length,
    p0,
    p1,
    p2,
    p3,
    p4,
    p5,
    SURROGATE: tl.constexpr,
):
    """(loss, d loss / d logprob, low, high, capped) of the surrogate with that code."""
    none = (a > 0) & (a < 0)
    low, high, capped = none, none, none
    if SURROGATE == CLIP:
        loss, grad, low, high, capped = _clipped(a, r, outside, p0, p1, p2)
    elif SURROGATE == DETACHED:
        weight = bounded(r, p0, p1)
        loss, grad, low, high, capped = _weighted(live, a, weight, r < p0, r > p1, none)
    elif SURROGATE == SOFT_GATE:
        loss, grad = soft_gate(a, r, outside, p0, p1)
    elif SURROGATE == HAZARD:
        loss, grad = hazard(a, z, outside, p0, p1, p2, p3, p4, p5)
    elif SURROGATE == MASK:
        loss, grad, low, high, capped = ratio_mask(live, a, r, decided, p0, p1, p2)
    elif SURROGATE == DPPO_TV:
        loss, grad, low, high, capped = dppo_tv(live, old, a, r, p0, p1, p2, p3)
    elif SURROGATE == DPPO_KL:
        loss, grad, low, high, capped = dppo_kl(live, old, a, r, p0, p1, p2)
    elif SURROGATE == GAMMA_WEIGHT:
        weight = gamma_weight(a, z, p0, p1, p2, p3, p4)
        loss, grad, low, high, capped = _weighted(live, a, weight, none, none, none)
    elif SURROGATE == FLIPPED:
        loss, grad, low, high, capped = flipped(live, a, r, outside, p0, p1, p2)
    elif SURROGATE == QUADRATIC:
        loss, grad = quadratic(a, r, outside, p0)
    elif SURROGATE == REGRESSION:
        loss, grad = 0.5 * p0 * x * x - times(a, live), p0 * x - a
    elif SURROGATE == DYNAMIC:
        loss, grad, low, high, capped = dynamic(old, a, r, outside, p0, p1, p2)
    elif SURROGATE == GEOMETRIC:
        loss, grad, low, high = geometric(a, x, r, outside, p0, p1)
    elif SURROGATE == REINFORCE:
        loss, grad = -times(a, live), -a
    elif SURROGATE == SHAPED:
        loss, grad = shaped(live, a, p0)
    elif SURROGATE == BALANCED:
        loss = balanced(live, old, a, p0)
        grad = loss
    elif SURROGATE == SQUARED:
        gap = p0 * x - a
        loss, grad = gap * gap, 2.0 * p0 * gap
    elif SURROGATE == HINGE:
        loss, grad, low, high = hinge(a, x, p0, p1, p2)
    elif SURROGATE == TAPERED:
        up = a > 0
        weight = tl.where(up, p0, p1 * tl.where(r > 1, 1.0, r))
        loss, grad, low, high, capped = _weighted(live, a, weight, none, (r > 1) & (up == 0), none)
    else:
        tl.static_assert(SURROGATE == BANDED)
        bound = tl.exp(p0 * tl.sqrt(length))
        loss, grad, low, high, capped = _clipped(a, r, outside, 1.0 / bound, bound, float("inf"))
    return loss, grad, low, high, capped
