// The policy loss of a token in the steps that a kernel takes: correction, surrogate, KL, entropy;
// the sums over a sequence that some objectives need first; and those that the metrics are made of.
#pragma once

#include <cmath>

#include "rlkern/math/exp.h"
#include "rlkern/math/mask.h"
#include "rlkern/math/policy_correction.h"
#include "rlkern/math/policy_kl.h"
#include "rlkern/math/policy_surrogates.h"

namespace rlkern {

// The schema's `denominator`, and its level: LEVELS in reference.py.
enum class Denominator : int { kNothing, kTokens, kFilledSequences, kAllSequences };
enum class Level : int {
  kToken,
  kSequence,
  kProduct,
  kPrefixMin,
  kPrefixMean,
  kPrefixMinCapped,
};

// The schema's `kinds` and `numbers`, in the order of Kinds and Numbers in reference.py.
constexpr int kNumKinds = 13;
constexpr int kNumNumbers = 25;
constexpr int kNumShape = 6;

struct PolicyParams {
  SurrogateKind surrogate;
  Level level;
  bool from_rollout;
  Correction correction;
  bool correction_masks;
  int token_rejection, sequence_rejection;
  Reduction rejection_reduction;
  bool count_rejected;
  KlType kl_type;
  bool kl_times_ratio;
  Denominator denominator;
  bool divide_by_length;

  float shape[kNumShape];
  float log_ratio_clamp;
  float correction_low, correction_high;
  float token_rejection_low, token_rejection_high;
  float sequence_rejection_low, sequence_rejection_high;
  float off_policy_limit;
  float kl_coef, kl_input_clamp, kl_output_clamp;
  float entropy_coef, entropy_low, entropy_high, entropy_low_coef, entropy_high_coef, entropy_from;
  float nll_coef;
  double scale;

  template <class Kinds, class Numbers>
  PolicyParams(const Kinds& k, const Numbers& n)
      : surrogate(static_cast<SurrogateKind>(k[0])),
        level(static_cast<Level>(k[1])),
        from_rollout(k[2] != 0),
        correction(static_cast<Correction>(k[3])),
        correction_masks(k[4] != 0),
        token_rejection(static_cast<int>(k[5])),
        sequence_rejection(static_cast<int>(k[6])),
        rejection_reduction(static_cast<Reduction>(k[7])),
        count_rejected(k[8] != 0),
        kl_type(static_cast<KlType>(k[9])),
        kl_times_ratio(k[10] != 0),
        denominator(static_cast<Denominator>(k[11])),
        divide_by_length(k[12] != 0) {
    float* const narrow[] = {&log_ratio_clamp,
                             &correction_low,
                             &correction_high,
                             &token_rejection_low,
                             &token_rejection_high,
                             &sequence_rejection_low,
                             &sequence_rejection_high,
                             &off_policy_limit,
                             &kl_coef,
                             &kl_input_clamp,
                             &kl_output_clamp,
                             &entropy_coef,
                             &entropy_low,
                             &entropy_high,
                             &entropy_low_coef,
                             &entropy_high_coef,
                             &entropy_from,
                             &nll_coef};
    int i = 0;
    for (float& value : shape) value = static_cast<float>(n[i++]);
    for (float* value : narrow) *value = static_cast<float>(n[i++]);
    scale = n[i];
  }

  bool has_entropy_term() const {
    return entropy_coef != 0.0f || entropy_low_coef != 0.0f || entropy_high_coef != 0.0f;
  }
  bool corrects() const { return correction != Correction::kNone || limits_drift(); }
  bool limits_drift() const { return off_policy_limit != INFINITY; }
  bool rejects() const { return token_rejection != 0 || sequence_rejection != 0; }
  bool by_statistic() const { return level == Level::kSequence || level == Level::kProduct; }
  bool by_prefix() const { return level >= Level::kPrefixMin; }
  bool couples_kl() const { return kl_times_ratio && level == Level::kSequence; }
};

// Inputs of one token; 0 where it does not count.
template <class F>
struct PolicyInput {
  F logprob, old_logprob, advantage;
  F weight;     // of this token in the aggregation
  F statistic;  // of x, where the level has one
  F rollout_logprob, ref_logprob, entropy, nll_weight;
  F correction;  // of its sequence; Correction::kSequence and kGeometric
  F drifted;     // 1 where its sequence is past off_policy_limit
  F kl_mean;     // of its sequence, where the KL is coupled
  F length;      // of its sequence; Level::kProduct
};

enum PolicySum : int {
  kLossSum,
  kDecidedSum,  // of the clamped log-ratio to old_logprob: ppo_kl with the other sign
  kRatioSum,
  kKlSum,
  kEntropySum,
  kCorrectionSum,
  kCorrectionSquareSum,
  kRatioVarianceSum,  // of (r - 1)^2; kQuadratic alone
  kNumPolicySums,
};
enum PolicyCount : int { kTokens, kLow, kHigh, kCapped, kNumPolicyCounts };

template <class F>
struct PolicyStats {
  F sum[kNumPolicySums] = {};
  Tally<F> count[kNumPolicyCounts] = {};
  F least = F{} + INFINITY;
  F most = F{} - INFINITY;

