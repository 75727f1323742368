// Mean and spread of the rewards of one group, and what an advantage is divided by.
//
// Two passes: push() every reward, then push_deviation() every deviation from the mean. Sums run
// over r - first, so that equal rewards have deviations of exactly 0, and a large common offset
// costs no digits.
#pragma once

#include <cmath>
#include <cstdint>

#include "rlkern/macros.h"

namespace rlkern {

// In the order of KINDS in rlkern/ops/group_advantage/reference.py.
enum class AdvantageKind : int64_t { kGrpo, kDrGrpo, kRloo, kBatchStd };
inline constexpr int64_t kNumAdvantageKinds = 4;

struct GroupMoments {
  int64_t count = 0;
  double first = 0.0;
  double sum = 0.0;      // of r - first
  double squares = 0.0;  // of deviations

  RLK_HD void push(double r) {
    if (count++ == 0) first = r;
    sum += r - first;
  }
  // An infinite reward makes the whole group NaN, wherever it stands in it.
  RLK_HD double deviation(double r) const {
    return std::isfinite(sum) ? (r - first) - sum / static_cast<double>(count) : NAN;
  }
  RLK_HD void push_deviation(double d) { squares += d * d; }
  RLK_HD double mean() const { return first + sum / static_cast<double>(count); }
};

// n - 1 in the denominator; 0 for a single row.
RLK_HD double unbiased_std(double squares, int64_t count) {
  return std::sqrt(squares / static_cast<double>(count > 1 ? count - 1 : 1));
}

// A denominator of 0 belongs to one row or to equal rewards: deviations of 0 (or NaN) stay so.
RLK_HD double advantage(double deviation, double denominator) {
  return denominator == 0.0 ? deviation : deviation / denominator;
}

}  // namespace rlkern
