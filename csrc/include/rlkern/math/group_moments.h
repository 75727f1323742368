// Mean, spread and best of the rewards of one group, and what an advantage is divided by.
//
// Two passes: push() every reward, then push_deviation() every deviation from the mean. Sums run
// over r - first, so that equal rewards have deviations of exactly 0, and a large common offset
// costs no digits. A row of weight w counts as w rows.
#pragma once

#include <cmath>
#include <cstdint>

#include "rlkern/macros.h"

namespace rlkern {

// In the order of KINDS in rlkern/ops/group_advantage/reference.py.
enum class AdvantageKind : int64_t { kGrpo, kDrGrpo, kRloo, kBatchStd, kMaxRl, kPassK, kGrpoPassK };
inline constexpr int64_t kNumAdvantageKinds = 7;

struct GroupMoments {
  double count = 0.0;    // sum of weights
  double first = NAN;    // NaN until there is one; if that is NaN, the sum already is
  double sum = 0.0;      // of r - first
  double squares = 0.0;  // of deviations

  RLK_HD void push(double r, double weight) {
    if (std::isnan(first)) first = r;
    count += weight;
    sum += weight * (r - first);
  }
  // An infinite reward makes the whole group NaN, wherever it stands in it; without weight, 0.
  RLK_HD double deviation(double r) const {
    if (!std::isfinite(sum)) return NAN;
    return count > 0.0 ? (r - first) - sum / count : 0.0;
  }
  RLK_HD void push_deviation(double d, double weight) { squares += weight * (d * d); }
  RLK_HD double mean() const { return count > 0.0 ? first + sum / count : 0.0; }
};

// Largest and second largest reward; of equal ones, the first row is the best.
struct BestReward {
  double best = -INFINITY, second = -INFINITY;
  int64_t row = -1;

  RLK_HD void push(double r, int64_t at) {
    if (r > best) {
      second = best;
      best = r;
      row = at;
    } else if (r > second) {
      second = r;
    }
  }
  // How far the best is ahead; a row alone is ahead of nothing.
  RLK_HD double lead() const { return second == -INFINITY ? 0.0 : best - second; }
};

// n - 1 in the denominator; 0 for a single row.
RLK_HD double unbiased_std(double squares, double count) {
  return std::sqrt(squares / (count > 1.0 ? count - 1.0 : 1.0));
}

// A denominator of 0 belongs to one row or to equal rewards: deviations of 0 (or NaN) stay so.
RLK_HD double advantage(double deviation, double denominator) {
  return denominator == 0.0 ? deviation : deviation / denominator;
}

}  // namespace rlkern
