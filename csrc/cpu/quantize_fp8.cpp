// FP8 E4M3 by blocks: each block is read for its largest magnitude, and again from cache for its
// codes. A whole tensor is read twice.
// Products and sums are rounded one by one, as in the reference: none may become an fma.
#pragma GCC optimize("fp-contract=off")

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "quantize.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// Columns of a block of FP8, unless it is a whole row.
constexpr int64_t kScaleBlock = 128;

// Where the scales of a row of blocks go.
struct Scales {
  float* floats;
  uint8_t* bytes;
  void put(int64_t block, const Fp8Scale& s) const {
    if (bytes)
      bytes[block] = static_cast<uint8_t>(s.scale);
    else
      floats[block] = s.scale;
  }
};

// What has its last place where E4M3 has it from 2^power on, and there the codes that are below.
constexpr float adder(int power) {
  const double place = power < 3 ? 1.0 / (1 << (3 - power)) : 1 << (power - 3);
  return static_cast<float>(place * ((1 << 23) + 8 * (power + 6)));
}

// e4m3 of what is not NaN.
template <class V>
RLK_HD auto e4m3_of_numbers(V x) {
  if constexpr (kWidth<V> == 16) {
    // by the low bits of the exponent, from 2^-7 on
    const V adders{adder(1),  adder(2),  adder(3),  adder(4),  adder(5),  adder(6),
                   adder(7),  adder(8),  adder(-6), adder(-6), adder(-5), adder(-4),
                   adder(-3), adder(-2), adder(-1), adder(0)};
    const auto bits = Bits<V>::of(x);
    const auto a = at_most(bits & kMagnitude, kLargestE4m3Bits);
    const V sum = Bits<V>::from(a) + __builtin_shuffle(adders, not_below(a, 0x3C000000) >> 23);
    return (Bits<V>::of(sum) & 0x7F) | ((bits >> 24) & 0x80);
  } else {
    return e4m3<V>(x);
  }
}

// kDivides, kAddsZero: of the order. kNumbers: what is rounded is never NaN.
template <class V, bool kDivides, bool kAddsZero, bool kNumbers>
RLK_HD auto codes_of(V x, float factor) {
  V v = kDivides ? x / factor : x * factor;
  if constexpr (kAddsZero) v += 0.0f;
  if constexpr (kNumbers)
    return e4m3_of_numbers<V>(v);
  else
    return e4m3<V>(v);
}

template <class V, bool kDivides, bool kAddsZero, bool kNumbers, class T>
RLK_HD void encode(const T* p, int64_t count, float factor, uint8_t* out) {
  int64_t j = 0;
  for (; j + kWidth<V> <= count; j += kWidth<V>) {
    const auto codes = codes_of<V, kDivides, kAddsZero, kNumbers>(as_floats<V>(p + j), factor);
    store_as(out + j, __builtin_convertvector(codes, typename Narrow<V>::Bytes));
  }
  if (j == count) return;
  const auto codes =
      codes_of<V, kDivides, kAddsZero, false>(load_up_to<V>(p + j, count - j), factor);
  for (int64_t i = 0; j + i < count; ++i) out[j + i] = static_cast<uint8_t>(codes[i]);
}

template <class V, bool kNumbers, class T>
RLK_HD void encode_by(int64_t order, const T* p, int64_t count, float factor, uint8_t* out) {
  if (divides(order) && adds_zero(order))
    encode<V, true, true, kNumbers>(p, count, factor, out);
  else if (divides(order))
    encode<V, true, false, kNumbers>(p, count, factor, out);
  else if (adds_zero(order))
    encode<V, false, true, kNumbers>(p, count, factor, out);
  else
    encode<V, false, false, kNumbers>(p, count, factor, out);
}
// most: the largest magnitude of all, NaN where it is not known.
template <class V, class T>
RLK_HD void encode_by(int64_t order, const T* p, int64_t count, float factor, float most,
                      uint8_t* out) {
  // finite by finite, but 0 / 0
  if (most <= kMostFloat && factor > 0.0f && factor <= kMostFloat)
    encode_by<V, true>(order, p, count, factor, out);
  else
    encode_by<V, false>(order, p, count, factor, out);
}

// Adds what there is to say of codes that have just been written, from cache: of whole registers to
// `found`, which the caller adds to `counts` once in a while.
template <class V, class T>
RLK_HD void count(const T* p, int64_t n, const Fp8Scale& s, int64_t order, const uint8_t* codes,
                  const uint8_t* previous, Counts::Lanewise<V>& found, Counts& counts) {
  const float scale = s.value(order);
  if (previous) counts.changed += num_different(codes, previous, n);
  const auto add = [&](Counts::Lanewise<V>& to, V x, const uint8_t* ours)
                       __attribute__((always_inline)) {
                         const V w = Bits<V>::from(magnitudes(x));
                         const V scaled = divides(order) ? x / s.factor : x * s.factor;
                         const V code = from_e4m3<V>(as_ints<V>(ours) & 0x7F);
                         to.add(w, scaled, kLargestE4m3, code, code * scale);
                       };
  int64_t j = 0;
  for (; j + kWidth<V> <= n; j += kWidth<V>) add(found, as_floats<V>(p + j), codes + j);
  if (j == n) return;
  Counts::Lanewise<V> last;
  uint8_t rest[kWidth<V>] = {};
  std::copy_n(codes + j, n - j, rest);
  add(last, load_up_to<V>(p + j, n - j), rest);
  counts.add(last, n - j);
}

