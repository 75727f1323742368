// The surrogate of one token: its loss from the ratio and the advantage, and the derivative.
//
// F is float or a vector of floats. Comparisons ask for what is outside, so that a NaN is kept.
// A == 0 gives exactly 0, also where the ratio has overflowed.
#pragma once

#include "rlkern/macros.h"

namespace rlkern {

// clip(r, low, high); cap bounds the loss of a negative advantage (dual clip). Infinite: no bound.
struct RatioBounds {
  float low;
  float high;
  float cap;
};

template <class F>
RLK_HD F bounded(F x, float low, float high) {
  x = x < low ? F{} + low : x;
  return x > high ? F{} + high : x;
}

// 1 where the condition holds
template <class F, class C>
RLK_HD F indicator(C condition) {
  return condition ? F{} + 1.0f : F{};
}

template <class F>
struct Surrogate {
  F loss;
  F grad;               // d loss / d logprob
  F low, high, capped;  // 1 where that bound holds the loss
};

// -min(r A, clip(r) A), at most -cap A for A < 0. slope = dr / d logprob: r, or 0 past the clamp.
template <class F>
RLK_HD Surrogate<F> clipped_surrogate(F r, F slope, F advantage, RatioBounds bounds) {
  const auto up = advantage > 0.0f, down = advantage < 0.0f;
  const auto high = up & (r > bounds.high);
  const auto low = down & (r < bounds.low);
  const auto capped = down & (r > bounds.cap);
  F u = high ? F{} + bounds.high : r;
  u = low ? F{} + bounds.low : u;
  u = capped ? F{} + bounds.cap : u;
  slope = (low | high | capped) ? F{} : slope;
  const auto idle = advantage == 0.0f;
  return {idle ? F{} : -advantage * u, idle ? F{} : -advantage * slope, indicator<F>(low),
          indicator<F>(high), indicator<F>(capped)};
}

// -sg[clip(r)] A logprob: every token keeps a gradient
template <class F>
RLK_HD Surrogate<F> detached_surrogate(F r, F logprob, F advantage, RatioBounds bounds) {
  const F weight = bounded(r, bounds.low, bounds.high);
  const auto idle = advantage == 0.0f;
  const F grad = idle ? F{} : -advantage * weight;
  return {idle ? F{} : grad * logprob, grad, indicator<F>(r < bounds.low),
          indicator<F>(r > bounds.high), F{}};
}

}  // namespace rlkern
