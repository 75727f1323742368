// Encoders of FP8 E4M3 and FP4 E2M1 in integers and one float addition, and the scales of blocks.
// The same lines serve one float and a GCC vector of them (csrc/cpu/vec.h).
#pragma once

#include <cstdint>
#include <limits>

#include "rlkern/macros.h"
#include "rlkern/math/exp.h"

namespace rlkern {

inline constexpr float kLargestE4m3 = 448.0f;
inline constexpr float kLargestE2m1 = 6.0f;
inline constexpr float kMostFloat = std::numeric_limits<float>::max();
inline constexpr int32_t kInfinityBits = 0x7F800000;
inline constexpr int32_t kMagnitude = 0x7FFFFFFF;

// The code of E4M3 nearest to x, ties to even, in the low byte: saturates; NaN is 0x7F.
template <class F>
RLK_HD auto e4m3(F x) {
  const auto bits = Bits<F>::of(x);
  const auto magnitude = bits & kMagnitude;
  const auto most = (bits ^ bits) + 0x43E00000;  // 448
  const auto a = magnitude < most ? magnitude : most;
  const auto normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 960;
  // The adder of 2^14, whose last place is 2^-9, rounds what is below 2^-6.
  const auto subnormal = Bits<F>::of(Bits<F>::from(a) + 16384.0f) - 0x46800000;
  const auto code = (a < 0x3C800000 ? subnormal : normal) | ((bits >> 24) & 0x80);
  return magnitude > kInfinityBits ? (bits ^ bits) + 0x7F : code;
}

// The float of a code without sign.
template <class F, class I>
RLK_HD F from_e4m3(I code) {
  const auto normal = (code << 20) + (120 << 23);
  // a subnormal is code 2^-9: the adder of 2^14 again, backwards
  const auto zero = code ^ code;
  const auto subnormal = Bits<F>::of(Bits<F>::from(code + 0x46800000) - 16384.0f);
  const auto bits = code < 8 ? subnormal : normal;
  return Bits<F>::from(code == 0x7F ? zero + 0x7FC00000 : bits);
}

// The code of E2M1 nearest to x, ties to even, in the low four bits: saturates; NaN is 7.
template <class F>
RLK_HD auto e2m1(F x) {
  const auto bits = Bits<F>::of(x);
  const auto magnitude = bits & kMagnitude;
  const auto zero = bits ^ bits;
  const auto most = zero + 0x40C00000;  // 6
  const auto a = magnitude < most ? magnitude : most;
  // From 2 and from 4 on codes stand twice as far apart: 2^22, 2^23 and 2^24 have last places of a
  // half, one and two.
  const auto past2 = a >= 0x40000000 ? zero + 1 : zero;
  const auto past4 = a >= 0x40800000 ? zero + 1 : zero;
  const auto adder = zero + 0x4A800000 + ((past2 + past4) << 23);
  const auto steps = Bits<F>::of(Bits<F>::from(a) + Bits<F>::from(adder)) - adder;
  const auto sign = magnitude > kInfinityBits ? zero : (bits >> 28) & 8;
  return (steps + ((past2 + past4) << 1)) | sign;
}

// The float of a code with its sign.
template <class F, class I>
RLK_HD F from_e2m1(I code) {
  const auto magnitude = code & 7;
  const auto normal = (magnitude << 22) + (126 << 23);
  const auto bits = magnitude < 2 ? -magnitude & 0x3F000000 : normal;
  return Bits<F>::from(bits | ((code & 8) << 28));
}

// How a block's scale and codes follow from its largest magnitude: rlkern/ops/quantize_fp8.
enum Fp8Order : int64_t { kDivide, kReciprocal, kEncode, kRceil };

struct Fp8Rule {
  int64_t order;
  float amax_floor, scale_floor, zero_scale;
  bool power_of_two;
};

struct Fp8Scale {
  float scale;   // as stored, of kRceil its byte
  float factor;  // of the elements; of kDivide their divisor
};

RLK_HD float rounded_up_to_power_of_two(float s) {
  const int32_t bits = Bits<float>::of(s);
  if ((bits & kMagnitude) > kInfinityBits) return s;
  int32_t exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
  exponent = exponent < 1 ? 1 : exponent > 254 ? 254 : exponent;
  return Bits<float>::from(exponent << 23);
}

RLK_HD Fp8Scale fp8_scale(float a, const Fp8Rule& rule) {
  if (rule.order == kRceil) {
    const int32_t bits = Bits<float>::of(a * (1.0f / kLargestE4m3));
    if (bits > kInfinityBits) return {255.0f, Bits<float>::from(0x7FC00000)};
    const int32_t exponent = bits >> 23, mantissa = bits & 0x7FFFFF;
    int32_t byte = exponent + (exponent == 0 ? mantissa > 0x400000 : mantissa != 0);
    byte = byte > 254 ? 254 : byte;
    const int32_t factor = byte == 254 ? 0x00400000 : (254 - byte) << 23;
    return {static_cast<float>(byte), Bits<float>::from(factor)};
  }
  if (rule.order == kEncode) {
    float e = kLargestE4m3 / a;
    e = e < kMostFloat ? e : kMostFloat;
    if (!(a > 0.0f && Bits<float>::of(a) < kInfinityBits)) e = 1.0f;
    if (rule.power_of_two) e = Bits<float>::from(Bits<float>::of(e) & kInfinityBits);
    return {1.0f / e, e};
  }
  // A NaN is in no comparison: it reaches the scale.
  a = a < rule.amax_floor ? rule.amax_floor : a;
  float scale = a / kLargestE4m3;
  scale = scale < rule.scale_floor ? rule.scale_floor : scale;
  scale = scale == 0.0f ? rule.zero_scale : scale;
  if (rule.power_of_two) scale = rounded_up_to_power_of_two(scale);
  return {scale, rule.order == kDivide ? scale : 1.0f / scale};
}

// Whose order of operations NVFP4 scales follow: rlkern/ops/quantize_nvfp4.
enum Nvfp4Recipe : int64_t { kTe, kVllm, kCompressedTensors, kTorchao, kModelopt };

template <Nvfp4Recipe recipe>
inline constexpr bool kDividesElements = recipe == kCompressedTensors || recipe == kModelopt;

// What a recipe makes of max |w| over the tensor.
struct Nvfp4Global {
  float encode;  // S
  float decode;  // what multiplies code * scale

