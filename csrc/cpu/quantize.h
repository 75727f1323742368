// What the quantisers share: largest magnitudes by their bits, and bytes of codes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "isa.h"
#include "rlkern/math/quant.h"
#include "vec.h"

// Sixteen lanes with AVX-512, eight without (see vec.h).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLK_SIXTEEN __attribute__((target("arch=x86-64-v4")))
#else
#define RLK_SIXTEEN
#endif

namespace rlkern {

inline bool sixteen_lanes() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  return cpu_isa() >= Isa::kAvx512;
#else
  return false;
#endif
}

template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);

// Elements past `left` are 0.
template <class V, class T>
RLK_HD V load_up_to(const T* p, int64_t left) {
  if (left >= kWidth<V>) return widen<V>(p);
  V x{};
  for (int64_t i = 0; i < left; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}

template <class I>
RLK_HD I larger(I a, I b) {
  return a > b ? a : b;
}

RLK_HD int32_t reduce_max(i32x8 x) {
  const i32x4 low = load_as<i32x4>(&x), high = load_as<i32x4>((const char*)&x + 16);
  i32x4 m = larger(low, high);
  m = larger(m, __builtin_shuffle(m, i32x4{2, 3, 0, 1}));
  m = larger(m, __builtin_shuffle(m, i32x4{1, 0, 3, 2}));
  return m[0];
}
RLK_HD int32_t reduce_max(i32x16 x) {
  const i32x8 low = load_as<i32x8>(&x), high = load_as<i32x8>((const char*)&x + 32);
  return reduce_max(larger(low, high));
}

// The bits of |x|, as integers in the order of the floats; a NaN is above infinity.
template <class V>
RLK_HD auto magnitudes(V x) {
  return Bits<V>::of(x) & kMagnitude;
}

// The largest of p[0 .. count), two vectors at a time to hide latency.
template <class V, class T>
RLK_HD auto row_magnitudes(const T* p, int64_t count, typename Narrow<V>::Ints most) {
  typename Narrow<V>::Ints other{};
  int64_t j = 0;
  for (; j + 2 * kWidth<V> <= count; j += 2 * kWidth<V>) {
    most = larger(most, magnitudes(widen<V>(p + j)));
    other = larger(other, magnitudes(widen<V>(p + j + kWidth<V>)));
  }
  for (; j < count; j += kWidth<V>)
    most = larger(most, magnitudes(load_up_to<V>(p + j, count - j)));
  return larger(most, other);
}

// A thread is worth starting for about this many elements.
constexpr int64_t kQuantizeGrain = 32768;

// max |w| of everything, in pieces that threads take: `piece` gives that of some elements.
template <class T, class Piece>
float tensor_amax(const T* w, int64_t count, Piece piece) {
  constexpr int64_t kPiece = 1 << 16;
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  std::vector<int32_t> most(pieces);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      most[i] = piece(w + i * kPiece, std::min(kPiece, count - i * kPiece));
  });
  int32_t all = 0;
  for (const int32_t m : most) all = std::max(all, m);
  return Bits<float>::from(all);
}

}  // namespace rlkern
