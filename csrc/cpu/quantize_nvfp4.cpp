// NVFP4: a pass over the tensor for its largest magnitude, then sixteen (or eight) blocks at a
// time, transposed so that each has a lane: a block's largest magnitude, scale, errors and packed
// codes need no step across lanes. Products and sums are rounded one by one, as in the reference:
// none may become an fma.
#pragma GCC optimize("fp-contract=off")

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "check.h"
#include "dispatch.h"
#include "quantize.h"
#include "rlkern/math/mask.h"
#include "rlkern/math/philox.h"

namespace rlkern {

typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

template <class U, class Wide>
struct VectorHighHalf {
  static RLK_HD U of(U a, uint32_t b) {
    return __builtin_convertvector((__builtin_convertvector(a, Wide) * b) >> 32, U);
  }
};
typedef uint64_t u64x16 __attribute__((vector_size(128)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));
template <>
struct HighHalf<u32x16> : VectorHighHalf<u32x16, u64x16> {};
template <>
struct HighHalf<u32x8> : VectorHighHalf<u32x8, u64x8> {};
template <>
struct HighHalf<u32x4> : VectorHighHalf<u32x4, u64x4> {};

namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 16;

// TE's fmaxf passes over NaN; the others carry it on.
template <Nvfp4Recipe recipe>
inline constexpr bool kIgnoresNan = recipe == kTe;

// Lanes of a where (lane & kStep) == 0, of b elsewhere; the other's lane kStep away where kCross.
template <int kStep, bool kUpper, class I>
RLK_HD I exchange(I a, I b) {
  constexpr int kLanes = sizeof(I) / 4;
  I mask{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    const int from_a = kUpper ? lane ^ kStep : lane, from_b = kUpper ? lane : lane ^ kStep;
    mask[lane] = (lane & kStep) == 0 ? from_a : kLanes + from_b;
  }
  return __builtin_shuffle(a, b, mask);
}

// Of kLanes vectors, lane l of x[i] and lane i of x[l] change places; with kHalves those of the
// lower and upper half of each.
template <bool kHalves, class I>
RLK_HD void transpose(I* x) {
  constexpr int kCount = sizeof(I) / (kHalves ? 8 : 4);
  // a call would be compiled for the least of instruction sets
  const auto step = [x](auto width) __attribute__((always_inline)) {
    constexpr int kStep = decltype(width)::value;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (i & kStep) continue;
      const I a = x[i], b = x[i | kStep];
      x[i] = exchange<kStep, false>(a, b);
      x[i | kStep] = exchange<kStep, true>(a, b);
    }
  };
  step(std::integral_constant<int, 1>());
  step(std::integral_constant<int, 2>());
  if constexpr (kCount >= 8) step(std::integral_constant<int, 4>());
  if constexpr (kCount >= 16) step(std::integral_constant<int, 8>());
}

// What is computed from `next` comes after what `done` is computed from: else all of the first
// steps of many elements would be moved ahead of the second ones, and out of the registers.
template <class A, class B>
RLK_HD void in_order(A& done, B& next) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  asm("" : "+v"(done), "+v"(next));
#endif
}

// As many blocks as V has lanes, side by side in memory, a lane each. A word is 32 bits of a block:
// one float, which a half becomes when it is loaded, or two bfloat16.
template <class V, class T>
struct Blocks {
  using I = typename Narrow<V>::Ints;
  static constexpr int kLanes = kWidth<V>;
  static constexpr int kPerWord = std::is_same_v<T, bf16> ? 2 : 1;
  static constexpr int kWords = kBlock / kPerWord;
  I words[kWords];

  RLK_HD void load(const T* p) {
    if constexpr (kWords < kLanes) {
      // blocks i and i + 8 in the halves of a register
      for (int i = 0; i < kWords; ++i) {
        struct {
          i32x8 low, high;
        } both{load_as<i32x8>(p + i * kBlock), load_as<i32x8>(p + (i + 8) * kBlock)};
        words[i] = load_as<I>(&both);
      }
      transpose<true>(words);
    } else {
      for (int first = 0; first < kWords; first += kLanes) {
        for (int i = 0; i < kLanes; ++i) {
          const T* from = p + i * kBlock + first * kPerWord;
          if constexpr (std::is_same_v<T, fp16>)
            words[first + i] = (I)as_floats<V>(from);
          else
            words[first + i] = load_as<I>(from);
        }
        transpose<false>(words + first);
      }
    }
  }

