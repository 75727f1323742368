// Comparisons and selects for one float and for a vector of floats (see exp.h), as integer masks:
// all ones or all zeros.
#pragma once

#include "rlkern/math/exp.h"

namespace rlkern {

template <class F>
using Mask = decltype(Bits<F>::of(F{}));

// How F is compared. csrc/cpu specialises it for vectors whose comparisons GCC takes apart.
template <class F>
struct Compare {
  static RLK_HD Mask<F> above(F x, F y) { return x > y; }
  static RLK_HD Mask<F> equal(F x, F y) { return x == y; }
};
template <>
struct Compare<float> {
  static RLK_HD int32_t above(float x, float y) { return x > y ? -1 : 0; }
  static RLK_HD int32_t equal(float x, float y) { return x == y ? -1 : 0; }
};

// x > y; false where either is NaN
template <class F>
RLK_HD Mask<F> is_above(F x, F y) {
  return Compare<F>::above(x, y);
}
template <class F>
RLK_HD Mask<F> is_equal(F x, F y) {
  return Compare<F>::equal(x, y);
}
// x where the mask is set, else y
template <class F>
RLK_HD F select(Mask<F> mask, F x, F y) {
  return Bits<F>::from((Bits<F>::of(x) & mask) | (Bits<F>::of(y) & ~mask));
}
// x where the mask is set, else 0
template <class F>
RLK_HD F where(Mask<F> mask, F x) {
  return Bits<F>::from(Bits<F>::of(x) & mask);
}
// 0 where the mask is set, else x
template <class F>
RLK_HD F unless(Mask<F> mask, F x) {
  return Bits<F>::from(Bits<F>::of(x) & ~mask);
}
// 1 where the mask is set, else 0
template <class F>
RLK_HD F as_number(Mask<F> mask) {
  return where(mask, F{} + 1.0f);
}

}  // namespace rlkern