// Rows of `columns` elements each, cut into blocks `wide` columns across and all rows high.
struct Strip {
  int64_t rows, columns, wide;
};

// The codes before, or null; where to count, or null.
struct Sweep {
  const uint8_t* previous;
  Counts* counts;
  Sweep at(int64_t offset) const { return {previous ? previous + offset : nullptr, counts}; }
};

template <class V, class T>
RLK_HD void encode_and_count(int64_t order, const T* p, int64_t n, const Fp8Scale& s, float most,
                             uint8_t* out, const Sweep& sweep, Counts::Lanewise<V>& found) {
  encode_by<V>(order, p, n, s.factor, most, out);
  if (sweep.counts) count<V>(p, n, s, order, out, sweep.previous, found, *sweep.counts);
}
template <class V, class T>
RLK_HD void encode_and_count(int64_t order, const T* p, int64_t n, const Fp8Scale& s, float most,
                             uint8_t* out, const Sweep& sweep) {
  Counts::Lanewise<V> found;
  encode_and_count<V>(order, p, n, s, most, out, sweep, found);
  if (sweep.counts) sweep.counts->add(found, kWidth<V>);
}

// Rows of one are taken some blocks at a time, so that none waits for the scale of the one before.
// kWide: of each block, or 0.
template <class V, int64_t kWide, class T>
RLK_HD void quantize_blocks(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out,
                            const Scales& scales, const Sweep& sweep) {
  // so many elements are few enough for sums in float32
  constexpr int64_t kFew = 1 << 14;
  constexpr int64_t kMany = 16;
  using M = Magnitudes<V, T>;
  const int64_t columns = strip.columns, wide = kWide ? kWide : strip.wide;
  const int64_t together = strip.rows == 1 && wide <= kScaleBlock ? kMany : 1;
  Counts::Lanewise<V> found;
  int64_t num_found = 0;
  float most[kMany];
  Fp8Scale s[kMany];
  for (int64_t j = 0; j < columns; j += together * wide) {
    const int64_t blocks = std::min(together, (columns - j + wide - 1) / wide);
    const auto across = [&](int64_t b) __attribute__((always_inline)) {
      return kWide ? kWide : std::min(wide, columns - j - b * wide);
    };
    for (int64_t b = 0; b < blocks; ++b) {
      typename M::Vector all{};
      for (int64_t i = 0; i < strip.rows; ++i)
        all = M::template over<false>(w + i * columns + j + b * wide, across(b), all);
      most[b] = Bits<float>::from(M::reduce(all));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      s[b] = fp8_scale(most[b], rule);
      scales.put(j / wide + b, s[b]);
    }
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < strip.rows; ++i) {
        const int64_t at = i * columns + j + b * wide;
        encode_and_count<V>(rule.order, w + at, across(b), s[b], most[b], out + at, sweep.at(at),
                            found);
      }
    num_found += strip.rows * std::min(together * wide, columns - j);
    if (!sweep.counts || (num_found < kFew && j + together * wide < columns)) continue;
    sweep.counts->add(found, kWidth<V>);
    found = {};
    num_found = 0;
  }
}

template <class V, class T>
RLK_HD void quantize_strip(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out,
                           const Scales& scales, const Sweep& sweep) {
  if (strip.wide == 32 && strip.columns % 32 == 0)
    quantize_blocks<V, 32>(w, strip, rule, out, scales, sweep);
  else
    quantize_blocks<V, 0>(w, strip, rule, out, scales, sweep);
}

