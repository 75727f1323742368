// What the quantisers share: largest magnitudes by their bits.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "lanes.h"
#include "rlkern/math/quant.h"
#include "vec.h"

// A kernel is compiled for as many lanes as a register has: comparisons of wider vectors would be
// taken apart (see vec.h).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLK_LANES_16 __attribute__((target("arch=x86-64-v4")))
#define RLK_LANES_8 __attribute__((target("arch=x86-64-v3")))
#else
#define RLK_LANES_16
#define RLK_LANES_8
#endif

// name_16, name_8 and name_4 are the same kernel.
#define RLK_CALL_BY_LANES(name, ...) \
  switch (cpu_isa()) {               \
    case Isa::kDefault:              \
      name##_4(__VA_ARGS__);         \
      break;                         \
    case Isa::kAvx2:                 \
      name##_8(__VA_ARGS__);         \
      break;                         \
    default:                         \
      name##_16(__VA_ARGS__);        \
  }

namespace rlkern {

template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);

// widen, by the instruction that AVX2 and AVX-512 have for halves.
template <class V, class T>
RLK_HD V as_floats(const T* p) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (std::is_same_v<T, fp16> && kWidth<V> >= 8) {
    V x;
    asm("vcvtph2ps %1, %0"
        : "=v"(x)
        : "m"(*reinterpret_cast<const typename Narrow<V>::Halves*>(p)));
    return x;
  }
#endif
  return widen<V>(p);
}