  // Of all these rows of blocks the magnitudes, element by element the largest.
  RLK_HD void load_largest(const T* p, int64_t rows, int64_t columns) {
    using M = Magnitudes<V, T>;
    constexpr int kCount = kLanes * kBlock / M::kCount;
    alignas(64) typename M::Vector most[kCount] = {};
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) {
        const T* const from = p + i * columns + j * M::kCount;
        // of the blocks that come next: so many short streams are not foreseen
        __builtin_prefetch(from + kLanes * kBlock, 0, 2);
        most[j] = larger(most[j], M::template of<false>(load_as<typename M::Vector>(from)));
      }
    load(reinterpret_cast<const T*>(most));
  }

  // The bits of the largest magnitude of each block.
  template <bool kIgnoresNan>
  RLK_HD I largest() const {
    using M = Magnitudes<V, std::conditional_t<kPerWord == 2, bf16, float>>;
    typename M::Vector most{};
#pragma GCC unroll 16
    for (int i = 0; i < kWords; ++i)
      most = larger(most, M::template of<kIgnoresNan>((typename M::Vector)words[i]));
    const I pairs = (I)most;
    if constexpr (kPerWord == 1) return pairs;
    return M::template as_float<I>(larger(pairs & 0xFFFF, pairs >> 16));
  }

  // The same, which the compiler does not know: what it would share between two uses of them, or
  // compute ahead of a branch, is more than there are registers for.
  RLK_HD Blocks renewed() const {
    Blocks out = *this;
#pragma GCC unroll 16
    for (int i = 1; i < kWords; ++i) in_order(out.words[i - 1], out.words[i]);
    return out;
  }

  RLK_HD V element(int word, int part) const {
    if constexpr (kPerWord == 1) return (V)words[word];
    return (V)(part == 0 ? words[word] << 16 : words[word] & ~0xFFFF);
  }
  RLK_HD V magnitude(int e) const {
    return Bits<V>::from(magnitudes(element(e / kPerWord, e % kPerWord)));
  }
};

// Eight codes to a lane: those of elements 0 to 7 of each block, and of 8 to 15.
template <class I>
struct Packed {
  I low, high;

