// The surrogate of one token: its loss from the ratio and the advantage, and the derivative. What
// each computes stands in rlkern/ops/policy_loss/reference.py, under the same name.
//
// F is float or a vector of floats. Comparisons give masks of integers, and selects are bit
// operations on them: GCC takes a comparison of vectors that stands in two selects apart lane by
// lane, and finds those that are the same. All are written so that a NaN gets through.
#pragma once

#include <cmath>

#include "rlkern/macros.h"
#include "rlkern/math/exp.h"
#include "rlkern/math/log.h"
#include "rlkern/math/mask.h"

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
  kCount,
};

// What a surrogate sees of a token.
template <class F>
struct PolicyToken {
  F live, old;   // logprob, and what the ratio is taken against
  F a;           // advantage
  F x;           // live - old of the token itself
  F decided;     // live - old_logprob of the token itself, clamped
  F z, r;        // x or its statistic, clamped; its exponential
  Mask<F> past;  // where z was clamped
  F length;      // tokens of the sequence; kBanded alone
};

template <class F>
struct Surrogate {
  F loss;
  F grad;                     // d loss / d logprob
  Mask<F> low, high, capped;  // where that bound holds the loss
};

template <class F>
RLK_HD F at_most(F x, float high) {
  return lesser(F{} + high, x);
}
template <class F>
RLK_HD F at_least_zero(F x) {
  return greater(F{}, x);
}
// a u, and 0 where a is 0 whatever u is
template <class F>
RLK_HD F times(F a, F u) {
  return times_where(differs(a, F{}), a, u);
}
// -min(r A, clip(r) A), at most -cap A for A < 0
template <class F>
RLK_HD Surrogate<F> clipped(const PolicyToken<F>& t, F low, F high, F cap) {
  const Mask<F> up = is_above(t.a, F{}), down = is_above(F{}, t.a);
  const Mask<F> below = down & is_above(low, t.r), above = up & is_above(t.r, high);
  const Mask<F> capped = down & is_above(t.r, cap);
  const F u = select(below, low, select(above, high, select(capped, cap, t.r)));
  const F k = unless(below | above | capped | t.past, t.r);
  return {times(-t.a, u), times(-t.a, k), below, above, capped};
}

// -sg[weight] A logprob
template <class F>
RLK_HD Surrogate<F> weighted(const PolicyToken<F>& t, F weight, Mask<F> low, Mask<F> high,
                             Mask<F> capped) {
  const F grad = times(-t.a, weight);
  return {times(grad, t.live), grad, low, high, capped};
}

// The same, the weight min(r, cap), where the token is masked neither above nor below.
template <class F>
RLK_HD Surrogate<F> masked(const PolicyToken<F>& t, Mask<F> below, Mask<F> above, float cap) {
  const Mask<F> out = below | above, capped = is_above(t.r, F{} + cap);
  return weighted(t, unless(out, select(capped, F{} + cap, t.r)), below, above, capped & ~out);
}

template <class F>
RLK_HD Surrogate<F> smooth(F loss, F grad) {
  return {loss, grad, Mask<F>{}, Mask<F>{}, Mask<F>{}};
}

template <class F>
RLK_HD Surrogate<F> soft_gate(const PolicyToken<F>& t, const float* p) {
  const F tau = select(is_above(t.a, F{}), F{} + p[0], F{} + p[1]);
  const F s = exp(-tau * (t.r - 1.0f));  // at most exp(tau)
  const F gate = 1.0f / (1.0f + s), tail = s * gate;
  const F k = unless(is_equal(tail, F{}) | t.past, 4.0f * gate * tail * t.r);
  return smooth<F>(-times(t.a, 4.0f / tau * gate), -times(t.a, k));
}

template <class F>
RLK_HD F power(F x, float k) {
  if (k == 1.0f) return x;
  if (k == 1.5f) return x * sqrt(x);
  if (k == 2.0f) return x * x;
  return exp(k * log(x));
}

