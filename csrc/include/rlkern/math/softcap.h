// What a model does to its logits before the softmax: y = logit_scale x, or with a soft cap
// y = cap tanh(logit_scale x / cap). A bare scale is folded into the temperature.
#pragma once

#include "rlkern/math/exp.h"

namespace rlkern {

// 1 - 2 / (e^{2x} + 1): absolute error below 2e-7, which is what a capped logit needs
template <class F>
RLK_HD F tanh(F x) {
  return 1.0f - 2.0f / (exp(x + x) + 1.0f);
}

struct Softcap {
  float scale = 1.0f;
  float cap = 0.0f;  // 0: none

  RLK_HD bool on() const { return cap > 0.0f; }

  // 1 / temperature, with the scale where no cap has taken it
  RLK_HD float inverse(float temperature) const { return (on() ? 1.0f : scale) / temperature; }

  template <class F>
  RLK_HD F apply(F x) const {
    return cap * tanh(x * (scale / cap));
  }

  // dy/dx at the capped value y
  template <class F>
  RLK_HD F slope(F y) const {
    const F t = y * (1.0f / cap);
    return scale * (1.0f - t * t);
  }
};

}  // namespace rlkern