  // x, or x y, of the tokens that count
  template <class... X>
  RLK_HD void add(PolicySum which, Mask<F> counts, X... x) {
    sum[which] = add_where(counts, sum[which], x...);
  }
};

// where the token alone is rejected
template <class F>
RLK_HD Mask<F> token_rejected(const PolicyParams& p, const PolicyInput<F>& in) {
  const F d = in.old_logprob - in.rollout_logprob;
  return is_rejected(rejection_statistic(d, p.token_rejection, p.log_ratio_clamp),
                     p.token_rejection_low, p.token_rejection_high);
}

// The weight of a token's surrogate.
template <class F>
RLK_HD F policy_correction(const PolicyParams& p, const PolicyInput<F>& in, Mask<F> counts,
                           PolicyStats<F>& stats) {
  F w = F{} + 1.0f;
  if (p.correction == Correction::kToken)
    w = correction_weight(in.old_logprob - in.rollout_logprob, p.correction_masks, p.correction_low,
                          p.correction_high, p.log_ratio_clamp);
  else if (p.correction != Correction::kNone)
    w = in.correction;
  if (p.limits_drift()) w = unless(is_above(F{}, in.advantage * in.drifted), w);
  stats.add(kCorrectionSum, counts, w);
  stats.add(kCorrectionSquareSum, counts, w, w);
  return w;
}

template <class F>
RLK_HD PolicyToken<F> policy_ratio(const PolicyParams& p, const PolicyInput<F>& in) {
  const F limit = F{} + p.log_ratio_clamp;
  PolicyToken<F> t;
  t.live = in.logprob;
  t.old = p.from_rollout ? in.rollout_logprob : in.old_logprob;
  t.a = in.advantage;
  t.x = t.live - t.old;
  t.decided = bounded(in.logprob - in.old_logprob, -limit, limit);
  const F z = p.level == Level::kToken ? t.x : in.statistic;
  t.z = bounded(z, -limit, limit);
  t.past = is_apart(z, t.z);
  t.r = exp_within(t.z, p.log_ratio_clamp);
  t.length = in.length;
  return t;
}

// Adds the surrogate, the ratio and what the bounds did to stats; d loss / d logprob. `corrected`:
// in.correction is its weight.
template <SurrogateKind kKind, class F>
RLK_HD F policy_surrogate(const PolicyParams& p, const PolicyInput<F>& in, bool corrected,
                          Mask<F> counts, const PolicyToken<F>& t, Surrogate<F> s,
                          PolicyStats<F>& stats) {
  // every token carries the loss of its sequence, and each of the n moves all of them
  if ((kKind == SurrogateKind::kClip || kKind == SurrogateKind::kBanded) &&
      p.level == Level::kProduct)
    s.grad *= in.length;
  if (corrected) {
    s.loss = times(in.correction, s.loss);
    s.grad = times(in.correction, s.grad);
  }
  stats.add(kLossSum, counts, in.weight, s.loss);
  stats.add(kDecidedSum, counts, t.decided);
  stats.add(kRatioSum, counts, t.r);
  if (kKind == SurrogateKind::kQuadratic)
    stats.add(kRatioVarianceSum, counts, t.r - 1.0f, t.r - 1.0f);
  stats.least = lesser_where(counts, t.r, stats.least);
  stats.most = greater_where(counts, t.r, stats.most);
  Lanes<F>::count(stats.count[kTokens], counts);
  Lanes<F>::count(stats.count[kLow], counts & s.low);
  Lanes<F>::count(stats.count[kHigh], counts & s.high);
  Lanes<F>::count(stats.count[kCapped], counts & s.capped);
  return times_where(counts, in.weight, s.grad);
}

// The same of the KL term.
template <class F>
RLK_HD F policy_kl(const PolicyParams& p, const PolicyInput<F>& in, Mask<F> counts,
                   PolicyStats<F>& stats) {
  KlTerm<F> kl =
      kl_term(in.logprob - in.ref_logprob, p.kl_type, p.kl_input_clamp, p.kl_output_clamp);
  if (p.kl_times_ratio) {
    const PolicyToken<F> t = policy_ratio(p, in);
    const F mean = p.couples_kl() ? in.kl_mean : kl.value;
    kl.grad = t.r * (kl.grad + unless(t.past, mean));
    kl.value *= t.r;
  }
  stats.add(kKlSum, counts, kl.value);
  if (p.kl_coef == 0.0f) return F{};
  const F weight = in.weight * p.kl_coef;
  stats.add(kLossSum, counts, weight, kl.value);
  return times_where(counts, weight, kl.grad);
}

// The same of the likelihood term.
template <class F>
RLK_HD F policy_nll(const PolicyParams& p, const PolicyInput<F>& in, Mask<F> counts,
                    PolicyStats<F>& stats) {
  const F weight = in.weight * p.nll_coef;
  stats.add(kLossSum, counts, -weight, times(in.nll_weight, in.logprob));
  return times_where(counts, -weight, in.nll_weight);
}

// The same of the entropy term; d loss / d entropy.
template <class F>
RLK_HD F policy_entropy(const PolicyParams& p, const PolicyInput<F>& in, Mask<F> counts,
                        PolicyStats<F>& stats) {
  const F h = in.entropy;
  stats.add(kEntropySum, counts, h);
  if (!p.has_entropy_term()) return F{};
  const Mask<F> free = is_above(F{} + p.entropy_from, h);
  const F loss = unless(free, p.entropy_low_coef * at_least_zero(p.entropy_low - h) +
                                  p.entropy_high_coef * at_least_zero(h - p.entropy_high)) -
                 p.entropy_coef * h;
  const F grad =
      unless(free, where(is_above(h, F{} + p.entropy_high), F{} + p.entropy_high_coef) -
                       where(is_above(F{} + p.entropy_low, h), F{} + p.entropy_low_coef)) -
      p.entropy_coef;
  stats.add(kLossSum, counts, in.weight, loss);
  return times_where(counts, in.weight, grad);
}

// Sums over the tokens of a sequence that count.
enum SequenceSum : int {
  kLogRatioSum,   // of x, clipped for the geometric surrogate
  kMismatchSum,   // of old_logprob - rollout_logprob
  kDriftSum,      // of rollout_logprob - logprob
  kRejectionSum,  // of the statistic of sequence_rejection
  kKeptSum,       // tokens that are not rejected by themselves
  kKeptKlSum,     // of their KL
  kNumSequenceSums,
};

template <class F>
struct SequenceSums {
  F sum[kNumSequenceSums] = {};
  F most = F{} - INFINITY;  // of the statistic of sequence_rejection
};

template <class F>
RLK_HD void sequence_token(const PolicyParams& p, const PolicyInput<F>& in, Mask<F> counts,
                           SequenceSums<F>& out) {
  if (p.by_statistic()) {
    F x = in.logprob - (p.from_rollout ? in.rollout_logprob : in.old_logprob);
    if (p.surrogate == SurrogateKind::kGeometric) {
      const F low = F{} + p.shape[0], high = F{} + p.shape[1];
      x = select(is_above(F{}, in.advantage) & is_above(low, x), low, x);
      x = select(is_above(in.advantage, F{}) & is_above(x, high), high, x);
      x = unless(is_equal(in.advantage, F{}), x);
    }
    if (p.surrogate == SurrogateKind::kGammaWeight)
      x = bounded(x, F{} - p.log_ratio_clamp, F{} + p.log_ratio_clamp);
    out.sum[kLogRatioSum] += x;
  }
  if (p.corrects() || p.rejects()) {
    const F d = in.old_logprob - in.rollout_logprob;
    out.sum[kMismatchSum] += d;
    out.sum[kDriftSum] += in.rollout_logprob - in.logprob;
    if (p.sequence_rejection != 0) {
      const F value = rejection_statistic(d, p.sequence_rejection, p.log_ratio_clamp);
      out.sum[kRejectionSum] += value;
      // a token that does not count has the value 0, which k2 and k3 never go below
      out.most = select(is_above(value, out.most), value, out.most);
    }
  }
  if (p.token_rejection != 0) counts &= ~token_rejected(p, in);
  out.sum[kKeptSum] += as_number<F>(counts);
  if (p.couples_kl()) {
    const KlTerm<F> kl =
        kl_term(in.logprob - in.ref_logprob, p.kl_type, p.kl_input_clamp, p.kl_output_clamp);
    out.sum[kKeptKlSum] += where(counts, kl.value);
  }
}

// Of one sequence.
struct SequenceStats {
  int64_t length;    // tokens that count
  int64_t kept;      // of them, those that are not rejected
  float statistic;   // of x
  float correction;  // the weight, 1 where there is none
  float drifted;     // 1 past off_policy_limit
  float kl_mean;
};

// From the sums in double and the maximum.
RLK_HD SequenceStats sequence_stats(const PolicyParams& p, int64_t length, const double* sum,
                                    float most) {
  const double count = length > 0 ? static_cast<double>(length) : 1.0;
  SequenceStats s{};
  s.length = length;
  s.kept = static_cast<int64_t>(sum[kKeptSum]);
  s.statistic = static_cast<float>(p.level == Level::kSequence ? sum[kLogRatioSum] / count
                                                               : sum[kLogRatioSum]);
  s.correction = 1.0f;
  if (p.correction == Correction::kSequence || p.correction == Correction::kGeometric) {
    const double d =
        p.correction == Correction::kGeometric ? sum[kMismatchSum] / count : sum[kMismatchSum];
    s.correction = correction_weight(static_cast<float>(d), p.correction_masks, p.correction_low,
                                     p.correction_high, p.log_ratio_clamp);
  }
  s.drifted = static_cast<float>(sum[kDriftSum] / count) > p.off_policy_limit ? 1.0f : 0.0f;
  if (p.sequence_rejection != 0) {
    float value = most;
    if (p.rejection_reduction != Reduction::kMax)
      value =
          static_cast<float>(p.rejection_reduction == Reduction::kMean ? sum[kRejectionSum] / count
                                                                       : sum[kRejectionSum]);
    if (is_rejected(value, p.sequence_rejection_low, p.sequence_rejection_high)) s.kept = 0;
  }
  s.kl_mean = static_cast<float>(sum[kKeptKlSum] / count);
  return s;
}

// The metrics of op.py's METRICS, in its order. all: the tokens that count, rejected or not.
constexpr int kNumPolicyMetrics = 15;

RLK_HD void policy_metrics(const PolicyParams& p, const double* sum, const int64_t* count,
                           float least, float most, int64_t all, float* out) {
  const double tokens = static_cast<double>(count[kTokens]);
  const double share = tokens > 0 ? 1.0 / tokens : 0.0;
  const double weight = p.corrects() ? sum[kCorrectionSum] * share : tokens * share;
  const double square = p.corrects() ? sum[kCorrectionSquareSum] * share : tokens * share;
  out[0] = static_cast<float>(tokens);
  out[1] = static_cast<float>((count[kLow] + count[kHigh]) * share);
  out[2] = static_cast<float>(count[kCapped] * share);
  out[3] = static_cast<float>(count[kLow] * share);
  out[4] = static_cast<float>(count[kHigh] * share);
  out[5] = static_cast<float>(0.0 - sum[kDecidedSum] * share);
  out[6] = static_cast<float>(sum[kRatioSum] * share);
  out[7] = tokens > 0 ? least : 0.0f;
  out[8] = tokens > 0 ? most : 0.0f;
  out[9] = static_cast<float>(sum[kKlSum] * share);
  out[10] = static_cast<float>(sum[kEntropySum] * share);
  out[11] = static_cast<float>(weight);
  out[12] = static_cast<float>(square > 0 ? weight * weight / square : 0.0);
  out[13] = static_cast<float>(all > 0 ? static_cast<double>(all - count[kTokens]) / all : 0.0);
  out[14] = static_cast<float>(sum[kRatioVarianceSum] * share);
}

// The weight of a token in a sequence of `length` tokens that count, up to 1 / denominator.
RLK_HD float policy_weight(double scale_over_denominator, bool divide_by_length, int64_t length) {
  return static_cast<float>(divide_by_length ? scale_over_denominator / (length > 0 ? length : 1)
                                             : scale_over_denominator);
}

}  // namespace rlkern