// The mean of softplus(x) and softplus(-x), log(2 cosh(x / 2)), for 0 <= x <= limit.
template <class F>
RLK_HD F softplus_mean(F x, float limit) {
  if (limit > 2.0f) return 0.5f * x + log(1.0f + exp_decay(-x));
  // minimax in x^2 on [0, 4]: within 1e-8
  const F u = x * x, square = u * u;
  const F low = u * 1.2499977e-1f + 6.9314718e-1f, middle = u * 3.4566270e-4f - 5.2073533e-3f;
  const F high = u * 1.6306111e-6f - 2.5142672e-5f;
  return ((square * -6.2557362e-8f + high) * square + middle) * square + low;
}

template <class F>
RLK_HD Surrogate<F> hazard(const PolicyToken<F>& t, const float* p) {
  // tanh from exp(-2 |z / c|): its square tells 1 - tanh^2 apart from 0 far out
  const F y = t.z * (1.0f / p[0]);
  const Mask<F> negative = is_above(F{}, y);
  const F e = exp_decay(-2.0f * select(negative, -y, y)), q = 1.0f / (1.0f + e);
  const F size = p[0] * (1.0f - e) * q, psi = select(negative, -size, size);
  // softplus of psi and of -psi
  const F mean = softplus_mean(size, p[0]), up = mean + 0.5f * psi, down = mean - 0.5f * psi;
  const F zeta = power(up * (1.0f / p[2]), p[1]) + power(down * (1.0f / p[4]), p[3]);
  const F value = p[5] * exp_normal(bounded(psi - zeta, F{} - kExpNormal, F{} + kExpNormal));
  const F k = unless(t.past, value * (4.0f * e * q * q));
  return smooth<F>(times(-t.a, value), times(-t.a, k));
}

template <class F>
RLK_HD Surrogate<F> ratio_mask(const PolicyToken<F>& t, const float* p) {
  const F ratio = exp(t.decided);
  return masked(t, is_above(F{}, t.a) & is_above(F{} + p[0], ratio),
                is_above(t.a, F{}) & is_above(ratio, F{} + p[1]), p[2]);
}

template <class F>
RLK_HD Surrogate<F> dppo_tv(const PolicyToken<F>& t, const float* p) {
  const F moved = exp(t.live) - exp(t.old);
  Mask<F> below = is_above(F{} - p[0], moved), above = is_above(moved, F{} + p[1]);
  if (p[3] == 0.0f) {
    const Mask<F> up = is_above(t.a, F{});
    below &= ~up;
    above &= up;
  }
  return masked(t, below, above, p[2]);
}

template <class F>
RLK_HD Surrogate<F> dppo_kl(const PolicyToken<F>& t, const float* p) {
  const F now = exp(t.live), then = exp(t.old);
  const Mask<F> up = is_above(t.a, F{});
  const F rest = log((1.0f - then + 1e-8f) / (1.0f - now + 1e-8f));
  const F kl = then * (t.old - t.live) + (1.0f - then) * rest;
  return masked(t, ~up & is_above(kl, F{} + p[0]) & is_above(then, now),
                up & is_above(kl, F{} + p[1]) & is_above(now, then), p[2]);
}

template <class F>
RLK_HD Surrogate<F> gamma_weight(const PolicyToken<F>& t, const float* p) {
  const Mask<F> down = is_above(F{}, t.a);
  const F k = select(down, F{} + p[2], F{} + p[0]), rate = select(down, F{} + p[3], F{} + p[1]);
  const F z = select(is_above(F{} + p[4], t.z), F{} + p[4], t.z);
  return weighted(t, exp(rate + k * z - rate * exp(z)), Mask<F>{}, Mask<F>{}, Mask<F>{});
}

