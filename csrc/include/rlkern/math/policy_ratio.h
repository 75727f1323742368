// The surrogate of one token: its loss from the ratio and the advantage, and the derivative.
//
// F is float or a vector of floats. Every comparison stands in one select and nowhere else: GCC
// takes a comparison of vectors that is used twice apart lane by lane. All are written so that a
// NaN gets through.
#pragma once

#include <cmath>

#include "rlkern/macros.h"

namespace rlkern {

// clip(r, low, high); cap bounds the loss of a negative advantage (dual clip). Infinite: no bound.
struct RatioBounds {
  float low;
  float high;
  float cap;
};

template <class F>
RLK_HD F bounded(F x, F low, F high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
template <class F>
struct Surrogate {
  F loss;
  F grad;               // d loss / d logprob
  F low, high, capped;  // 1 where that bound holds the loss
};

// -min(r A, clip(r) A), at most -cap A for A < 0. past: not 0 where the log-ratio was clamped.
template <class F>
RLK_HD Surrogate<F> clipped_surrogate(F r, F past, F advantage, RatioBounds bounds) {
  // A = 0 gives 0 also where r has overflowed
  r = advantage == 0.0f ? F{} + 1.0f : r;
  const F low = advantage > 0.0f ? F{} - INFINITY : F{} + bounds.low;
  const F high = advantage < 0.0f ? F{} + bounds.cap : F{} + bounds.high;
  const F u = bounded(r, low, high);
  const F moved = r - u;
  const F k = moved * moved + past * past > 0.0f ? F{} : r;
  const F above = advantage * (r > u ? F{} + 1.0f : F{});
  return {-advantage * u, -advantage * k, r < u ? F{} + 1.0f : F{}, above > 0.0f ? F{} + 1.0f : F{},
          above < 0.0f ? F{} + 1.0f : F{}};
}

// -sg[clip(r)] A logprob: every token keeps a gradient
template <class F>
RLK_HD Surrogate<F> detached_surrogate(F r, F logprob, F advantage, RatioBounds bounds) {
  const F weight = bounded(r, F{} + bounds.low, F{} + bounds.high);
  const F grad = advantage == 0.0f ? F{} : -advantage * weight;
  return {grad == 0.0f ? F{} : grad * logprob, grad, r < weight ? F{} + 1.0f : F{},
          r > weight ? F{} + 1.0f : F{}, F{}};
}

}  // namespace rlkern
