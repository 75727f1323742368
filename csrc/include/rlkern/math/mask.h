// Comparisons and selects for one float and for a vector of floats (see exp.h).
#pragma once

#include <cmath>

#include "rlkern/math/exp.h"

namespace rlkern {

// What F is compared with: masks of integers, all ones or all zeros. csrc/cpu/mask512.h specialises
// it where the processor has registers of masks.
template <class F>
struct Lanes {
  using Mask = decltype(Bits<F>::of(F{}));
  // how often a mask was set, by the lane
  using Tally = Mask;

  static RLK_HD Mask above(F x, F y) { return x > y; }
  static RLK_HD Mask at_least(F x, F y) { return x >= y; }
  static RLK_HD Mask equal(F x, F y) { return x == y; }
  static RLK_HD Mask differs(F x, F y) { return ~(x == y); }
  static RLK_HD Mask apart(F x, F y) { return (x > y) | (x < y); }
  static RLK_HD F select(Mask mask, F x, F y) {
    return Bits<F>::from((Bits<F>::of(x) & mask) | (Bits<F>::of(y) & ~mask));
  }
  static RLK_HD F where(Mask mask, F x) { return Bits<F>::from(Bits<F>::of(x) & mask); }
  static RLK_HD F unless(Mask mask, F x) { return Bits<F>::from(Bits<F>::of(x) & ~mask); }
  static RLK_HD F lesser(F x, F y) { return x < y ? x : y; }
  static RLK_HD F greater(F x, F y) { return x > y ? x : y; }
  static RLK_HD F times(Mask mask, F x, F y) { return where(mask, x * y); }
  static RLK_HD F add(Mask mask, F sum, F x) { return sum + where(mask, x); }
  static RLK_HD F add(Mask mask, F sum, F x, F y) { return sum + where(mask, x * y); }
  static RLK_HD F lesser(Mask mask, F x, F y) { return lesser(select(mask, x, y), y); }
  static RLK_HD F greater(Mask mask, F x, F y) { return greater(select(mask, x, y), y); }
  static RLK_HD F root(F x) {
    for (unsigned i = 0; i < sizeof(F) / sizeof(float); ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
  }
  static RLK_HD void count(Tally& tally, Mask mask) { tally -= mask; }
  static RLK_HD int64_t total(Tally tally) {
    int64_t sum = 0;
    for (unsigned i = 0; i < sizeof(F) / sizeof(float); ++i) sum += tally[i];
    return sum;
  }
  static RLK_HD bool any(Mask mask) { return total(mask) != 0; }
};

template <>
struct Lanes<float> {
  using Mask = int32_t;
  using Tally = int32_t;

  static RLK_HD Mask above(float x, float y) { return x > y ? -1 : 0; }
  static RLK_HD Mask equal(float x, float y) { return x == y ? -1 : 0; }
  static RLK_HD Mask differs(float x, float y) { return x == y ? 0 : -1; }
  static RLK_HD Mask apart(float x, float y) { return x > y || x < y ? -1 : 0; }
  static RLK_HD float select(Mask mask, float x, float y) { return mask ? x : y; }
  static RLK_HD float where(Mask mask, float x) { return mask ? x : 0.0f; }
  static RLK_HD float unless(Mask mask, float x) { return mask ? 0.0f : x; }
  static RLK_HD float lesser(float x, float y) { return x < y ? x : y; }
  static RLK_HD float greater(float x, float y) { return x > y ? x : y; }
  static RLK_HD float times(Mask mask, float x, float y) { return where(mask, x * y); }
  static RLK_HD float add(Mask mask, float sum, float x) { return sum + where(mask, x); }
  static RLK_HD float add(Mask mask, float sum, float x, float y) {
    return sum + where(mask, x * y);
  }
  static RLK_HD float lesser(Mask mask, float x, float y) { return mask && x < y ? x : y; }
  static RLK_HD float greater(Mask mask, float x, float y) { return mask && x > y ? x : y; }
  static RLK_HD float root(float x) { return std::sqrt(x); }
  static RLK_HD void count(Tally& tally, Mask mask) { tally -= mask; }
  static RLK_HD int64_t total(Tally tally) { return tally; }
};

template <class F>
using Mask = typename Lanes<F>::Mask;
template <class F>
using Tally = typename Lanes<F>::Tally;

// x > y, x >= y; false where either is NaN
template <class F>
RLK_HD Mask<F> is_above(F x, F y) {
  return Lanes<F>::above(x, y);
}
template <class F>
RLK_HD Mask<F> is_at_least(F x, F y) {
  return Lanes<F>::at_least(x, y);
}
template <class F>
RLK_HD Mask<F> is_equal(F x, F y) {
  return Lanes<F>::equal(x, y);
}
// true where either is NaN
template <class F>
RLK_HD Mask<F> differs(F x, F y) {
  return Lanes<F>::differs(x, y);
}
// false where either is NaN
template <class F>
RLK_HD Mask<F> is_apart(F x, F y) {
  return Lanes<F>::apart(x, y);
}
// x where the mask is set, else y
template <class F>
RLK_HD F select(Mask<F> mask, F x, F y) {
  return Lanes<F>::select(mask, x, y);
}
// x where the mask is set, else 0
template <class F>
RLK_HD F where(Mask<F> mask, F x) {
  return Lanes<F>::where(mask, x);
}
// 0 where the mask is set, else x
template <class F>
RLK_HD F unless(Mask<F> mask, F x) {
  return Lanes<F>::unless(mask, x);
}
// 1 where the mask is set, else 0
template <class F>
RLK_HD F as_number(Mask<F> mask) {
  return where(mask, F{} + 1.0f);
}
// y where either is NaN
template <class F>
RLK_HD F lesser(F x, F y) {
  return Lanes<F>::lesser(x, y);
}
template <class F>
RLK_HD F greater(F x, F y) {
  return Lanes<F>::greater(x, y);
}
// What a mask is set for, in one instruction where there are registers of masks: x y, else 0;
// sum + x and sum + x y, else sum; the lesser or greater of x and y, else y, also where x is NaN.
template <class F>
RLK_HD F times_where(Mask<F> mask, F x, F y) {
  return Lanes<F>::times(mask, x, y);
}
template <class F>
RLK_HD F add_where(Mask<F> mask, F sum, F x) {
  return Lanes<F>::add(mask, sum, x);
}
template <class F>
RLK_HD F add_where(Mask<F> mask, F sum, F x, F y) {
  return Lanes<F>::add(mask, sum, x, y);
}
template <class F>
RLK_HD F lesser_where(Mask<F> mask, F x, F y) {
  return Lanes<F>::lesser(mask, x, y);
}
template <class F>
RLK_HD F greater_where(Mask<F> mask, F x, F y) {
  return Lanes<F>::greater(mask, x, y);
}
// clip(x, low, high); NaN stays NaN
template <class F>
RLK_HD F bounded(F x, F low, F high) {
  return lesser(high, greater(low, x));
}

// exp(x) for x <= 0, no less than the least normal number
template <class F>
RLK_HD F exp_decay(F x) {
  return exp_normal(greater(F{} - kExpNormal, x));
}

}  // namespace rlkern