// Bytes as integers, a lane each: GCC 12 would take the conversion apart.
template <class V>
RLK_HD auto as_ints(const uint8_t* p) {
  using Bytes = typename Narrow<V>::Bytes;
  using Ints = typename Narrow<V>::Ints;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (kWidth<V> >= 8) {
    Ints x;
    asm("vpmovzxbd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const Bytes*>(p)));
    return x;
  }
#endif
  return __builtin_convertvector(load_as<Bytes>(p), Ints);
}

// Elements past `left` are 0.
template <class V, class T>
RLK_HD V load_up_to(const T* p, int64_t left) {
  if (left >= kWidth<V>) return as_floats<V>(p);
  V x{};
  for (int64_t i = 0; i < left; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}

template <class I>
RLK_HD I larger(I a, I b) {
  return a > b ? a : b;
}

// The largest lane of 16, 32 or 64 bytes.
template <class I>
RLK_HD auto reduce_max_bits(I x) {
  using Lane = std::remove_reference_t<decltype(x[0])>;
  if constexpr (sizeof(I) > 16) {
    typedef Lane Half __attribute__((vector_size(sizeof(I) / 2)));
    return reduce_max_bits(
        larger(load_as<Half>(&x), load_as<Half>(reinterpret_cast<char*>(&x) + sizeof(Half))));
  } else {
    typedef int64_t i64x2 __attribute__((vector_size(16)));
    typedef int16_t i16x8 __attribute__((vector_size(16)));
    x = larger(x, (I)__builtin_shuffle((i64x2)x, i64x2{1, 0}));
    x = larger(x, (I)__builtin_shuffle((i32x4)x, i32x4{1, 0, 3, 2}));
    if constexpr (sizeof(Lane) == 2)
      x = larger(x, (I)__builtin_shuffle((i16x8)x, i16x8{1, 0, 3, 2, 5, 4, 7, 6}));
    return static_cast<int32_t>(x[0]);
  }
}

// The bits of |x|, as integers in the order of the floats; a NaN is above infinity.
template <class V>
RLK_HD auto magnitudes(V x) {
  return Bits<V>::of(x) & kMagnitude;
}

template <class I>
struct FloatsOf {
  typedef float Type __attribute__((vector_size(sizeof(I))));
};
template <>
struct FloatsOf<int32_t> {
  using Type = float;
};

// A register full of magnitudes in the elements' own width: those of 16 bits go two to a lane.
template <class V, class T>
struct Magnitudes {
  using Lane = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;
  typedef Lane Vector __attribute__((vector_size(sizeof(V))));
  static constexpr int64_t kCount = sizeof(V) / sizeof(T);
  static constexpr Lane kMask = sizeof(T) == 2 ? 0x7FFF : kMagnitude;
  static constexpr Lane kInfinity = std::is_same_v<T, fp16>   ? 0x7C00
                                    : std::is_same_v<T, bf16> ? 0x7F80
                                                              : kInfinityBits;

  // NaN counts as larger than all, or where it is ignored as 0.
  template <bool kIgnoresNan>
  static RLK_HD Vector of(Vector bits) {
    const Vector magnitude = bits & kMask;
    if constexpr (kIgnoresNan) return magnitude > kInfinity ? Vector{} : magnitude;
    return magnitude;
  }
  // The bits of a float; those of 16 bits are in the low half.
  template <class I>
  static RLK_HD I as_float(I magnitude) {
    if constexpr (std::is_same_v<T, fp16>)
      return magnitudes(widen_half<typename FloatsOf<I>::Type>(magnitude << 16));
    return sizeof(T) == 2 ? magnitude << 16 : magnitude;
  }
  static RLK_HD int32_t reduce(Vector most) { return as_float<int32_t>(reduce_max_bits(most)); }

  // The largest of p[0 .. count) and of `most`, two registers at a time to hide latency.
  template <bool kIgnoresNan>
  static RLK_HD Vector over(const T* p, int64_t count, Vector most) {
    Vector other{};
    int64_t j = 0;
    for (; j + 2 * kCount <= count; j += 2 * kCount) {
      most = larger(most, of<kIgnoresNan>(load_as<Vector>(p + j)));
      other = larger(other, of<kIgnoresNan>(load_as<Vector>(p + j + kCount)));
    }
    for (; j < count; j += kCount) {
      Vector x{};
      if (j + kCount <= count)
        x = load_as<Vector>(p + j);
      else
        std::memcpy(&x, p + j, (count - j) * sizeof(T));
      most = larger(most, of<kIgnoresNan>(x));
    }
    return larger(most, other);
  }
};

// How many of eight bytes differ: of each difference that is not 0 the upper bit is set.
RLK_HD int64_t num_different(uint64_t a, uint64_t b) {
  const uint64_t low = 0x7F7F7F7F7F7F7F7Full, off = a ^ b;
  return __builtin_popcountll((((off & low) + low) | off) & ~low);
}
RLK_HD int64_t num_different(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= bytes; i += 8)
    count += num_different(load_as<uint64_t>(a + i), load_as<uint64_t>(b + i));
  for (; i < bytes; ++i) count += a[i] != b[i];
  return count;
}

// A thread is worth starting for about this many elements.
constexpr int64_t kQuantizeGrain = 32768;

// max |w| of everything; NaN counts as larger than all, or not.
float tensor_amax(const float* w, int64_t count, bool ignores_nan);
float tensor_amax(const bf16* w, int64_t count, bool ignores_nan);
float tensor_amax(const fp16* w, int64_t count, bool ignores_nan);

// What a sweep may count on its way: the columns of the schema's statistics.
struct Counts {
  double changed = 0, saturated = 0, flushed = 0, squared_error = 0, squared = 0;

  // What a few elements in each lane have come to.
  template <class V>
  struct Lanewise {
    Tally<V> saturated{}, flushed{};
    V squared_error{}, squared{};

    // w: magnitudes of elements; scaled: what was encoded; code: values of codes without sign, and
    // value: with their scales, of which infinite ones make NaN of 0.
    RLK_HD void add(V w, V scaled, float largest, V code, V value) {
      const V size = Bits<V>::from(Bits<V>::of(scaled) & kMagnitude);
      Lanes<V>::count(saturated, is_above(size, V{} + largest));
      Lanes<V>::count(flushed, is_equal(code, V{}) & differs(w, V{}));
      const V off = value - w;
      squared_error += off * off;
      squared += w * w;
    }
  };
  // Of the first `live` lanes: in the others w is 0, but value may be NaN.
  template <class V>
  RLK_HD void add(const Lanewise<V>& x, int64_t live) {
    saturated += Lanes<V>::total(x.saturated);
    flushed += Lanes<V>::total(x.flushed);
    const V error = x.squared_error;
    squared_error +=
        reduce_add(live < static_cast<int64_t>(kWidth<V>) ? first(live, error) : error);
    squared += reduce_add(x.squared);
  }
};
constexpr int64_t kNumCounts = sizeof(Counts) / sizeof(double);

// One Counts of each piece of the work, whatever thread takes it, or none. Their sums are in the
// order of the pieces: the same bits for any number of threads.
class PiecewiseCounts {
 public:
  PiecewiseCounts(bool wanted, int64_t pieces) : pieces_(wanted ? pieces : 0), wanted_(wanted) {}
  Counts* of(int64_t piece) { return wanted_ ? &pieces_[piece] : nullptr; }

  // (5,) float64, (0,) where not wanted.
  torch::stable::Tensor sums(const torch::stable::Tensor& like) const {
    using torch::headeronly::ScalarType;
    torch::stable::Tensor out =
        torch::stable::new_empty(like, {wanted_ ? kNumCounts : 0}, ScalarType::Double);
    if (!wanted_) return out;
    Counts all;
    for (const Counts& c : pieces_) {
      all.changed += c.changed;
      all.saturated += c.saturated;
      all.flushed += c.flushed;
      all.squared_error += c.squared_error;
      all.squared += c.squared;
    }
    std::memcpy(out.mutable_data_ptr<double>(), &all, sizeof all);
    return out;
  }

 private:
  std::vector<Counts> pieces_;
  bool wanted_;
};

}  // namespace rlkern
