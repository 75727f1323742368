// x W^T for weights of 8 and 4 bits, on CPUs with AVX-512 BF16 and VBMI: a byte permutation decodes
// 64 codes at once, exactly, into bfloat16.
//
// The sixteen lanes of an accumulator lie along k, and what a token's row gives does not depend on
// the other rows: every number of tokens runs the same sequence of operations for each of its
// results, whether the weights are decoded in registers or into a buffer beforehand.
#pragma once

#if defined(__x86_64__)
// GCC 12's intrinsics leave registers uninitialised on purpose, and it warns of that.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "rlkern/math/quant.h"
#include "vec.h"

#define RLK_VBMI                                                                  \
  __attribute__((                                                                 \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma," \
             "bmi2")))
#define RLK_VBMI_INLINE RLK_VBMI static inline __attribute__((always_inline))

namespace rlkern::vbmi {

inline bool supported() {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

// Elements that one step decodes, and the k of a scale's block.
constexpr int64_t kStep = 64, kBlock = 128;
constexpr int kRows = 4;

inline uint16_t bf16_of(float x) { return static_cast<uint16_t>(Bits<float>::of(x) >> 16); }

// The bytes of the bfloat16 of each E4M3 code without its sign.
struct Fp8Table {
  alignas(64) std::array<uint8_t, 128> high, low;
  Fp8Table() {
    for (int32_t code = 0; code < 128; ++code) {
      const uint16_t word = bf16_of(from_e4m3<float>(code));
      high[code] = word >> 8;
      low[code] = word & 0xFF;
    }
  }
};
inline const Fp8Table kFp8Table;

inline __mmask64 first(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Two vectors of 32 bfloat16. What stands where: order() below.
struct Pairs {
  __m512i v[2];
};

struct Fp8Decoder {
  static constexpr int64_t kCodesPerByte = 1;
  __m512i high0, high1, low0, low1, sign;

  RLK_VBMI_INLINE Fp8Decoder make() {
    const auto* h = kFp8Table.high.data();
    const auto* l = kFp8Table.low.data();
    return {_mm512_load_si512(h), _mm512_load_si512(h + 64), _mm512_load_si512(l),
            _mm512_load_si512(l + 64), _mm512_set1_epi8(static_cast<char>(0x80))};
  }
  static int64_t order(int64_t vector, int64_t word) {
    return word / 8 * 16 + vector * 8 + word % 8;
  }
  // The permutation looks at seven bits of an index: the sign is not in its way.
  // left: elements of the row from here on, kStep if kWhole
  template <bool kWhole>
  __attribute__((always_inline)) RLK_VBMI Pairs decode(const uint8_t* codes, int64_t left,
                                                       const void*, int) const {
    const __m512i c =
        kWhole ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(first(left), codes);
    const __m512i low = _mm512_permutex2var_epi8(low0, c, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, c, high1);
    // high | (c & sign)
    high = _mm512_ternarylogic_epi32(high, c, sign, 0xF8);
    return {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
  }
};

// The scales of eight blocks, 128 elements: s / 2 of each, 3 s / 4 of each, then 0 or NaN of each.
struct ScaleWords {
  alignas(64) uint16_t words[32];
};
// What scale_words fills, and some more, so that it can write 64 at a time.
constexpr int64_t scale_words_of(int64_t depth) { return (depth / 16 + 63) / 64 * 8; }

// Of each E4M3 code s without its sign: the bytes of s / 2 and of 3 s / 4 as bfloat16.
struct ScaleTable {
  alignas(64) std::array<uint8_t, 128> high[2], low[2];
  ScaleTable() {
    for (int32_t code = 0; code < 128; ++code) {
      const float s = from_e4m3<float>(code);
      for (int kind = 0; kind < 2; ++kind) {
        // of NaN the largest integer: the saturating additions below keep it
        const uint16_t word = code == 127 ? 0x7FFF : bf16_of(s * (kind ? 0.75f : 0.5f));
        high[kind][code] = word >> 8;
        low[kind][code] = word & 0xFF;
      }
    }
  }
};
inline const ScaleTable kScaleTable;

RLK_VBMI static inline void scale_words(const uint8_t* scales, int64_t count, ScaleWords* out) {
  const __m512i nan = _mm512_set1_epi8(127);
  const auto looked_up = [&](const std::array<uint8_t, 128>& table, __m512i index) RLK_VBMI {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table.data()), index,
                                    _mm512_load_si512(table.data() + 64));
  };
  // lane i of the lower half of the bytes: words 16 i .. 16 i + 7, of the upper half the next 8
  const auto put = [&](__m512i high, __m512i low, int kind) RLK_VBMI {
    const __m512i even = _mm512_unpacklo_epi8(low, high), odd = _mm512_unpackhi_epi8(low, high);
    const auto store = [&](int block, __m128i words) RLK_VBMI {
      _mm_store_si128(reinterpret_cast<__m128i*>(out[block].words + kind * 8), words);
    };
    store(0, _mm512_extracti32x4_epi32(even, 0));
    store(1, _mm512_extracti32x4_epi32(odd, 0));
    store(2, _mm512_extracti32x4_epi32(even, 1));
    store(3, _mm512_extracti32x4_epi32(odd, 1));
    store(4, _mm512_extracti32x4_epi32(even, 2));
    store(5, _mm512_extracti32x4_epi32(odd, 2));
    store(6, _mm512_extracti32x4_epi32(even, 3));
    store(7, _mm512_extracti32x4_epi32(odd, 3));
  };
  for (int64_t i = 0; i < count; i += 64, out += 8) {
    const __m512i codes = _mm512_maskz_loadu_epi8(first(count - i), scales + i);
    for (int kind = 0; kind < 2; ++kind)
      put(looked_up(kScaleTable.high[kind], codes), looked_up(kScaleTable.low[kind], codes), kind);
    const __m512i magnitude = _mm512_and_si512(codes, nan);
    const __m512i all = _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(magnitude, nan));
    put(_mm512_and_si512(all, nan), all, 2);
  }
}

// A block's eight magnitudes times its scale are one 128-bit lane of eight bfloat16, exact, since
// code * scale has at most six significant bits. A byte shuffle then looks the codes up in them.
struct Nvfp4Decoder {
  static constexpr int64_t kCodesPerByte = 2;
  __m512i pick[2], exponents, index, nibble, sign;

  RLK_VBMI_INLINE Nvfp4Decoder make() {
    // magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6: from s / 2 or 3 s / 4, times a power of two
    constexpr int kKind[8] = {2, 0, 0, 1, 0, 1, 0, 1}, kPower[8] = {0, 0, 1, 1, 2, 2, 3, 3};
    alignas(64) uint16_t pick[2][32], exponents[32], index[32];
    for (int word = 0; word < 32; ++word) {
      for (int half = 0; half < 2; ++half)
        pick[half][word] = static_cast<uint16_t>(kKind[word % 8] * 8 + half * 4 + word / 8);
      exponents[word] = static_cast<uint16_t>(kPower[word % 8] << 7);
      // bytes 2 code and 2 code + 1
      index[word] = static_cast<uint16_t>((word % 8) * 0x0202 + 0x0100);
    }
    return {{_mm512_load_si512(pick[0]), _mm512_load_si512(pick[1])},
            _mm512_load_si512(exponents),
            _mm512_load_si512(index),
            _mm512_set1_epi16(15),
            _mm512_set1_epi16(static_cast<int16_t>(0x8000))};
  }
  static int64_t order(int64_t vector, int64_t word) { return 2 * word + vector; }
  template <bool kWhole>
  __attribute__((always_inline)) RLK_VBMI Pairs decode(const uint8_t* codes, int64_t left,
                                                       const void* scales, int half) const {
    const __m512i base = _mm512_permutexvar_epi16(pick[half], _mm512_load_si512(scales));
    // not where the scale is 0
    const __mmask32 scaled = _mm512_test_epi16_mask(base, base);
    const __m512i values = _mm512_maskz_adds_epi16(scaled, base, exponents);
    const __m512i bytes = _mm512_cvtepu8_epi16(
        kWhole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))
               : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first(left / 2)), codes));
    const __m512i upper = _mm512_srli_epi16(bytes, 4);
    const __m512i lower = _mm512_and_si512(bytes, nibble);
    __m512i even = _mm512_shuffle_epi8(values, _mm512_permutexvar_epi16(lower, index));
    __m512i odd = _mm512_shuffle_epi8(values, _mm512_permutexvar_epi16(upper, index));
    even = _mm512_ternarylogic_epi32(even, _mm512_slli_epi16(bytes, 12), sign, 0xF8);
    odd = _mm512_ternarylogic_epi32(odd, _mm512_slli_epi16(bytes, 8), sign, 0xF8);
    return {{even, odd}};
  }
};

