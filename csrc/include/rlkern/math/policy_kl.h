// Estimates of KL(policy || reference) from one token, D = logprob - ref_logprob:
//   k1 = D,  k2 = D^2 / 2,  k3 = exp(-D) + D - 1
// and their derivatives by logprob, which are 0 past the clamp of |D| or of |KL|.
#pragma once

#include "rlkern/math/exp.h"
#include "rlkern/math/policy_ratio.h"

namespace rlkern {

enum KlType : int { kK1 = 1, kK2 = 2, kK3 = 3 };

struct KlParams {
  int type;
  float coef;
  float input_clamp;
  float output_clamp;
};

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
  return x * x < 0.1156f ? near : far;
}

template <class F>
RLK_HD KlTerm<F> kl_term(F delta, const KlParams& p) {
  const F bound = bounded(delta, F{} - p.input_clamp, F{} + p.input_clamp);
  const F outside = delta - bound;
  delta = bound;
  F value = delta, grad = F{} + 1.0f;
  if (p.type == kK2) {
    value = 0.5f * delta * delta;
    grad = delta;
  } else if (p.type == kK3) {
    value = exp_minus_linear(-delta);
    grad = delta - value;  // 1 - exp(-D)
  }
  const F held = bounded(value, F{} - p.output_clamp, F{} + p.output_clamp);
  const F past = value - held;
  return {held, outside * outside + past * past > 0.0f ? F{} : grad};
}

}  // namespace rlkern