  // largest: six times the largest block scale
  static RLK_HD Nvfp4Global of(int64_t recipe, float amax, float largest) {
    float s = largest / amax;
    if (recipe == kTe) {
      if (!(amax > 0.0f)) s = 1.0f;
      s = s < kMostFloat ? s : kMostFloat;
      return {s == 0.0f ? 1.0f : s, amax / largest};
    }
    if (recipe == kVllm || recipe == kCompressedTensors) {
      // NaN or Inf
      if ((Bits<float>::of(s) & kMagnitude) >= kInfinityBits) s = 1.0f;
      return {s, 1.0f / s};
    }
    return {s, amax / largest};
  }
};

template <class F>
RLK_HD F te_factor(F s, Nvfp4Global global) {
  const F factor = 1.0f / (s * (1.0f / global.encode));
  return factor < kMostFloat ? factor : F{} + kMostFloat;
}

// F: a block each lane. The code of the block's scale, and the factor (or divisor) of its elements.
template <Nvfp4Recipe recipe, class F>
RLK_HD auto nvfp4_scale(F b, Nvfp4Global global, F& factor) {
  const float sixth = 1.0f / 6.0f;
  F scale;
  if constexpr (recipe == kTe)
    scale = b * (global.encode * sixth);
  else if constexpr (recipe == kVllm)
    scale = global.encode * (b * sixth);
  else if constexpr (recipe == kCompressedTensors)
    scale = global.encode * (b / 6.0f);
  else if constexpr (recipe == kTorchao) {
    scale = b / 6.0f / global.decode;
    scale = scale < 0.015625f ? F{} + 0.015625f : scale;
  } else {
    scale = b / (6.0f * global.decode);
    scale = scale == 0.0f ? F{} + 1.0f : scale;
    scale = scale < 0.001953125f ? F{} + 0.001953125f : scale;
  }
  auto code = e4m3(scale);
  if constexpr (recipe == kCompressedTensors) code = code == 0 ? (code ^ code) + 0x20 : code;
  const F s = from_e4m3<F>(code);
  if constexpr (recipe == kTe) {
    factor = te_factor(s, global);
  } else if constexpr (recipe == kVllm) {
    const F step = s * (1.0f / global.encode);
    factor = step == 0.0f ? F{} : 1.0f / step;
  } else if constexpr (recipe == kCompressedTensors) {
    factor = s / global.encode;
  } else if constexpr (recipe == kTorchao) {
    factor = (1.0f / global.decode) / s;
  } else {
    factor = s * global.decode;
  }
  return code;
}

}  // namespace rlkern
