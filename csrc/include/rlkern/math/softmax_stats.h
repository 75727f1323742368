// Running statistics of softmax(z / T) for one row, mergeable: log-prob, logsumexp, entropy and the
// sum of squared probabilities.
//
// With m = max(x) over raw logits x and d_j = (x_j - m) / T:
//   sum = sum_j e^{d_j},  dot = sum_j e^{d_j} d_j,  sq = sum_j e^{2 d_j}
//   logsumexp = m / T + log(sum),  logprob_t = d_t - log(sum),  entropy = log(sum) - dot / sum
// The maximum is subtracted before the division by T: the subtraction is then exact for the logits
// that matter, and logits of 1e4 lose nothing.
#pragma once

#include <cmath>

#include "rlkern/math/exp.h"

namespace rlkern {

struct SoftmaxStats {
  float max = -INFINITY;
  float sum = 0.0f;
  float dot = 0.0f;
  float sq = 0.0f;

  RLK_HD void merge(const SoftmaxStats& other, float inv_temperature) {
    if (other.max == -INFINITY && other.sum == 0.0f) return;
    if (max == -INFINITY && sum == 0.0f) {
      *this = other;
      return;
    }
    const float top = max > other.max ? max : other.max;
    rescale_to(top, inv_temperature);
    SoftmaxStats moved = other;
    moved.rescale_to(top, inv_temperature);
    sum += moved.sum;
    dot += moved.dot;
    sq += moved.sq;
  }

  // Moves the reference point from max to top >= max: d' = d + shift with shift <= 0.
  RLK_HD void rescale_to(float top, float inv_temperature) {
    float shift = (max - top) * inv_temperature;
    shift = shift < kExpUnderflow ? kExpUnderflow : shift;
    const float scale = exp(shift);
    dot = scale * (dot + sum * shift);
    sum = scale * sum;
    sq = scale * scale * sq;
    max = top;
  }

  RLK_HD float log_sum() const { return logf(sum); }
  RLK_HD float logsumexp(float inv_temperature) const { return max * inv_temperature + log_sum(); }
  RLK_HD float logprob(float target_logit, float inv_temperature) const {
    return (target_logit - max) * inv_temperature - log_sum();
  }
  RLK_HD float entropy() const { return log_sum() - dot / sum; }
  RLK_HD float sum_sq_prob() const { return sq / (sum * sum); }
};

// The coefficients of one row's gradient: with upstream gradients a (log-prob), b (entropy) and
// c (logsumexp), p = softmax(z) and H its entropy,
//   dL/dz_j = a (1[j = t] - p_j) - b p_j (log p_j + H) + c p_j
//           = a 1[j = t] + p_j (constant - b log p_j),  constant = c - a - b H
struct SoftmaxGrad {
  float target;
  float constant;
  float entropy;

  RLK_HD SoftmaxGrad(float a, float b, float c, float row_entropy)
      : target(a), constant(c - a - (b == 0.0f ? 0.0f : b * row_entropy)), entropy(b) {}

  // F is float or a vector of floats; log_p <= 0, clamped so that -inf logits give 0, not NaN
  template <class F>
  RLK_HD F off_target(F log_p) const {
    log_p = log_p < kExpUnderflow ? F{} + kExpUnderflow : log_p;
    return exp(log_p) * (constant - entropy * log_p);
  }
};

}  // namespace rlkern
