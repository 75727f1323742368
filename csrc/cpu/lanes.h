// Which lanes of a vector a flag is set for; and masks of sixteen floats in AVX-512's registers for
// them. GCC 12 has no vectors for those: it takes a comparison whose result is used twice apart
// lane by lane, and intrinsics cannot be called from functions that are compiled for several
// instruction sets. Include it where f32x16 is used under AVX-512 alone.
#pragma once

#include "rlkern/math/mask.h"
#include "vec.h"

namespace rlkern {

// flags: a byte of 0 or 1 by lane
template <class F>
struct Flags {
  static RLK_HD Mask<F> load(const uint8_t* flags) {
    return -__builtin_convertvector(load_as<typename Narrow<F>::Bytes>(flags), Mask<F>);
  }
  static RLK_HD void store(uint8_t* flags, Mask<F> mask) {
    store_as(flags, __builtin_convertvector(-mask, typename Narrow<F>::Bytes));
  }
};

}  // namespace rlkern

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLK_MASK512

namespace rlkern {

struct Mask16 {
  uint16_t bits = 0;

  static RLK_HD bool none(Mask16 x) { return __builtin_constant_p(x.bits) && x.bits == 0; }
  friend RLK_HD Mask16 operator&(Mask16 x, Mask16 y) {
    Mask16 out;
    if (!none(x) && !none(y)) asm("kandw %2, %1, %0" : "=k"(out.bits) : "k"(x.bits), "k"(y.bits));
    return out;
  }
  friend RLK_HD Mask16 operator|(Mask16 x, Mask16 y) {
    if (none(x)) return y;
    if (none(y)) return x;
    Mask16 out;
    asm("korw %2, %1, %0" : "=k"(out.bits) : "k"(x.bits), "k"(y.bits));
    return out;
  }
  friend RLK_HD Mask16 operator~(Mask16 x) {
    Mask16 out;
    asm("knotw %1, %0" : "=k"(out.bits) : "k"(x.bits));
    return out;
  }
  RLK_HD Mask16& operator&=(Mask16 y) { return *this = *this & y; }
  RLK_HD Mask16& operator|=(Mask16 y) { return *this = *this | y; }
};

template <>
struct Lanes<f32x16> {
  using Mask = Mask16;
  using Tally = int64_t;

  static RLK_HD Mask above(f32x16 x, f32x16 y) {
    Mask out;
    asm("vcmpps $30, %2, %1, %0" : "=k"(out.bits) : "v"(x), "v"(y));
    return out;
  }
  static RLK_HD Mask at_least(f32x16 x, f32x16 y) {
    Mask out;
    asm("vcmpps $29, %2, %1, %0" : "=k"(out.bits) : "v"(x), "v"(y));
    return out;
  }
  static RLK_HD Mask equal(f32x16 x, f32x16 y) {
    Mask out;
    asm("vcmpps $0, %2, %1, %0" : "=k"(out.bits) : "v"(x), "v"(y));
    return out;
  }
  static RLK_HD Mask differs(f32x16 x, f32x16 y) {
    Mask out;
    asm("vcmpps $4, %2, %1, %0" : "=k"(out.bits) : "v"(x), "v"(y));
    return out;
  }
  static RLK_HD Mask apart(f32x16 x, f32x16 y) {
    Mask out;
    asm("vcmpps $12, %2, %1, %0" : "=k"(out.bits) : "v"(x), "v"(y));
    return out;
  }
  static RLK_HD f32x16 select(Mask mask, f32x16 x, f32x16 y) {
    if (Mask::none(mask)) return y;
    f32x16 out;
    asm("vblendmps %1, %2, %0%{%3%}" : "=v"(out) : "v"(x), "v"(y), "Yk"(mask.bits));
    return out;
  }
  static RLK_HD f32x16 where(Mask mask, f32x16 x) {
    f32x16 out;
    asm("vmovaps %1, %0%{%2%}%{z%}" : "=v"(out) : "v"(x), "Yk"(mask.bits));
    return out;
  }
  static RLK_HD f32x16 unless(Mask mask, f32x16 x) {
    return Mask::none(mask) ? x : where(~mask, x);
  }
  static RLK_HD f32x16 lesser(f32x16 x, f32x16 y) {
    f32x16 out;
    asm("vminps %2, %1, %0" : "=v"(out) : "v"(x), "v"(y));
    return out;
  }
  static RLK_HD f32x16 greater(f32x16 x, f32x16 y) {
    f32x16 out;
    asm("vmaxps %2, %1, %0" : "=v"(out) : "v"(x), "v"(y));
    return out;
  }
  static RLK_HD f32x16 times(Mask mask, f32x16 x, f32x16 y) {
    f32x16 out;
    asm("vmulps %2, %1, %0%{%3%}%{z%}" : "=v"(out) : "v"(x), "v"(y), "Yk"(mask.bits));
    return out;
  }
  static RLK_HD f32x16 add(Mask mask, f32x16 sum, f32x16 x) {
    asm("vaddps %1, %0, %0%{%2%}" : "+v"(sum) : "v"(x), "Yk"(mask.bits));
    return sum;
  }
  static RLK_HD f32x16 add(Mask mask, f32x16 sum, f32x16 x, f32x16 y) {
    asm("vfmadd231ps %2, %1, %0%{%3%}" : "+v"(sum) : "v"(x), "v"(y), "Yk"(mask.bits));
    return sum;
  }
  static RLK_HD f32x16 lesser(Mask mask, f32x16 x, f32x16 y) {
    asm("vminps %0, %1, %0%{%2%}" : "+v"(y) : "v"(x), "Yk"(mask.bits));
    return y;
  }
  static RLK_HD f32x16 greater(Mask mask, f32x16 x, f32x16 y) {
    asm("vmaxps %0, %1, %0%{%2%}" : "+v"(y) : "v"(x), "Yk"(mask.bits));
    return y;
  }
  static RLK_HD f32x16 root(f32x16 x) {
    f32x16 out;
    asm("vsqrtps %1, %0" : "=v"(out) : "v"(x));
    return out;
  }
  // in integer registers: the vector units are what such loops wait for
  static RLK_HD void count(Tally& tally, Mask mask) { tally += __builtin_popcount(mask.bits); }
  static RLK_HD int64_t total(Tally tally) { return tally; }
  static RLK_HD bool any(Mask mask) { return mask.bits != 0; }
};

template <>
struct Flags<f32x16> {
  static RLK_HD Mask16 load(const uint8_t* flags) {
    Mask16 out;
    asm("vptestmb %1, %1, %0" : "=k"(out.bits) : "v"(load_as<u8x16>(flags)));
    return out;
  }
  static RLK_HD void store(uint8_t* flags, Mask16 mask) {
    const u8x16 one = u8x16{} + 1;
    u8x16 out;
    asm("vmovdqu8 %1, %0%{%2%}%{z%}" : "=v"(out) : "v"(one), "Yk"(mask.bits));
    store_as(flags, out);
  }
};

}  // namespace rlkern

#endif
