// Sixteen floats at a time with GCC's vector extensions: one zmm, two ymm or four xmm registers,
// whatever the clone of RLK_MULTIVERSION is compiled for, with the same order of operations.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rlkern/math/exp.h"

namespace rlkern {

using bf16 = c10::BFloat16;
using fp16 = c10::Half;

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <>
struct Bits<f32x16> {
  static RLK_HD i32x16 of(f32x16 x) { return (i32x16)x; }
  static RLK_HD f32x16 from(i32x16 bits) { return (f32x16)bits; }
};

RLK_HD f32x16 splat(float x) { return f32x16{} + x; }
RLK_HD f32x16 vmax(f32x16 a, f32x16 b) { return a > b ? a : b; }
RLK_HD f32x16 vmin(f32x16 a, f32x16 b) { return a < b ? a : b; }

RLK_HD f32x16 load(const float* p) {
  f32x16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
RLK_HD f32x16 load(const bf16* p) {
  u16x16 raw;
  std::memcpy(&raw, p, sizeof raw);
  return (f32x16)(__builtin_convertvector(raw, i32x16) << 16);
}
RLK_HD f32x16 load(const fp16* p) {
  f32x16 x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}

RLK_HD void store(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
// The bfloat16 nearest to x (ties to even), in the low half of each lane. Integers alone: GCC takes
// a comparison of vectors wider than the registers apart lane by lane.
RLK_HD i32x16 bf16_bits(f32x16 x) {
  const i32x16 bits = (i32x16)x;
  const i32x16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  // all ones where x is NaN, which keeps a set bit of its payload
  const i32x16 nan = (0x7F800000 - (bits & 0x7FFFFFFF)) >> 31;
  return (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
}
RLK_HD void store(bf16* p, f32x16 x) {
  const u16x16 raw = __builtin_convertvector(bf16_bits(x), u16x16);
  std::memcpy(p, &raw, sizeof raw);
}
RLK_HD void store(fp16* p, f32x16 x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<fp16>(x[i]);
}

// The tail of a row: lanes past `count` read as `fill`.
template <class T>
RLK_HD f32x16 load_partial(const T* p, int64_t count, float fill) {
  f32x16 x = splat(fill);
  for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}
template <class T>
RLK_HD void store_partial(T* p, f32x16 x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(x[i]);
}

// Fixed trees: the same bits whatever the clone.
RLK_HD float reduce_add(f32x16 x) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = x[i] + x[i + 8];
  for (int w = 4; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) s[i] += s[i + w];
  return s[0];
}
RLK_HD float reduce_max(f32x16 x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

}  // namespace rlkern
