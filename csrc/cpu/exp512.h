// A shorter exponential for sixteen floats, for loops that wait for little else. Include it where
// f32x16 is used under AVX-512 alone.
#pragma once

#include "lanes.h"

#if defined(RLK_MASK512)

namespace rlkern {

// 2^(i / 16), less i where the sixteenths of an exponent are added.
alignas(64) constexpr int32_t kSixteenths[16] = {
    0x3F800000, 0x3F7DAAC3, 0x3F7B95C2, 0x3F79C3D3, 0x3F7837F0, 0x3F76F532, 0x3F75FED7, 0x3F75583F,
    0x3F7504F3, 0x3F7508A4, 0x3F75672A, 0x3F76248C, 0x3F7744FD, 0x3F78CCDF, 0x3F7AC0C7, 0x3F7D257D,
};

// The same within the same error, in eleven instructions in place of fifteen: a table in a register
// leaves |r| <= ln(2) / 32 to the polynomial.
template <>
RLK_HD f32x16 exp_normal(f32x16 x) {
  const float kMagic = 12582912.0f;
  const f32x16 shifted = x * 23.0831206542234142f + kMagic;
  const f32x16 n = shifted - kMagic;
  const f32x16 r = (x - n * 4.33349609375e-2f) - n * -1.32621525e-5f;
  const f32x16 p = (r * 1.6666667163e-1f + 0.5f) * (r * r) + r;
  const i32x16 bits = Bits<f32x16>::of(shifted);
  const i32x16 sixteenth = __builtin_shuffle(load_as<i32x16>(kSixteenths), bits);
  const f32x16 power = Bits<f32x16>::from(sixteenth + (bits << 19));
  return power * p + power;
}

}  // namespace rlkern

#endif
