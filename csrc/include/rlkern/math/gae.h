// One step back in time of generalised advantage estimation, and the spread of what it finds.
#pragma once

#include <cmath>
#include <cstdint>

#include "rlkern/macros.h"

namespace rlkern {

// gamma, and gamma times lambda.
struct GaeParams {
  double gamma, decay;
};

// Advantage and value of the nearest later token that counts; 0 past the end.
struct GaeCarry {
  double advantage = 0.0, value = 0.0;

  RLK_HD void step(const GaeParams& p, double reward, double v) {
    advantage = reward + p.gamma * value - v + p.decay * advantage;
    value = v;
  }
};

// Sums over r - first: a constant has squares of exactly 0, and a large mean costs no digits.
struct ShiftedSums {
  int64_t count = 0;
  double first = 0.0, sum = 0.0, squares = 0.0;

  RLK_HD void push(double x) {
    if (count++ == 0) first = x;
    sum += x - first;
    squares += (x - first) * (x - first);
  }
  RLK_HD double total() const { return static_cast<double>(count) * first + sum; }
  // Squares of the deviations from another centre.
  RLK_HD double squares_about(double centre) const {
    const double shift = first - centre;
    return count ? squares + 2.0 * shift * sum + static_cast<double>(count) * shift * shift : 0.0;
  }
};

// verl's masked_whiten.
RLK_HD double whitening_scale(double squares, int64_t count) {
  return 1.0 / std::sqrt(squares / static_cast<double>(count > 1 ? count - 1 : 1) + 1e-8);
}

}  // namespace rlkern
