// A token's weight in a draw, as an integer: sums of integers do not depend on their order, so any
// device, with any number of threads, draws the same token.
//
// Sources that include it are compiled without the contraction of a product and a sum into one
// operation: a weight's bits are those of the formula, operation by operation.
#pragma once

#include <cstdint>

#include "rlkern/math/exp.h"
#include "rlkern/math/mask.h"

namespace rlkern {

// Weights are drawn from within chunks of this many columns, and chunks by their mass.
inline constexpr int64_t kSampleChunk = 2048;
// e^0 as a weight, and as a mass: 2^22 columns of them stay below 2^62.
inline constexpr float kUnitWeight = 0x1p30f;
inline constexpr int kMassShift = 10;
inline constexpr double kUnitMass = 0x1p40;

// e^d as a float weight, to be truncated; d <= 0 or NaN
template <class F>
RLK_HD F weight_of(F e) {
  return e * kUnitWeight + 0.5f;
}

// The mass of a chunk whose weights sum to `sum` and whose largest logit is d below the row's.
RLK_HD int64_t mass_of(int64_t sum, float d) {
  const double scale = exp_decay(d);
  return static_cast<int64_t>(static_cast<double>(sum) * scale * (1 << kMassShift));
}

// floor(u total / 2^62) for u = the upper 31 bits of two words, total < 2^62: the products of
// halves of 31 bits, none of which overflows.
RLK_HD int64_t scaled_down(uint32_t high, uint32_t low, int64_t total) {
  const int64_t u1 = high >> 1, u0 = low >> 1;
  const int64_t t1 = total >> 31, t0 = total & 0x7FFFFFFF;
  return u1 * t1 + ((u1 * t0 + u0 * t1 + ((u0 * t0) >> 31)) >> 31);
}

}  // namespace rlkern