// Tokens as bfloat16: two products a lane and instruction.
struct Bf16Math {
  static constexpr int64_t kTokenBytes = 2;  // of an element
  using Token = __m512i;
  RLK_VBMI_INLINE Token load(const char* x, int v) { return _mm512_load_si512(x + v * 64); }
  RLK_VBMI_INLINE __m512 add(__m512 sum, __m512i w, Token x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
};
// Tokens as float, those of the even words of a vector before those of the odd ones.
struct FloatMath {
  static constexpr int64_t kTokenBytes = 4;
  struct Token {
    __m512 even, odd;
  };
  RLK_VBMI_INLINE Token load(const char* x, int v) {
    return {_mm512_load_ps(x + v * 128), _mm512_load_ps(x + v * 128 + 64)};
  }
  RLK_VBMI_INLINE __m512 add(__m512 sum, __m512i w, Token x) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    sum = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(w, 16), x.even, sum);
    return _mm512_fmadd_ps((__m512)_mm512_and_si512(w, upper), x.odd, sum);
  }
};

// A token in the order in which the decoder gives the weights; 0 from `depth` on.
template <class Decoder, class T>
void pack_token(const T* x, int64_t depth, char* out) {
  float* to = reinterpret_cast<float*>(out);
  for (int64_t k = 0; k < depth; k += kStep, to += kStep)
    for (int64_t i = 0; i < kStep; ++i) {
      // the even words of a vector, then the odd ones
      const int64_t from = k + Decoder::order(i / 32, i % 16 * 2 + i % 32 / 16);
      to[i] = from < depth ? static_cast<float>(x[from]) : 0.0f;
    }
}
template <class Decoder>
RLK_VBMI void pack_token(const bf16* x, int64_t depth, char* out) {
  alignas(64) uint16_t order[2][32];
  for (int v = 0; v < 2; ++v)
    for (int word = 0; word < 32; ++word)
      order[v][word] = static_cast<uint16_t>(Decoder::order(v, word));
  for (int64_t k = 0; k < depth; k += kStep, out += 128) {
    const __mmask64 live = first(depth - k);
    const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(live), x + k);
    const __m512i high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(live >> 32), x + k + 32);
    for (int v = 0; v < 2; ++v)
      _mm512_store_si512(out + v * 64,
                         _mm512_permutex2var_epi16(low, _mm512_load_si512(order[v]), high));
  }
}
// Codes, which bfloat16 holds exactly.
template <class Decoder>
RLK_VBMI void pack_token(const uint8_t* x, int64_t depth, char* out) {
  const Decoder decoder = Decoder::make();
  for (int64_t k = 0; k < depth; k += kStep, out += 128) {
    const Pairs pairs = decoder.template decode<false>(x + k, depth - k, nullptr, 0);
    _mm512_store_si512(out, pairs.v[0]);
    _mm512_store_si512(out + 64, pairs.v[1]);
  }
}