  // The eight bytes of each block, one block after the other.
  RLK_HD void store(uint8_t* out) const {
    constexpr int kLanes = sizeof(I) / 4;
    I first{}, second{};
    for (int i = 0; i < kLanes; ++i) {
      first[i] = i / 2 + (i % 2) * kLanes;
      second[i] = kLanes / 2 + i / 2 + (i % 2) * kLanes;
    }
    store_as(out, __builtin_shuffle(low, high, first));
    store_as(out + sizeof(I), __builtin_shuffle(low, high, second));
  }
  // How many codes of the first `live` blocks are others than in the bytes that `store` has
  // written.
  RLK_HD int64_t changes(const uint8_t* previous, int64_t live) const {
    constexpr int kLanes = sizeof(I) / 4;
    I even{}, odd{};
    for (int i = 0; i < kLanes; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
    const I a = load_as<I>(previous), b = load_as<I>(previous + sizeof(I));
    const I halves[2] = {nibbles(low ^ __builtin_shuffle(a, b, even)),
                         nibbles(high ^ __builtin_shuffle(a, b, odd))};
    int64_t count = 0;
    for (const I& half : halves)
      for (int64_t i = 0; i < live; ++i)
        count += __builtin_popcount(static_cast<uint32_t>(half[i]));
    return count;
  }
  // A bit for each of the eight in a lane that is not 0.
  static RLK_HD I nibbles(I x) { return (x | (x >> 1) | (x >> 2) | (x >> 3)) & 0x11111111; }
};

// The values of codes without sign.
template <class V, class I>
RLK_HD V values_of(I codes) {
  if constexpr (kWidth<V> == 16)
    return __builtin_shuffle(V{0, 0.5f, 1, 1.5f, 2, 3, 4, 6}, codes);
  else if constexpr (kWidth<V> == 8)
    return __builtin_shuffle(V{0, 0.5f, 1, 1.5f, 2, 3, 4, 6}, codes);
  else
    return from_e2m1<V>(codes);
}

template <class V, class I>
RLK_HD void store_scales(uint8_t* out, I codes) {
  store_as(out, __builtin_convertvector(codes, typename Narrow<V>::Bytes));
}

// Of magnitudes below 8, by the low bits of their exponent, a power of two with its last place
// where E2M1 has it. What is below 1/4 rounds to 0 with any of them.
template <class V, class I>
RLK_HD V adders(I bits) {
  constexpr float kHalf = 0x1p22f, kOne = 0x1p23f, kTwo = 0x1p24f;
  if constexpr (kWidth<V> == 16)
    return __builtin_shuffle(V{kOne, kTwo, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf,
                               kHalf, kHalf, kHalf, kHalf, kHalf, kHalf},
                             bits >> 23);
  else if constexpr (kWidth<V> == 8)
    return __builtin_shuffle(V{kOne, kTwo, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf}, bits >> 23);
  else
    return Bits<V>::from(not_below(bits & kInfinityBits, 0x3F800000) + (22 << 23));
}

// e2m1 of numbers between -7 and 7.
template <class V>
RLK_HD auto e2m1_below_7(V x) {
  const auto bits = Bits<V>::of(x);
  if constexpr (kWidth<V> == 4) {
    return NearestE2m1<V>::of(bits & kMagnitude).code() | ((bits >> 28) & 8);
  } else {
    // 1/4 rounds to 0 too, and its exponent is one that `codes` has
    const auto a = not_below(bits & kMagnitude, 0x3E800000);
    // the last places of the sum are the code: 2 steps of 1, 4 of 2 are there before
    constexpr float kHalf = 0x1p22f, kOne = 0x1p23f + 2, kTwo = 0x1p24f + 8;
    V codes;
    if constexpr (kWidth<V> == 16)
      codes = V{kOne,  kTwo,  kHalf, kHalf, kHalf, kHalf, kHalf, kHalf,
                kHalf, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf};
    else
      codes = V{kOne, kTwo, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf};
    const V sum = Bits<V>::from(a) + __builtin_shuffle(codes, a >> 23);
    return (Bits<V>::of(sum) & 7) | ((bits >> 28) & 8);
  }
}

// kBelow7: what E2M1 rounds is, which saves the looks at NaN and at what saturates.
template <class V, Nvfp4Recipe recipe, bool kBelow7, class T>
RLK_HD auto encode(Blocks<V, T> x, V factor) {
  using I = typename Narrow<V>::Ints;
  I halves[2];
  for (int half = 0; half < 2; ++half) {
    I codes{};
#pragma GCC unroll 8
    for (int i = 0; i < x.kWords / 2; ++i) {
      in_order(codes, x.words[half * x.kWords / 2 + i]);
      for (int part = 0; part < x.kPerWord; ++part) {
        const V w = x.element(half * x.kWords / 2 + i, part);
        const V v = nvfp4_scaled<recipe>(w, factor);
        I code;
        if constexpr (kBelow7)
          code = e2m1_below_7<V>(v);
        else
          code = e2m1<V>(v);
        codes |= code << (4 * (i * x.kPerWord + part));
      }
    }
    halves[half] = codes;
  }
  return Packed<I>{halves[0], halves[1]};
}

// Whether no scaled element of blocks of this largest magnitude reaches 7 or is NaN.
template <class V, Nvfp4Recipe recipe>
RLK_HD bool stays_below_7(V most, V factor) {
  return !Lanes<V>::any(~is_above(V{} + 7.0f, nvfp4_scaled<recipe>(most, factor)));
}
template <class V, Nvfp4Recipe recipe, class T>
RLK_HD auto encode(const Blocks<V, T>& x, V factor, bool below_7) {
  return below_7 ? encode<V, recipe, true>(x, factor)
                 : encode<V, recipe, false>(x.renewed(), factor);
}

// Of four over six, about the sums of errors that two candidates have, in steps of their own.
template <class V, bool kOfSquares, class T>
RLK_HD void rough_errors(Blocks<V, T> x, const V (&factor)[2], V (&error)[2]) {
  V sums[2][2] = {};
#pragma GCC unroll 16
  for (int e = 0; e < kBlock; ++e) {
    if (e % x.kPerWord == 0) in_order(sums[1][1], x.words[e / x.kPerWord]);
    const V w = x.magnitude(e);
    for (int i = 0; i < 2; ++i) {
      const V a = w * factor[i], adder = adders<V>(Bits<V>::of(a));
      const V off = a + adder - adder - a;
      sums[i][e % 2] += kOfSquares ? off * off : Bits<V>::from(Bits<V>::of(off) & kMagnitude);
    }
  }
  for (int i = 0; i < 2; ++i) error[i] = sums[i][0] + sums[i][1];
}

// The same with random bits: byte e % 4 of word e / 4 of the Philox counter that is the block's
// index is element e's.
template <class V, Nvfp4Recipe recipe, class T>
RLK_HD auto encode_stochastic(const Blocks<V, T>& x, V factor, uint64_t seed, int64_t block) {
  using I = typename Narrow<V>::Ints;
  using U =
      std::conditional_t<kWidth<V> == 16, u32x16, std::conditional_t<kWidth<V> == 8, u32x8, u32x4>>;
  U low, high;
  for (int i = 0; i < x.kLanes; ++i) {
    low[i] = static_cast<uint32_t>(block + i);
    high[i] = static_cast<uint32_t>((block + i) >> 32);
  }
  const auto random = Philox<U>::of(low, high, seed);
  I halves[2];
  for (int half = 0; half < 2; ++half) {
    I codes{};
    for (int i = 0; i < 8; ++i) {
      const int e = half * 8 + i;
      const V v = nvfp4_scaled<recipe>(x.element(e / x.kPerWord, e % x.kPerWord), factor);
      const I byte = (I)(random.words[e / 4] >> (8 * (e % 4))) & 0xFF;
      codes |= e2m1_stochastic<V>(v, byte) << (4 * i);
    }
    halves[half] = codes;
  }
  return Packed<I>{halves[0], halves[1]};
}

// Adds what there is to say of the first `live` blocks, whose codes have just been found.
template <class V, Nvfp4Recipe recipe, class T>
RLK_HD void count(const Blocks<V, T>& x, V factor, V step, float decode,
                  const Packed<typename Narrow<V>::Ints>& codes, const uint8_t* previous,
                  int64_t live, Counts& counts) {
  using I = typename Narrow<V>::Ints;
  if (previous) counts.changed += codes.changes(previous, live);
  Counts::Lanewise<V> found;
#pragma GCC unroll 16
  for (int e = 0; e < kBlock; ++e) {
    const I codes_of = ((e < 8 ? codes.low : codes.high) >> (4 * (e % 8))) & 7;
    const V scaled = nvfp4_scaled<recipe>(x.element(e / x.kPerWord, e % x.kPerWord), factor);
    const V code = values_of<V>(codes_of);
    found.add(x.magnitude(e), scaled, kLargestE2m1, code, code * step * decode);
  }
  counts.add(found, live);
}

// What all blocks share.
struct Tensorwide {
  Nvfp4Global global;
  float amax;
  bool stochastic;
  uint64_t seed;
};

// Where a strip begins: the index of its first block, its codes before or null, where to count or
// null.
struct Sweep {
  int64_t block;
  const uint8_t* previous;
  Counts* counts;
};

// `rows` rows of as many blocks as V has lanes, which share their scales along columns of blocks.
template <class V, Nvfp4Recipe recipe, Nvfp4Rule rule, class T>
RLK_HD void quantize_lanes(const T* w, int64_t rows, int64_t columns, const Tensorwide& all,
                           const Sweep& sweep, int64_t blocks_apart, int64_t live, uint8_t* codes,
                           uint8_t* scales) {
  Blocks<V, T> x;
  // of sixteen rows at once before anything is transposed
  if (rows > 1)
    x.load_largest(w, rows, columns);
  else
    x.load(w);
  auto most = x.template largest<false>();
  // what TE passes over is rare: found once more, without
  bool has_nan = false;
  if constexpr (kIgnoresNan<recipe>) {
    has_nan = Lanes<V>::any(differs((V)most, (V)most));
    if (has_nan) {
      most ^= most;
      for (int64_t i = 0; i < rows; ++i) {
        x.load(w + i * columns);
        most = larger(most, x.template largest<true>());
      }
    }
  }
  if constexpr (rule != kNone) {
    const V raw = (V)most / 6.0f * all.global.encode;
    auto six = Candidate<V>::template of<recipe>(raw, all.global);
    auto four = Candidate<V>::template of<recipe>(raw * 1.5f, all.global);
    constexpr bool kOfSquares = rule == kSquares, kByHalves = recipe == kFouroversix;
    const bool below_7 = !has_nan && stays_below_7<V, recipe>((V)most, six.factor) &&
                         stays_below_7<V, recipe>((V)most, four.factor);
    Mask<V> better{};
    bool known = false;
    if (below_7 && is_usual(all.amax)) {
      // The errors in full are added up in one order, without fma. These are not: 16 errors of at
      // most 0.18 b, of values and elements whose roundings are within 17 units of 2^-24 b, differ
      // from those by at most 355 units, their squares by 105 units of 2^-24 b^2.
      V errors[2];
      rough_errors<V, kOfSquares>(x, {six.factor, four.factor}, errors);
      const V of_six = six.step * all.global.decode, of_four = four.step * all.global.decode;
      const V e6 = errors[0] * (kOfSquares ? of_six * of_six : of_six);
      const V e4 = errors[1] * (kOfSquares ? of_four * of_four : of_four);
      const V b = (V)most, slack = kOfSquares ? b * b * 0x1p-15f : b * 0x1p-14f;
      known = !Lanes<V>::any(~is_above(Bits<V>::from(magnitudes(e6 - e4)), slack));
      better = is_above(e6, e4);
    }
    x = x.renewed();
    if (!known) {
      const auto again = x.renewed();
      if (is_usual(all.amax)) {
        six.template add_errors<kOfSquares, kByHalves, true>(again, all.amax);
        four.template add_errors<kOfSquares, kByHalves, true>(again, all.amax);
      } else {
        six.template add_errors<kOfSquares, kByHalves, false>(again, all.amax);
        four.template add_errors<kOfSquares, kByHalves, false>(again, all.amax);
      }
      better = is_above(six.error, four.error);
    }
    const V scale = select(better, Bits<V>::from(four.scale), Bits<V>::from(six.scale));
    store_scales<V>(scales, Bits<V>::of(scale));
    const V factor = select(better, four.factor, six.factor);
    const auto found = encode<V, recipe>(x, factor, below_7);
    found.store(codes);
    if (sweep.counts)
      count<V, recipe>(x, factor, select(better, four.step, six.step), all.global.decode, found,
                       sweep.previous, live, *sweep.counts);
  } else {
    V factor;
    const auto scale = nvfp4_scale<recipe>((V)most, all.global, factor);
    const bool below_7 = !has_nan && stays_below_7<V, recipe>((V)most, factor);
    for (int64_t i = 0; i < rows; ++i) {
      if (rows > 1) x.load(w + i * columns);
      store_scales<V>(scales + i * columns / kBlock, scale);
      const auto found = all.stochastic ? encode_stochastic<V, recipe>(
                                              x, factor, all.seed, sweep.block + i * blocks_apart)
                                        : encode<V, recipe>(x, factor, below_7);
      found.store(codes + i * columns / 2);
      if (sweep.counts)
        count<V, recipe>(x, factor, from_e4m3<V>(scale), all.global.decode, found,
                         sweep.previous ? sweep.previous + i * columns / 2 : nullptr, live,
                         *sweep.counts);
    }
  }
}

// `count` blocks side by side; fewer than a register holds are padded with zeros.
template <class V, Nvfp4Recipe recipe, Nvfp4Rule rule, class T>
RLK_HD void quantize_strip(const T* w, int64_t rows, int64_t columns, int64_t count,
                           const Tensorwide& all, const Sweep& strip, uint8_t* codes,
                           uint8_t* scales) {
  constexpr int64_t kLanes = kWidth<V>, kPadded = kLanes * kBlock;
  T rest[kBlock * kPadded];
  uint8_t rest_codes[kBlock * kPadded / 2], rest_scales[kBlock * kLanes];
  uint8_t rest_before[kBlock * kPadded / 2];
  for (int64_t b = 0; b < count; b += kLanes) {
    const T* from = w + b * kBlock;
    uint8_t *to = codes + b * kBlock / 2, *to_scales = scales + b;
    const int64_t live = std::min(kLanes, count - b), apart = columns / kBlock;
    const bool partial = live < kLanes;
    Sweep sweep{strip.block + b, strip.previous, strip.counts};
    if (sweep.previous) sweep.previous += b * kBlock / 2;
    if (partial) {
      std::fill(rest, rest + rows * kPadded, T(0));
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(from + i * columns, live * kBlock, rest + i * kPadded);
        if (sweep.previous)
          std::copy_n(sweep.previous + i * columns / 2, live * kBlock / 2,
                      rest_before + i * kPadded / 2);
      }
      if (sweep.previous) sweep.previous = rest_before;
    }
    quantize_lanes<V, recipe, rule>(partial ? rest : from, rows, partial ? kPadded : columns, all,
                                    sweep, apart, live, partial ? rest_codes : to,
                                    partial ? rest_scales : to_scales);
    for (int64_t i = 0; partial && i < rows; ++i) {
      std::copy_n(rest_codes + i * kPadded / 2, live * kBlock / 2, to + i * columns / 2);
      std::copy_n(rest_scales + i * kLanes, live, to_scales + i * apart);
    }
  }
}

