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
inline constexpr float kLeastFloat = std::numeric_limits<float>::min();  // that is normal
inline constexpr int32_t kInfinityBits = 0x7F800000;
inline constexpr int32_t kMagnitude = 0x7FFFFFFF;

// a b, rounded by itself: nvcc would fuse it with an addition. GCC is told by the file not to.
template <class F, class G>
RLK_HD F product(F a, G b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class I>
RLK_HD I at_most(I a, int32_t bound) {
  // GCC knows a minimum by <=
  const I most = (a ^ a) + bound;
  return a <= most ? a : most;
}
template <class I>
RLK_HD I not_below(I a, int32_t bound) {
  const I least = (a ^ a) + bound;
  return a > least ? a : least;
}

// Rounds magnitudes, as bits, to nearest, ties to even, in a float format of so many bits of
// mantissa whose smallest normal number is 2^lowest. Added to a, 2^(23 - mantissa) of the power of
// two at a or below has its last place where the format has it.
template <int mantissa, int lowest, class F>
struct Nearest {
  using I = decltype(Bits<F>::of(F{}));
  static constexpr int32_t kLowest = (127 + lowest) << 23, kAdd = (23 - mantissa) << 23;
  I power, adder;
  F sum;

  static RLK_HD Nearest of(I a) {
    const I power = not_below(a & kInfinityBits, kLowest), adder = power + kAdd;
    return {power, adder, Bits<F>::from(a) + Bits<F>::from(adder)};
  }
  RLK_HD I code() const {
    return Bits<F>::of(sum) - adder + ((power - kLowest) >> (23 - mantissa));
  }
  RLK_HD F value() const { return sum - Bits<F>::from(adder); }
};
template <class F>
using NearestE4m3 = Nearest<3, -6, F>;
template <class F>
using NearestE2m1 = Nearest<1, 0, F>;
inline constexpr int32_t kLargestE4m3Bits = 0x43E00000, kLargestE2m1Bits = 0x40C00000;

// The code of E4M3 nearest to x, ties to even, in the low byte: saturates; NaN is 0x7F.
template <class F>
RLK_HD auto e4m3(F x) {
  const auto bits = Bits<F>::of(x), magnitude = bits & kMagnitude;
  const auto a = at_most(magnitude, kLargestE4m3Bits);
  const auto code = NearestE4m3<F>::of(a).code() | ((bits >> 24) & 0x80);
  return magnitude > kInfinityBits ? (bits ^ bits) + 0x7F : code;
}

// The float of a code without sign.
template <class F, class I>
RLK_HD F from_e4m3(I code) {
  // bits of a float whose exponent is 120 too low, of a subnormal one where the code's is
  const F value = Bits<F>::from(code << 20) * 0x1p120f;
  return Bits<F>::from(code == 0x7F ? (code ^ code) + 0x7FC00000 : Bits<F>::of(value));
}

// The code of E2M1 nearest to x, ties to even, in the low four bits: saturates; NaN is 7.
template <class F>
RLK_HD auto e2m1(F x) {
  const auto bits = Bits<F>::of(x), magnitude = bits & kMagnitude;
  const auto code = NearestE2m1<F>::of(at_most(magnitude, kLargestE2m1Bits)).code();
  return code | (magnitude > kInfinityBits ? bits ^ bits : (bits >> 28) & 8);
}

// One of the two codes of E2M1 around x, the upper with the probability of x's place between them:
// up by byte / 256 of a step, then down to a code. Saturates; NaN is 7.
template <class F, class I>
RLK_HD I e2m1_stochastic(F x, I byte) {
  const I bits = Bits<F>::of(x), magnitude = bits & kMagnitude;
  const I a = at_most(magnitude, kLargestE2m1Bits);
  // codes stand half the power of two at a or below apart, half from 0 to 1
  const I power = not_below(a & kInfinityBits, 0x3F800000);
  const F step = Bits<F>::from(power - (9 << 23));
  // the byte as float: in the last places of 2^23
  const F up_to = Bits<F>::from(byte | 0x4B000000) - 8388608.0f;
  const I up = Bits<F>::of(Bits<F>::from(a) + up_to * step);
  const I below1 = up >= 0x3F000000 ? (bits ^ bits) + 1 : bits ^ bits;
  const I code = up >= 0x3F800000 ? (up >> 22) - 252 : below1;
  return code | (magnitude > kInfinityBits ? bits ^ bits : (bits >> 28) & 8);
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
enum Fp8Order : int64_t {
  kDivide,
  kReciprocal,
  kEncode,
  kDivideZero,
  kRceil,
  kLog2,
  kLog2Zero,
  kEven
};

// Those whose scales are UE8M0, those that divide elements, and those that make +0 of -0.
RLK_HD constexpr bool has_byte_scales(int64_t order) { return order >= kRceil; }
RLK_HD constexpr bool divides(int64_t order) { return order == kDivide || order == kDivideZero; }
RLK_HD constexpr bool adds_zero(int64_t order) { return order == kDivideZero || order == kEven; }

struct Fp8Rule {
  int64_t order;
  float amax_floor, scale_floor, zero_scale;
  bool power_of_two;
};

struct Fp8Scale {
  float scale;   // as stored; its byte where has_byte_scales
  float factor;  // of the elements; their divisor where the order divides

  RLK_HD float value(int64_t order) const {
    if (!has_byte_scales(order)) return scale;
    const int32_t byte = static_cast<int32_t>(scale);
    return Bits<float>::from(byte == 255 ? 0x7FC00000 : byte == 0 ? 0x00400000 : byte << 23);
  }
};

RLK_HD float rounded_up_to_power_of_two(float s) {
  const int32_t bits = Bits<float>::of(s);
  if ((bits & kMagnitude) > kInfinityBits) return s;
  int32_t exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
  exponent = exponent < 1 ? 1 : exponent > 254 ? 254 : exponent;
  return Bits<float>::from(exponent << 23);
}

// By how many units in the last place 2^exponent can be passed while the logarithm in float,
// rounded once, is still the integer: so much do ceil(log2(x)) in float and the exact one differ.
RLK_HD int32_t log2_slack(int32_t exponent) {
  const int32_t u = exponent ^ (exponent >> 31);
  return (u >= 4) + (u >= 8) + 3 * (u >= 16) + 6 * (u >= 32) + 11 * (u >= 64);
}

RLK_HD Fp8Scale mx_scale(float a, int64_t order) {
  int32_t byte;
  if (order == kEven) {
    // rounded at half a unit of E2M1's mantissa, then the power of two, 2^8 below
    const int32_t bits = Bits<float>::of(a);
    byte = ((bits < 0x7F600000 ? bits + 0x200000 : kInfinityBits) >> 23) - 8;
    byte = byte < 0 ? 0 : byte == 247 ? 255 : byte;
  } else {
    const float ratio = order == kRceil ? a * (1.0f / kLargestE4m3) : a / kLargestE4m3;
    const int32_t bits = Bits<float>::of(ratio);
    const int32_t exponent = bits >> 23, mantissa = bits & 0x7FFFFF;
    // a subnormal number has places twice as far apart as 2^-127 would
    const int32_t tiny = order == kRceil ? 0x400000 : 0x400000 + 11;
    const int32_t slack = order == kRceil ? 0 : log2_slack(exponent - 127);
    byte = exponent + (mantissa > (exponent == 0 ? tiny : slack));
    byte = byte > 254 ? 254 : byte;
    if (bits > kInfinityBits) byte = order == kLog2Zero ? 0 : 255;
  }
  if (byte == 255) return {255.0f, Bits<float>::from(0x7FC00000)};
  float factor = Bits<float>::from(byte == 254 ? 0x00400000 : (254 - byte) << 23);
  if (byte == 0 && order == kLog2) factor = 1.0f;
  return {static_cast<float>(byte), factor};
}

RLK_HD Fp8Scale fp8_scale(float a, const Fp8Rule& rule) {
  if (has_byte_scales(rule.order)) return mx_scale(a, rule.order);
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
  return {scale, divides(rule.order) ? scale : 1.0f / scale};
}

// Whose order of operations NVFP4 scales follow: rlkern/ops/quantize_nvfp4.
enum Nvfp4Recipe : int64_t { kTe, kVllm, kCompressedTensors, kTorchao, kModelopt, kFouroversix };

template <Nvfp4Recipe recipe>
inline constexpr bool kDividesElements = recipe == kCompressedTensors || recipe == kModelopt;
// Those that take the sign of an element from x < 0 or sign(x): -0 is encoded as 0.
template <Nvfp4Recipe recipe>
inline constexpr bool kAddsZero = kDividesElements<recipe> || recipe == kFouroversix;

// What a recipe makes of max |w| over the tensor.
struct Nvfp4Global {
  float encode;   // S
  float decode;   // what multiplies code * scale
  float inverse;  // 1 / S

  // largest: six times the largest block scale
  static RLK_HD Nvfp4Global of(int64_t recipe, float amax, float largest) {
    float s = largest / amax;
    if (recipe == kTe || recipe == kFouroversix) {
      if (recipe == kTe ? !(amax > 0.0f) : amax == 0.0f) s = 1.0f;
      s = s > kMostFloat ? kMostFloat : s;
      if (recipe == kTe && s == 0.0f) s = 1.0f;
      return {s, amax / largest, 1.0f / s};
    }
    if (recipe == kVllm || recipe == kCompressedTensors) {
      if (recipe == kCompressedTensors)
        s = 1.0f / (amax < kLeastFloat ? kLeastFloat : amax) * largest;
      // NaN or Inf
      if ((Bits<float>::of(s) & kMagnitude) >= kInfinityBits) s = 1.0f;
      return {s, 1.0f / s, 1.0f / s};
    }
    return {s, amax / largest, 1.0f / s};
  }
};

// 1 / (s (1 / S)); where s is 0 the largest float, of fouroversix 0.
template <Nvfp4Recipe recipe, class F>
RLK_HD F te_factor(F s, Nvfp4Global global) {
  const F factor = 1.0f / (s * global.inverse);
  if constexpr (recipe == kFouroversix)
    return s == 0.0f ? F{} : factor;
  else
    return factor > kMostFloat ? F{} + kMostFloat : factor;
}

// What E2M1 rounds of an element.
template <Nvfp4Recipe recipe, class F>
RLK_HD F nvfp4_scaled(F x, F factor) {
  const F v = kDividesElements<recipe> ? x / factor : product(x, factor);
  return kAddsZero<recipe> ? v + 0.0f : v;
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
  else if constexpr (recipe == kFouroversix)
    scale = b / 6.0f * global.encode;
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
  if constexpr (recipe == kTe || recipe == kFouroversix) {
    factor = te_factor<recipe>(s, global);
  } else if constexpr (recipe == kVllm) {
    const F step = s * global.inverse;
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

// How four over six adds up errors: not at all (one candidate alone), squares or magnitudes.
enum Nvfp4Rule : int64_t { kNone, kSquares, kMagnitudes };

// Whether products of max |w| by codes and scales are neither subnormal nor infinite.
RLK_HD bool is_usual(float amax) { return amax > 0x1p-80f && amax < 0x1p100f; }

// One of the two ways to encode a block by four over six: by a scale that makes the largest element
// 6, or 4.
template <class F>
struct Candidate {
  decltype(Bits<F>::of(F{})) scale;
  F step, factor, error;

  template <Nvfp4Recipe recipe>
  static RLK_HD Candidate of(F raw, Nvfp4Global global) {
    const auto scale = e4m3<F>(raw);
    const F step = from_e4m3<F>(scale);
    return {scale, step, te_factor<recipe>(step, global), F{}};
  }
  // The error of elements of magnitude w: of -w it is the same. one, one_and_half: what codes of
  // these stand for, ((code step) amax) / 1536: of others they are a power of two times one of
  // these, rounded alike where amax is usual.
  template <bool kOfSquares, bool kUsual>
  RLK_HD F error_of(F w, float amax, F one, F one_and_half) const {
    const auto a = at_most(Bits<F>::of(w * factor), kLargestE2m1Bits);
    const F rounded = NearestE2m1<F>::of(a).value();
    const auto bits = Bits<F>::of(rounded);
    F value;
    if constexpr (kUsual) {
      const auto of_power = (bits & 0x00400000) != 0 ? Bits<F>::of(one_and_half) : Bits<F>::of(one);
      value = product(Bits<F>::from(of_power), Bits<F>::from(bits & kInfinityBits));
    } else {
      value = rounded * step * amax / 1536.0f;
    }
    const F off = value - w;
    return kOfSquares ? product(off, off) : Bits<F>::from(Bits<F>::of(off) & kMagnitude);
  }
  // From left to right; with kByHalves those of elements i and i + 8 first.
  template <bool kOfSquares, bool kByHalves, bool kUsual, class Block>
  RLK_HD void add_errors(const Block& x, float amax) {
    const F one = step * amax / 1536.0f, one_and_half = 1.5f * step * amax / 1536.0f;
    RLK_UNROLL
    for (int e = 0; e < (kByHalves ? 8 : 16); ++e) {
      F term = error_of<kOfSquares, kUsual>(x.magnitude(e), amax, one, one_and_half);
      if constexpr (kByHalves)
        term += error_of<kOfSquares, kUsual>(x.magnitude(e + 8), amax, one, one_and_half);
      error += term;
    }
  }
};

}  // namespace rlkern
