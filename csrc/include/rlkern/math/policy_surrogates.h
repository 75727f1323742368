// The surrogate of one token: its loss from the ratio and the advantage, and the derivative. What
// each computes stands in rlkern/ops/policy_loss/reference.py, under the same name.
//
// F is float or a vector of floats. Every comparison stands in one select and nowhere else: GCC
// takes a comparison of vectors that is used twice apart lane by lane. All are written so that a
// NaN gets through.
#pragma once

#include <cmath>

#include "rlkern/macros.h"
#include "rlkern/math/exp.h"
#include "rlkern/math/log.h"

namespace rlkern {

// In the order of SURROGATES in reference.py.
enum class SurrogateKind : int {
  kClip,
  kDetached,
  kSoftGate,
  kHazard,
  kMask,
  kDppoTv,
  kDppoKl,
  kGammaWeight,
  kFlipped,
  kQuadratic,
  kRegression,
  kDynamic,
  kGeometric,
  kReinforce,
  kShaped,
  kBalanced,
  kSquared,
  kHinge,
  kTapered,
  kBanded,
};

// What a surrogate sees of a token.
template <class F>
struct PolicyToken {
  F live, old;  // logprob, and what the ratio is taken against
  F a;          // advantage
  F x;          // live - old of the token itself
  F decided;    // live - old_logprob of the token itself, clamped
  F z, r;       // x or its statistic, clamped; its exponential
  F past;       // how much the clamp took off
  F length;     // tokens of the sequence; kBanded alone
};

template <class F>
struct Surrogate {
  F loss;
  F grad;               // d loss / d logprob
  F low, high, capped;  // 1 where that bound holds the loss
};

template <class F>
RLK_HD F bounded(F x, F low, F high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
template <class F>
RLK_HD F at_most(F x, float high) {
  return x > high ? F{} + high : x;
}
template <class F>
RLK_HD F at_least_zero(F x) {
  return x < 0.0f ? F{} : x;
}
// a u, and 0 where a is 0 whatever u is
template <class F>
RLK_HD F times(F a, F u) {
  return a == 0.0f ? F{} : a * u;
}
// 1 or 0
template <class F>
RLK_HD F is_above(F x, F bound) {
  return x > bound ? F{} + 1.0f : F{};
}
template <class F>
RLK_HD F is_below(F x, F bound) {
  return x < bound ? F{} + 1.0f : F{};
}
template <class F>
RLK_HD F zero_where(F flag, F x) {
  return flag > 0.0f ? F{} : x;
}

// -min(r A, clip(r) A), at most -cap A for A < 0
template <class F>
RLK_HD Surrogate<F> clipped(const PolicyToken<F>& t, F low, F high, F cap) {
  const F r = t.a == 0.0f ? F{} + 1.0f : t.r;
  low = t.a > 0.0f ? F{} - INFINITY : low;
  high = t.a < 0.0f ? cap : high;
  const F u = bounded(r, low, high);
  const F moved = r - u;
  const F k = zero_where(moved * moved + t.past * t.past, r);
  const F above = t.a * is_above(r, u);
  return {-t.a * u, -t.a * k, is_below(r, u), is_above(above, F{}), is_below(above, F{})};
}

// -sg[weight] A logprob
template <class F>
RLK_HD Surrogate<F> weighted(const PolicyToken<F>& t, F weight, F low, F high, F capped) {
  const F grad = -times(t.a, weight);
  return {grad == 0.0f ? F{} : grad * t.live, grad, low, high, capped};
}

// The same, the weight min(r, cap), where the token is masked neither above nor below.
template <class F>
RLK_HD Surrogate<F> masked(const PolicyToken<F>& t, F below, F above, float cap) {
  const F out = below + above;
  return weighted(t, zero_where(out, at_most(t.r, cap)), below, above,
                  zero_where(out, is_above(t.r, F{} + cap)));
}

template <class F>
RLK_HD Surrogate<F> soft_gate(const PolicyToken<F>& t, const float* p) {
  const F tau = t.a > 0.0f ? F{} + p[0] : F{} + p[1];
  const F s = exp(-tau * (t.r - 1.0f));  // at most exp(tau)
  const F gate = 1.0f / (1.0f + s), tail = s * gate;
  F k = tail == 0.0f ? F{} : 4.0f * gate * tail * t.r;
  k = zero_where(t.past * t.past, k);
  return {-times(t.a, 4.0f / tau * gate), -times(t.a, k), F{}, F{}, F{}};
}

template <class F>
RLK_HD F power(F x, float k) {
  return k == 1.0f ? x : k == 2.0f ? x * x : exp(k * log(x));
}

template <class F>
RLK_HD Surrogate<F> hazard(const PolicyToken<F>& t, const float* p) {
  // tanh from exp(-2 |z / c|): its square tells 1 - tanh^2 apart from 0 far out
  const F y = t.z * (1.0f / p[0]);
  const F away = y < 0.0f ? -y : y;
  const F e = exp(-2.0f * away), q = 1.0f / (1.0f + e);
  const F size = p[0] * (1.0f - e) * q;
  const F psi = y < 0.0f ? -size : size;
  // softplus of psi and of -psi, from log(1 + exp(-|psi|))
  const F tail = log(1.0f + exp(-size));
  const F up = at_least_zero(psi) + tail, down = at_least_zero(-psi) + tail;
  const F zeta = power(up * (1.0f / p[2]), p[1]) + power(down * (1.0f / p[4]), p[3]);
  const F value = p[5] * exp(psi - zeta);
  const F k = zero_where(t.past * t.past, value * (4.0f * e * q * q));
  return {-times(t.a, value), -times(t.a, k), F{}, F{}, F{}};
}

template <class F>
RLK_HD Surrogate<F> ratio_mask(const PolicyToken<F>& t, const float* p) {
  const F ratio = exp(t.decided);
  const F below = is_below(t.a, F{}) * is_below(ratio, F{} + p[0]);
  const F above = is_above(t.a, F{}) * is_above(ratio, F{} + p[1]);
  return masked(t, below, above, p[2]);
}

template <class F>
RLK_HD Surrogate<F> dppo_tv(const PolicyToken<F>& t, const float* p) {
  const F moved = exp(t.live) - exp(t.old), up = is_above(t.a, F{});
  F below = is_below(moved, F{} - p[0]), above = is_above(moved, F{} + p[1]);
  if (p[3] == 0.0f) {
    below *= 1.0f - up;
    above *= up;
  }
  return masked(t, below, above, p[2]);
}

template <class F>
RLK_HD Surrogate<F> dppo_kl(const PolicyToken<F>& t, const float* p) {
  const F now = exp(t.live), then = exp(t.old), up = is_above(t.a, F{});
  const F rest = log((1.0f - then + 1e-8f) / (1.0f - now + 1e-8f));
  const F kl = then * (t.old - t.live) + (1.0f - then) * rest;
  const F below = (1.0f - up) * is_above(kl, F{} + p[0]) * is_below(now, then);
  const F above = up * is_above(kl, F{} + p[1]) * is_above(now, then);
  return masked(t, below, above, p[2]);
}

template <class F>
RLK_HD Surrogate<F> gamma_weight(const PolicyToken<F>& t, const float* p) {
  const F k = t.a >= 0.0f ? F{} + p[0] : F{} + p[2];
  const F rate = t.a >= 0.0f ? F{} + p[1] : F{} + p[3];
  const F z = t.z < p[4] ? F{} + p[4] : t.z;
  return weighted(t, exp(rate + k * z - rate * exp(z)), F{}, F{}, F{});
}

template <class F>
RLK_HD Surrogate<F> flipped(const PolicyToken<F>& t, const float* p) {
  const F low = t.a < 0.0f ? F{} + p[0] : F{} - INFINITY;
  const F high = t.a > 0.0f ? F{} + p[1] : F{} + INFINITY;
  const F held = bounded(t.r, low, high);
  const F weight = t.a > 0.0f ? 1.0f / held : held;
  const F capped = is_above(weight, F{} + p[2]);
  const F moved = t.r - held;
  const F k = zero_where(moved * moved + t.past * t.past, weight);
  const F value = capped > 0.0f ? p[2] * t.live : weight;
  const F slope = capped > 0.0f ? F{} + p[2] : k;
  return {-times(t.a, value), -times(t.a, slope), is_below(t.r, held), is_above(t.r, held),
          t.a == 0.0f ? F{} : capped};
}

template <class F>
RLK_HD Surrogate<F> quadratic(const PolicyToken<F>& t, const float* p) {
  const F pull = t.r - 1.0f, linear = times(t.a, t.r);
  const F k = 2.0f * p[0] * pull * t.r - linear;
  return {p[0] * pull * pull - linear, zero_where(t.past * t.past, k), F{}, F{}, F{}};
}

template <class F>
RLK_HD Surrogate<F> regression(const PolicyToken<F>& t, const float* p) {
  return {0.5f * p[0] * t.x * t.x - times(t.a, t.live), p[0] * t.x - t.a, F{}, F{}, F{}};
}

template <class F>
RLK_HD Surrogate<F> dynamic(const PolicyToken<F>& t, const float* p) {
  const F inverse = 4.0f / exp(t.old);
  const F low = 0.5f + 0.5f * sqrt(at_least_zero(1.0f - p[0] * inverse));
  const F high = 0.5f + 0.5f * sqrt(1.0f + p[1] * inverse);
  return clipped(t, low, at_most(high, p[2] > 10.0f ? p[2] : 10.0f), F{} + p[2]);
}

template <class F>
RLK_HD Surrogate<F> geometric(const PolicyToken<F>& t, const float* p) {
  const F below = is_below(t.a, F{}) * is_below(t.x, F{} + p[0]);
  const F above = is_above(t.a, F{}) * is_above(t.x, F{} + p[1]);
  const F k = zero_where(below + above + t.past * t.past, t.r);
  return {-times(t.a, t.r), -times(t.a, k), below, above, F{}};
}

template <class F>
RLK_HD Surrogate<F> shaped(const PolicyToken<F>& t, const float* p) {
  const F now = exp(t.live), inverse = 1.0f / (now + p[0]), share = now * inverse;
  return {-times(t.a, share), -times(t.a, p[0] * share * inverse), F{}, F{}, F{}};
}

template <class F>
RLK_HD Surrogate<F> balanced(const PolicyToken<F>& t, const float* p) {
  const F now = exp(t.live), rest = at_least_zero(1.0f - now);
  const F pull = p[0] == 0.0f ? F{} + 1.0f : p[0] == 0.5f ? sqrt(rest) : power(rest, p[0]);
  const F loss = -times(t.a, 2.0f * now / (1.5f * exp(t.old) + 0.5f) * pull);
  return {loss, loss, F{}, F{}, F{}};
}

template <class F>
RLK_HD Surrogate<F> squared(const PolicyToken<F>& t, const float* p) {
  const F gap = p[0] * t.x - t.a;
  return {gap * gap, 2.0f * p[0] * gap, F{}, F{}, F{}};
}

template <class F>
RLK_HD Surrogate<F> hinge(const PolicyToken<F>& t, const float* p) {
  const F up = is_above(t.a, F{}), size = t.a < 0.0f ? -t.a : t.a;
  const F gap = t.a > 0.0f ? p[0] - t.x : p[2] * (t.x + p[1]);
  const F slope = t.a > 0.0f ? F{} - 1.0f : F{} + p[2];
  const F idle = gap <= 0.0f ? F{} + 1.0f : F{};
  return {times(size, zero_where(idle, gap)), times(size, zero_where(idle, slope)),
          is_below(t.a, F{}) * idle, up * idle, F{}};
}

template <class F>
RLK_HD Surrogate<F> tapered(const PolicyToken<F>& t, const float* p) {
  const F up = is_above(t.a, F{});
  const F weight = t.a > 0.0f ? F{} + p[0] : p[1] * at_most(t.r, 1.0f);
  return weighted(t, weight, F{}, (1.0f - up) * is_above(t.r, F{} + 1.0f), F{});
}

template <class F>
RLK_HD Surrogate<F> banded(const PolicyToken<F>& t, const float* p) {
  const F bound = exp(p[0] * sqrt(t.length));
  return clipped(t, 1.0f / bound, bound, F{} + INFINITY);
}

template <class F>
RLK_HD Surrogate<F> surrogate(SurrogateKind kind, const PolicyToken<F>& t, const float* p) {
  switch (kind) {
    case SurrogateKind::kClip:
      return clipped(t, F{} + p[0], F{} + p[1], F{} + p[2]);
    case SurrogateKind::kDetached:
      return weighted(t, bounded(t.r, F{} + p[0], F{} + p[1]), is_below(t.r, F{} + p[0]),
                      is_above(t.r, F{} + p[1]), F{});
    case SurrogateKind::kSoftGate:
      return soft_gate(t, p);
    case SurrogateKind::kHazard:
      return hazard(t, p);
    case SurrogateKind::kMask:
      return ratio_mask(t, p);
    case SurrogateKind::kDppoTv:
      return dppo_tv(t, p);
    case SurrogateKind::kDppoKl:
      return dppo_kl(t, p);
    case SurrogateKind::kGammaWeight:
      return gamma_weight(t, p);
    case SurrogateKind::kFlipped:
      return flipped(t, p);
    case SurrogateKind::kQuadratic:
      return quadratic(t, p);
    case SurrogateKind::kRegression:
      return regression(t, p);
    case SurrogateKind::kDynamic:
      return dynamic(t, p);
    case SurrogateKind::kGeometric:
      return geometric(t, p);
    case SurrogateKind::kReinforce:
      return {-times(t.a, t.live), -t.a, F{}, F{}, F{}};
    case SurrogateKind::kShaped:
      return shaped(t, p);
    case SurrogateKind::kBalanced:
      return balanced(t, p);
    case SurrogateKind::kSquared:
      return squared(t, p);
    case SurrogateKind::kHinge:
      return hinge(t, p);
    case SurrogateKind::kTapered:
      return tapered(t, p);
    case SurrogateKind::kBanded:
      return banded(t, p);
  }
  return {F{}, F{}, F{}, F{}, F{}};
}

}  // namespace rlkern