#define RLK_INSTANTIATE(T)                                                                      \
  RLK_LANES_16 void strip_16(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out, \
                             const Scales& scales, const Sweep& sweep) {                        \
    quantize_strip<f32x16>(w, strip, rule, out, scales, sweep);                                 \
  }                                                                                             \
  RLK_LANES_16 void encode_16(int64_t order, const T* w, int64_t count, const Fp8Scale& s,      \
                              float most, uint8_t* out, const Sweep& sweep) {                   \
    encode_and_count<f32x16>(order, w, count, s, most, out, sweep);                             \
  }                                                                                             \
  RLK_LANES_8 void strip_8(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out,   \
                           const Scales& scales, const Sweep& sweep) {                          \
    quantize_strip<f32x8>(w, strip, rule, out, scales, sweep);                                  \
  }                                                                                             \
  RLK_LANES_8 void encode_8(int64_t order, const T* w, int64_t count, const Fp8Scale& s,        \
                            float most, uint8_t* out, const Sweep& sweep) {                     \
    encode_and_count<f32x8>(order, w, count, s, most, out, sweep);                              \
  }                                                                                             \
  void strip_4(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out,               \
               const Scales& scales, const Sweep& sweep) {                                      \
    quantize_strip<f32x4>(w, strip, rule, out, scales, sweep);                                  \
  }                                                                                             \
  void encode_4(int64_t order, const T* w, int64_t count, const Fp8Scale& s, float most,        \
                uint8_t* out, const Sweep& sweep) {                                             \
    encode_and_count<f32x4>(order, w, count, s, most, out, sweep);                              \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE

std::tuple<Tensor, Tensor, Tensor> forward(Tensor w, std::optional<Tensor> amax,
                                           std::optional<Tensor> previous, int64_t high,
                                           int64_t wide, int64_t order, double amax_floor,
                                           double scale_floor, double zero_scale, bool power_of_two,
                                           bool statistics) {
  RLK_CHECK_CPU(w);
  RLK_CHECK_DIM(w, 2);
  RLK_CHECK_CONTIGUOUS(w);
  STD_TORCH_CHECK(high >= 0 && wide >= 0, "high and wide must be at least 0");
  STD_TORCH_CHECK(order >= kDivide && order <= kEven, "order must be in [0, 7], got ", order);
  const int64_t rows = w.size(0), columns = w.size(1), count = rows * columns;
  const Fp8Rule rule{order, static_cast<float>(amax_floor), static_cast<float>(scale_floor),
                     static_cast<float>(zero_scale), power_of_two};
  high = high ? high : std::max<int64_t>(1, rows);
  wide = wide ? wide : std::max<int64_t>(1, columns);
  const int64_t down = (rows + high - 1) / high, across = (columns + wide - 1) / wide;
  if (amax.has_value()) {
    RLK_CHECK_DTYPE(*amax, Float);
    STD_TORCH_CHECK(amax->numel() == 1 && down * across <= 1,
                    "amax must be one number, of one block");
  }
  if (previous.has_value()) {
    RLK_CHECK_DTYPE(*previous, Byte);
    RLK_CHECK_CONTIGUOUS(*previous);
    STD_TORCH_CHECK(previous->numel() == count, "previous must have an element for each of w");
  }
  const uint8_t* before = previous.has_value() ? previous->const_data_ptr<uint8_t>() : nullptr;
  const bool whole = down * across == 1;
  const int64_t pieces = whole ? (count + kQuantizeGrain - 1) / kQuantizeGrain : down;
  PiecewiseCounts counts(statistics, pieces);
  using torch::headeronly::ScalarType;
  Tensor codes = torch::stable::new_empty(w, {rows, columns}, ScalarType::Byte);
  const bool bytes = has_byte_scales(order);
  Tensor scale =
      torch::stable::new_empty(w, {down, across}, bytes ? ScalarType::Byte : ScalarType::Float);
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
  const Scales scales{bytes ? nullptr : scale.mutable_data_ptr<float>(),
                      bytes ? scale.mutable_data_ptr<uint8_t>() : nullptr};
  if (count == 0) {
    // rows without columns have no blocks
    return {codes, scale, counts.sums(w)};
  }
  RLK_DISPATCH_FLOAT(w, T, {
    const T* data = w.const_data_ptr<T>();
    if (whole) {
      const float a =
          amax.has_value() ? *amax->const_data_ptr<float>() : tensor_amax(data, count, false);
      const Fp8Scale s = fp8_scale(a, rule);
      scales.put(0, s);
      // the largest magnitude of all shards may be told wrong, or pass over NaN
      const float most = amax.has_value() ? std::numeric_limits<float>::quiet_NaN() : a;
      torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
        // backwards: what the search for the largest magnitude has read last is in the cache
        for (int64_t i = end - 1; i >= begin; --i) {
          const int64_t at = i * kQuantizeGrain, n = std::min(kQuantizeGrain, count - at);
          const Sweep sweep = Sweep{before, counts.of(i)}.at(at);
          RLK_CALL_BY_LANES(encode, order, data + at, n, s, most, out + at, sweep);
        }
      });
    } else {
      const int64_t grain = std::max<int64_t>(1, kQuantizeGrain / (high * columns));
      torch::stable::parallel_for(0, down, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Strip shape{std::min(high, rows - i * high), columns, wide};
          const Scales mine{bytes ? nullptr : scales.floats + i * across,
                            bytes ? scales.bytes + i * across : nullptr};
          const int64_t at = i * high * columns;
          const Sweep sweep = Sweep{before, counts.of(i)}.at(at);
          RLK_CALL_BY_LANES(strip, data + at, shape, rule, out + at, mine, sweep);
        }
      });
    }
  });
  return {codes, scale, counts.sums(w)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("quantize_fp8", TORCH_BOX(&forward)); }

}  // namespace rlkern
