// One token of the policy loss, and the sums that the metrics are made of.
#pragma once

#include <cmath>

#include "rlkern/math/exp.h"
#include "rlkern/math/policy_kl.h"
#include "rlkern/math/policy_ratio.h"

namespace rlkern {

// The schema's `surrogate` and `denominator`.
enum SurrogateKind : int { kClip = 0, kDetached = 1 };
enum Denominator : int { kNothing = 0, kTokens = 1, kFilledSequences = 2, kAllSequences = 3 };

struct PolicyParams {
  int surrogate;
  RatioBounds bounds;
  float log_ratio_clamp;
  KlParams kl;
  float entropy_coef;
};

// Inputs of one token; 0 where it does not count.
template <class F>
struct PolicyInput {
  F logprob, old_logprob, advantage;
  F weight;     // of this token in the aggregation
  F log_ratio;  // logprob - old_logprob, or its mean over the sequence
  F ref_logprob, entropy;
};

enum PolicySum : int {
  kLossSum,
  kTokenSum,
  kLowSum,
  kHighSum,
  kCappedSum,
  kOldKlSum,
  kRatioSum,
  kKlSum,
  kEntropySum,
  kNumPolicySums,
};

template <class F>
struct PolicyStats {
  F sum[kNumPolicySums] = {};
  F least = F{} + INFINITY;
  F most = F{} - INFINITY;
};

// Adds the token to stats; returns d loss / d logprob. counts: 1, or 0 for a token that does not.
template <class F>
RLK_HD F policy_token(const PolicyParams& p, const PolicyInput<F>& in, F counts, bool has_ref,
                      bool has_entropy, PolicyStats<F>& stats) {
  const F limit = F{} + p.log_ratio_clamp;
  const F log_ratio = bounded(in.log_ratio, -limit, limit);
  const F r = exp(log_ratio);
  const Surrogate<F> s =
      p.surrogate == kClip ? clipped_surrogate(r, in.log_ratio - log_ratio, in.advantage, p.bounds)
                           : detached_surrogate(r, in.logprob, in.advantage, p.bounds);
  F loss = s.loss, grad = s.grad;
  if (has_ref) {
    const KlTerm<F> kl = kl_term(in.logprob - in.ref_logprob, p.kl);
    stats.sum[kKlSum] += kl.value;
    if (p.kl.coef != 0.0f) {
      loss += p.kl.coef * kl.value;
      grad += p.kl.coef * kl.grad;
    }
  }
  if (has_entropy) {
    stats.sum[kEntropySum] += in.entropy;
    if (p.entropy_coef != 0.0f) loss -= p.entropy_coef * in.entropy;
  }
  stats.sum[kLossSum] += in.weight * loss;
  stats.sum[kTokenSum] += counts;
  stats.sum[kLowSum] += counts * s.low;
  stats.sum[kHighSum] += counts * s.high;
  stats.sum[kCappedSum] += s.capped;
  stats.sum[kOldKlSum] -= bounded(in.logprob - in.old_logprob, -limit, limit);
  // a token that does not count has a ratio of 1
  stats.sum[kRatioSum] += counts * r;
  const F ratio_low = counts > 0.0f ? r : F{} + INFINITY;
  const F ratio_high = counts < 0.5f ? F{} - INFINITY : r;
  stats.least = ratio_low < stats.least ? ratio_low : stats.least;
  stats.most = ratio_high > stats.most ? ratio_high : stats.most;
  return in.weight * grad;
}

// The metrics of op.py's METRICS, in its order.
constexpr int kNumPolicyMetrics = 11;

RLK_HD void policy_metrics(const double* sum, float least, float most, float* out) {
  const double tokens = sum[kTokenSum];
  const double share = tokens > 0 ? 1.0 / tokens : 0.0;
  out[0] = static_cast<float>(tokens);
  out[1] = static_cast<float>((sum[kLowSum] + sum[kHighSum]) * share);
  out[2] = static_cast<float>(sum[kCappedSum] * share);
  out[3] = static_cast<float>(sum[kLowSum] * share);
  out[4] = static_cast<float>(sum[kHighSum] * share);
  out[5] = static_cast<float>(sum[kOldKlSum] * share);
  out[6] = static_cast<float>(sum[kRatioSum] * share);
  out[7] = tokens > 0 ? least : 0.0f;
  out[8] = tokens > 0 ? most : 0.0f;
  out[9] = static_cast<float>(sum[kKlSum] * share);
  out[10] = static_cast<float>(sum[kEntropySum] * share);
}

// The weight of a token in a sequence of `length` tokens that count, up to 1 / denominator.
RLK_HD float policy_weight(double scale_over_denominator, bool divide_by_length, int64_t length) {
  return static_cast<float>(divide_by_length ? scale_over_denominator / (length > 0 ? length : 1)
                                             : scale_over_denominator);
}

}  // namespace rlkern