// Steps `begin` to `end` of kRows rows of the weight.
struct Weights {
  const uint8_t* codes[kRows];
  const ScaleWords* scales[kRows];  // of NVFP4, one per kBlock
  int64_t depth, begin, end;
  const __m512i* decoded;  // these steps, kRows pairs each; null: they are decoded as they come
  const uint8_t* next[2];  // where decoded: codes of two rows that are decoded later, or null
};
// Rows of packed tokens; and what the sums over each kBlock are multiplied by.
struct Tokens {
  const char* data;
  int64_t stride;  // bytes
  const float* factors;
  int64_t factor_stride;
};

RLK_VBMI_INLINE void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// kAhead: the same step of the rows that come next: the processor does not foresee so many short
// streams.
template <bool kWhole, bool kAhead, class Decoder>
RLK_VBMI_INLINE Pairs decode_step(const Decoder& decoder, const Weights& w, int r, int64_t step) {
  const uint8_t* const now = w.codes[r] + step * (kStep / Decoder::kCodesPerByte);
  if constexpr (kAhead) prefetch(now + kRows * w.depth / Decoder::kCodesPerByte);
  return decoder.template decode<kWhole>(now, w.depth - step * kStep, w.scales[r] + step / 2,
                                         step % 2);
}

// Sums over two lanes each: of two rows, and of two such pairs, whose four rows then are the four
// numbers of every 128 bits.
RLK_VBMI_INLINE __m512 pair_sums(__m512 x0, __m512 x1) {
  return _mm512_add_ps(_mm512_unpacklo_ps(x0, x1), _mm512_unpackhi_ps(x0, x1));
}
RLK_VBMI_INLINE __m512 four_sums(__m512 low, __m512 high) {
  return _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
}
RLK_VBMI_INLINE __m128 lane_sums(__m512 fours) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Adds to sums[token][row], of R rows from `first` and M tokens. kPromote: the sum over each block
// of k is multiplied by the block's factor before it is added, two rows at once, to
// sums[token][row / 2]: a multiplication takes the place of a product in the pipeline, an addition
// of lanes does not.
template <class Decoder, class Math, bool kPromote, bool kDecoded, int R, int M>
RLK_VBMI static __attribute__((noinline)) void add_dots(const Weights& w, int first,
                                                        const Tokens& t, __m512* sums) {
  const Decoder decoder = Decoder::make();
  constexpr int64_t kStepBytes = kStep * Math::kTokenBytes;
  constexpr int kHeld = kPromote ? R / 2 : R;
  __m512* const held = sums + (kPromote ? first / 2 : first);
  __m512 sum[R][M], total[kHeld][M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < kHeld; ++r)
      total[r][m] = w.begin == 0 ? _mm512_setzero_ps() : held[m * kRows + r];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][m] = kPromote ? _mm512_setzero_ps() : total[r % kHeld][m];
  }
  const auto take = [&](int64_t step, auto whole) RLK_VBMI __attribute__((always_inline)) {
    const char* const x = t.data + step * kStepBytes;
    if constexpr (kDecoded) {
      // a little at a time: together they would wait for each other
      const int64_t line = (step - w.begin) * (kStep / Decoder::kCodesPerByte);
      if (w.next[0]) {
        prefetch(w.next[0] + line);
        prefetch(w.next[1] + line);
      }
      const __m512i* const from = w.decoded + (step - w.begin) * kRows * 2;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        typename Math::Token token[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) token[m] = Math::load(x + m * t.stride, v);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i weight = _mm512_load_si512(from + (first + r) * 2 + v);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) sum[r][m] = Math::add(sum[r][m], weight, token[m]);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Pairs pairs = decode_step<decltype(whole)::value, true>(decoder, w, first + r, step);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m)
            sum[r][m] = Math::add(sum[r][m], pairs.v[v], Math::load(x + m * t.stride, v));
      }
    }
    if constexpr (kPromote) {
      if (step % 2 == 0 && step + 1 < w.end) return;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m512 factor = _mm512_set1_ps(t.factors[m * t.factor_stride + step / 2]);
#pragma GCC unroll 4
        for (int r = 0; r < kHeld; ++r) {
          const __m512 pair = pair_sums(sum[2 * r][m], sum[2 * r + 1][m]);
          total[r][m] = _mm512_fmadd_ps(pair, factor, total[r][m]);
          sum[2 * r][m] = sum[2 * r + 1][m] = _mm512_setzero_ps();
        }
      }
    }
  };
  const int64_t whole = std::min(w.end, w.depth / kStep);
  int64_t step = w.begin;
  for (; step + 1 < whole; step += 2) {
    take(step, std::true_type());
    take(step + 1, std::true_type());
  }
  for (; step < w.end; ++step) take(step, std::false_type());
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < kHeld; ++r) held[m * kRows + r] = kPromote ? total[r][m] : sum[r][m];
}

