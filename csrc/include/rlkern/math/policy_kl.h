// Estimates of KL(policy || reference) from one token, D = logprob - ref_logprob:
//   k1 = D,  k2 = D^2 / 2,  k3 = exp(-D) + D - 1,  abs = |D|
// and their derivatives by logprob, which are 0 past the clamp of |D| or of |KL|; k1+ and k3+ have
// the derivative of k2, whatever the clamps.
#pragma once

#include "rlkern/math/exp.h"
#include "rlkern/math/policy_surrogates.h"

namespace rlkern {

// In the order of KL_TYPES in reference.py.
enum class KlType : int { kK1, kK2, kK3, kAbs, kK1Plus, kK3Plus };

template <class F>
struct KlTerm {
  F value;
  F grad;
};

// exp(x) - 1 - x. Near 0 the difference would cancel: there the series of exp from x^2 on.
template <class F>
RLK_HD F exp_minus_linear(F x) {
  F p = x * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  const F near = p * x * x, far = exp(x) - 1.0f - x;
  return select(is_above(F{} + 0.1156f, x * x), near, far);
}

template <class F>
RLK_HD KlTerm<F> kl_term(F delta, KlType type, float input_clamp, float output_clamp) {
  const F whole = delta;
  delta = bounded(delta, F{} - input_clamp, F{} + input_clamp);
  const F outside = whole - delta;
  F value = delta, grad = F{} + 1.0f;
  if (type == KlType::kK2) {
    value = 0.5f * delta * delta;
    grad = delta;
  } else if (type == KlType::kAbs) {
    const Mask<F> up = is_above(delta, F{}), down = is_above(F{}, delta);
    value = select(down, -delta, delta);
    grad = as_number<F>(up) - as_number<F>(down);
  } else if (type == KlType::kK3 || type == KlType::kK3Plus) {
    value = exp_minus_linear(-delta);
    grad = delta - value;  // 1 - exp(-D)
  }
  const F held = bounded(value, F{} - output_clamp, F{} + output_clamp);
  if (type == KlType::kK1Plus || type == KlType::kK3Plus) return {held, whole};
  const F past = value - held;
  return {held, unless(is_above(outside * outside + past * past, F{}), grad)};
}

}  // namespace rlkern
