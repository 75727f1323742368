// Divergence of a student's distribution s from a teacher's t, one token of the vocabulary at a
// time, for one float and for a vector of floats. Of log-probs ls = log s and lt = log t:
//   forward KL  t (lt - ls)                               gradient s - t
//   reverse KL  s (ls - lt)                               gradient s (ls - lt - own)
//   JSD         beta t (lt - lm) + (1 - beta) s (ls - lm) gradient (1 - beta) s (ls - lm - own)
// with m = (1 - beta) s + beta t and lm = log m. Gradients are with respect to the student's
// logits over the temperature; `own` is the sum over the vocabulary of s (ls - lt), or s (ls - lm).
#pragma once

#include "rlkern/math/exp.h"
#include "rlkern/math/log.h"

namespace rlkern {

enum class Divergence { kForward, kReverse, kJsd };

// beta 0 and 1 are the two KL divergences
RLK_HD Divergence divergence_of(double beta) {
  if (beta <= 0.0) return Divergence::kForward;
  return beta >= 1.0 ? Divergence::kReverse : Divergence::kJsd;
}

// exp of a log-prob, of -inf too. NaN stays NaN.
template <class F>
RLK_HD F probability(F log_p) {
  return exp_in_range(log_p < kExpUnderflow ? F{} + kExpUnderflow : log_p);
}

// lt - lm and ls - lm, from the ratio of the smaller to the larger of s and t: exactly 0 where
// s = t, and finite where both are 0.
template <class F>
struct OverMixture {
  F teacher, student;

  RLK_HD OverMixture(F ls, F lt, float beta) {
    ls = ls < kExpUnderflow ? F{} + kExpUnderflow : ls;
    lt = lt < kExpUnderflow ? F{} + kExpUnderflow : lt;
    const F gap = lt - ls;
    const F down = gap > 0.0f ? -gap : gap;
    const F ratio = exp_in_range(down) - 1.0f;
    // log of m over the larger one
    const F rest = -log(1.0f + (gap > 0.0f ? F{} + (1.0f - beta) : F{} + beta) * ratio);
    teacher = rest + (gap > 0.0f ? F{} : down);
    student = rest + (gap > 0.0f ? down : F{});
  }
};

template <class F>
struct DivergenceTerm {
  F value;
  F own;  // the part of `own`; 0 for the forward KL
};

template <Divergence kKind, class F>
RLK_HD DivergenceTerm<F> divergence_term(F ls, F lt, float beta) {
  const F zero{};
  if constexpr (kKind == Divergence::kForward) {
    const F t = probability(lt), term = t * (lt - ls);
    return {t == 0.0f ? zero : term, zero};
  } else if constexpr (kKind == Divergence::kReverse) {
    const F s = probability(ls), term = s * (ls - lt), value = s == 0.0f ? zero : term;
    return {value, value};
  } else {
    const OverMixture<F> over(ls, lt, beta);
    const F own = probability(ls) * over.student;
    return {beta * probability(lt) * over.teacher + (1.0f - beta) * own, own};
  }
}

template <Divergence kKind, class F>
RLK_HD F divergence_gradient(F ls, F lt, F own, float beta) {
  const F s = probability(ls);
  if constexpr (kKind == Divergence::kForward) {
    return s - probability(lt);
  } else if constexpr (kKind == Divergence::kReverse) {
    const F term = s * (ls - lt - own);
    return s == 0.0f ? F{} : term;
  } else {
    return (1.0f - beta) * s * (OverMixture<F>(ls, lt, beta).student - own);
  }
}

}  // namespace rlkern