template <class Decoder>
RLK_VBMI static void decode_rows(const Weights& w, __m512i* out) {
  const Decoder decoder = Decoder::make();
  const auto put = [&](int64_t step, auto whole) RLK_VBMI __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, out += 2) {
      const Pairs pairs = decode_step<decltype(whole)::value, false>(decoder, w, r, step);
      _mm512_store_si512(out, pairs.v[0]);
      _mm512_store_si512(out + 1, pairs.v[1]);
    }
  };
  const int64_t whole = std::min(w.end, w.depth / kStep);
  int64_t step = w.begin;
  for (; step < whole; ++step) put(step, std::true_type());
  for (; step < w.end; ++step) put(step, std::false_type());
}

// The four rows for one to four tokens, from a buffer or straight from the codes.
template <class Decoder, class Math, bool kPromote>
RLK_VBMI static void add_four_rows(const Weights& w, const Tokens& t, int tokens, __m512* sums) {
  if (w.decoded) {
    if (tokens == 1) return add_dots<Decoder, Math, kPromote, true, 4, 1>(w, 0, t, sums);
    if (tokens == 2) return add_dots<Decoder, Math, kPromote, true, 4, 2>(w, 0, t, sums);
    if (tokens == 3) return add_dots<Decoder, Math, kPromote, true, 4, 3>(w, 0, t, sums);
    return add_dots<Decoder, Math, kPromote, true, 4, 4>(w, 0, t, sums);
  }
  if (tokens == 1) return add_dots<Decoder, Math, kPromote, false, 4, 1>(w, 0, t, sums);
  if (tokens == 2) return add_dots<Decoder, Math, kPromote, false, 4, 2>(w, 0, t, sums);
  for (int first = 0; first < kRows; first += 2)
    if (tokens == 3)
      add_dots<Decoder, Math, kPromote, false, 2, 3>(w, first, t, sums);
    else
      add_dots<Decoder, Math, kPromote, false, 2, 4>(w, first, t, sums);
}

// Of four rows and some tokens, the results: sums times the rows' factors, and their bias or null.
template <bool kPromote, class T>
RLK_VBMI static void put_rows(const __m512* sums, int64_t tokens, const float* factor,
                              const float* bias, int rows, T* out, int64_t columns) {
  const __m128 factors = _mm_loadu_ps(factor), added = bias ? _mm_loadu_ps(bias) : _mm_setzero_ps();
  for (int64_t m = 0; m < tokens; ++m, sums += kRows, out += columns) {
    const __m512 low = kPromote ? sums[0] : pair_sums(sums[0], sums[1]);
    const __m512 high = kPromote ? sums[1] : pair_sums(sums[2], sums[3]);
    __m128 y = _mm_mul_ps(lane_sums(four_sums(low, high)), factors);
    if (bias) y = _mm_add_ps(y, added);
    if (rows == kRows)
      store(out, (f32x4)y);
    else
      store_partial(out, (f32x4)y, rows);
  }
}

}  // namespace rlkern::vbmi
#endif