template <class F>
RLK_HD Surrogate<F> flipped(const PolicyToken<F>& t, const float* p) {
  const Mask<F> up = is_above(t.a, F{});
  const Mask<F> below = is_above(F{}, t.a) & is_above(F{} + p[0], t.r);
  const Mask<F> above = up & is_above(t.r, F{} + p[1]);
  const F held = select(below, F{} + p[0], select(above, F{} + p[1], t.r));
  const F weight = select(up, 1.0f / held, held);
  const Mask<F> capped = is_above(weight, F{} + p[2]);
  const F value = select(capped, p[2] * t.live, weight);
  const F k = select(capped, F{} + p[2], unless(below | above | t.past, weight));
  return {-times(t.a, value), -times(t.a, k), below, above, capped & ~is_equal(t.a, F{})};
}

template <class F>
RLK_HD Surrogate<F> quadratic(const PolicyToken<F>& t, const float* p) {
  const F pull = t.r - 1.0f, linear = times(t.a, t.r);
  const F k = 2.0f * p[0] * pull * t.r - linear;
  return smooth<F>(p[0] * pull * pull - linear, unless(t.past, k));
}

template <class F>
RLK_HD Surrogate<F> regression(const PolicyToken<F>& t, const float* p) {
  return smooth<F>(0.5f * p[0] * t.x * t.x - times(t.a, t.live), p[0] * t.x - t.a);
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
  const Mask<F> below = is_above(F{}, t.a) & is_above(F{} + p[0], t.x);
  const Mask<F> above = is_above(t.a, F{}) & is_above(t.x, F{} + p[1]);
  const F k = unless(below | above | t.past, t.r);
  return {-times(t.a, t.r), -times(t.a, k), below, above, Mask<F>{}};
}

template <class F>
RLK_HD Surrogate<F> shaped(const PolicyToken<F>& t, const float* p) {
  const F now = exp(t.live), inverse = 1.0f / (now + p[0]), share = now * inverse;
  return smooth<F>(-times(t.a, share), -times(t.a, p[0] * share * inverse));
}

template <class F>
RLK_HD Surrogate<F> balanced(const PolicyToken<F>& t, const float* p) {
  const F now = exp(t.live), rest = at_least_zero(1.0f - now);
  const F pull = p[0] == 0.0f ? F{} + 1.0f : p[0] == 0.5f ? sqrt(rest) : power(rest, p[0]);
  const F loss = -times(t.a, 2.0f * now / (1.5f * exp(t.old) + 0.5f) * pull);
  return smooth<F>(loss, loss);
}

template <class F>
RLK_HD Surrogate<F> squared(const PolicyToken<F>& t, const float* p) {
  const F gap = p[0] * t.x - t.a;
  return smooth<F>(gap * gap, 2.0f * p[0] * gap);
}

template <class F>
RLK_HD Surrogate<F> hinge(const PolicyToken<F>& t, const float* p) {
  const Mask<F> up = is_above(t.a, F{}), down = is_above(F{}, t.a);
  const F size = select(down, -t.a, t.a);
  const F gap = select(up, p[0] - t.x, p[2] * (t.x + p[1]));
  const F slope = select(up, F{} - 1.0f, F{} + p[2]);
  const Mask<F> idle = is_above(F{}, gap) | is_equal(gap, F{});
  return {times(size, unless(idle, gap)), times(size, unless(idle, slope)), down & idle, up & idle,
          Mask<F>{}};
}

template <class F>
RLK_HD Surrogate<F> tapered(const PolicyToken<F>& t, const float* p) {
  const Mask<F> up = is_above(t.a, F{});
  const F weight = select(up, F{} + p[0], p[1] * at_most(t.r, 1.0f));
  return weighted(t, weight, Mask<F>{}, ~up & is_above(t.r, F{} + 1.0f), Mask<F>{});
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
      return weighted(t, bounded(t.r, F{} + p[0], F{} + p[1]), is_above(F{} + p[0], t.r),
                      is_above(t.r, F{} + p[1]), Mask<F>{});
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
      return smooth<F>(-times(t.a, t.live), -t.a);
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
    case SurrogateKind::kCount:
      break;
  }
  return smooth<F>(F{}, F{});
}

}  // namespace rlkern