// How to quantise: recipe and rule of the schema.
struct How {
  int64_t recipe, rule;
};

template <class V, class T>
RLK_HD void strip_by(How how, const T* w, int64_t rows, int64_t columns, int64_t count,
                     const Tensorwide& all, const Sweep& sweep, uint8_t* codes, uint8_t* scales) {
#define RLK_CASE(kRecipe, kRule)                  \
  if (how.recipe == kRecipe && how.rule == kRule) \
    return quantize_strip<V, kRecipe, kRule>(w, rows, columns, count, all, sweep, codes, scales);
  RLK_CASE(kTe, kNone)
  RLK_CASE(kTe, kSquares)
  RLK_CASE(kTe, kMagnitudes)
  RLK_CASE(kVllm, kNone)
  RLK_CASE(kCompressedTensors, kNone)
  RLK_CASE(kTorchao, kNone)
  RLK_CASE(kModelopt, kNone)
  RLK_CASE(kFouroversix, kNone)
  RLK_CASE(kFouroversix, kSquares)
  RLK_CASE(kFouroversix, kMagnitudes)
#undef RLK_CASE
}

#define RLK_INSTANTIATE(T)                                                                      \
  RLK_LANES_16 void strip_16(How how, const T* w, int64_t rows, int64_t columns, int64_t count, \
                             const Tensorwide& all, const Sweep& sweep, uint8_t* codes,         \
                             uint8_t* scales) {                                                 \
    strip_by<f32x16>(how, w, rows, columns, count, all, sweep, codes, scales);                  \
  }                                                                                             \
  RLK_LANES_8 void strip_8(How how, const T* w, int64_t rows, int64_t columns, int64_t count,   \
                           const Tensorwide& all, const Sweep& sweep, uint8_t* codes,           \
                           uint8_t* scales) {                                                   \
    strip_by<f32x8>(how, w, rows, columns, count, all, sweep, codes, scales);                   \
  }                                                                                             \
  void strip_4(How how, const T* w, int64_t rows, int64_t columns, int64_t count,               \
               const Tensorwide& all, const Sweep& sweep, uint8_t* codes, uint8_t* scales) {    \
    strip_by<f32x4>(how, w, rows, columns, count, all, sweep, codes, scales);                   \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor w, std::optional<Tensor> amax,
                                                   std::optional<Tensor> previous, int64_t recipe,
                                                   bool square, int64_t rule, bool stochastic,
                                                   int64_t seed, bool statistics) {
  RLK_CHECK_CPU(w);
  RLK_CHECK_DIM(w, 2);
  RLK_CHECK_CONTIGUOUS(w);
  const int64_t rows = w.size(0), columns = w.size(1), count = rows * columns;
  STD_TORCH_CHECK(columns % kBlock == 0, "w must have a multiple of 16 columns, got ", columns);
  STD_TORCH_CHECK(recipe >= kTe && recipe <= kFouroversix, "recipe must be in [0, 5], got ",
                  recipe);
  STD_TORCH_CHECK(rule >= kNone && rule <= kMagnitudes, "rule must be in [0, 2], got ", rule);
  STD_TORCH_CHECK(rule == kNone || ((recipe == kTe || recipe == kFouroversix) && !square),
                  "rule needs recipe 0 or 5 and 1x16 blocks");
  if (amax.has_value()) {
    RLK_CHECK_DTYPE(*amax, Float);
    STD_TORCH_CHECK(amax->numel() == 1, "amax must be one number");
  }
  STD_TORCH_CHECK(!stochastic || rule == kNone, "four over six rounds to nearest");
  if (previous.has_value()) {
    RLK_CHECK_DTYPE(*previous, Byte);
    RLK_CHECK_CONTIGUOUS(*previous);
    STD_TORCH_CHECK(previous->numel() == count / 2, "previous must have a byte for two of w");
  }
  const uint8_t* before = previous.has_value() ? previous->const_data_ptr<uint8_t>() : nullptr;
  // blocks of a piece of work, or rows of one
  const int64_t unit = square ? kBlock : kQuantizeGrain / kBlock;
  const int64_t units = square ? rows : count / kBlock;
  const int64_t pieces = (units + unit - 1) / unit;
  PiecewiseCounts counts(statistics, pieces);
  using torch::headeronly::ScalarType;
  Tensor codes = torch::stable::new_empty(w, {rows, columns / 2}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(w, {rows, columns / kBlock}, ScalarType::Byte);
  Tensor decode = torch::stable::new_empty(w, {}, ScalarType::Float);
  uint8_t* codes_out = codes.mutable_data_ptr<uint8_t>();
  uint8_t* scales_out = scales.mutable_data_ptr<uint8_t>();
  RLK_DISPATCH_FLOAT(w, T, {
    const T* data = w.const_data_ptr<T>();
    const float a =
        amax.has_value() ? *amax->const_data_ptr<float>() : tensor_amax(data, count, recipe == kTe);
    const Tensorwide all{Nvfp4Global::of(recipe, a, rule ? 1536.0f : 2688.0f), a, stochastic,
                         static_cast<uint64_t>(seed)};
    *decode.mutable_data_ptr<float>() = all.global.decode;
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      // backwards: what the search for the largest magnitude has read last is in the cache
      for (int64_t i = end - 1; i >= begin; --i) {
        // rows follow each other without a gap: 1x16 blocks are one long row of them
        const int64_t size = std::min(unit, units - i * unit);
        const int64_t high = square ? size : 1, wide = square ? columns / kBlock : size;
        const int64_t block = square ? i * unit * wide : i * unit, at = block * kBlock;
        const Sweep sweep{block, before ? before + at / 2 : nullptr, counts.of(i)};
        RLK_CALL_BY_LANES(strip, How{recipe, rule}, data + at, high, columns, wide, all, sweep,
                          codes_out + at / 2, scales_out + block);
      }
    });
  });
  return {codes, scales, decode, counts.sums(w)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("quantize_nvfp4", TORCH_BOX(&forward)); }

}  // namespace rlkern
