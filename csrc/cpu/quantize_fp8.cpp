// FP8 E4M3 by blocks: each block is read for its largest magnitude, and again from cache for its
// codes. A whole tensor is read twice.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "quantize.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// Where the scales of a row of blocks go: bytes for kRceil, floats else.
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

template <class V, bool kDivides, class T>
RLK_HD void encode(const T* p, int64_t count, float factor, uint8_t* out) {
  int64_t j = 0;
  for (; j + kWidth<V> <= count; j += kWidth<V>) {
    const V x = widen<V>(p + j);
    const auto codes = e4m3<V>(kDivides ? x / factor : x * factor);
    store_as(out + j, __builtin_convertvector(codes, typename Narrow<V>::Bytes));
  }
  if (j == count) return;
  const V x = load_up_to<V>(p + j, count - j);
  const auto codes = e4m3<V>(kDivides ? x / factor : x * factor);
  for (int64_t i = 0; j + i < count; ++i) out[j + i] = static_cast<uint8_t>(codes[i]);
}

template <class V, class T>
RLK_HD void encode_by(int64_t order, const T* p, int64_t count, float factor, uint8_t* out) {
  if (order == kDivide)
    encode<V, true>(p, count, factor, out);
  else
    encode<V, false>(p, count, factor, out);
}

// Rows of `columns` elements each, cut into blocks `wide` columns across and all rows high.
struct Strip {
  int64_t rows, columns, wide;
};

template <class V, class T>
RLK_HD void quantize_strip(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out,
                           const Scales& scales) {
  const int64_t columns = strip.columns;
  for (int64_t j = 0, block = 0; j < columns; j += strip.wide, ++block) {
    const int64_t count = std::min(strip.wide, columns - j);
    typename Narrow<V>::Ints most{};
    for (int64_t i = 0; i < strip.rows; ++i)
      most = row_magnitudes<V>(w + i * columns + j, count, most);
    const Fp8Scale s = fp8_scale(Bits<float>::from(reduce_max(most)), rule);
    scales.put(block, s);
    for (int64_t i = 0; i < strip.rows; ++i)
      encode_by<V>(rule.order, w + i * columns + j, count, s.factor, out + i * columns + j);
  }
}

#define RLK_INSTANTIATE(T)                                                                         \
  RLK_SIXTEEN void strip_16(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out,     \
                            const Scales& scales) {                                                \
    quantize_strip<f32x16>(w, strip, rule, out, scales);                                           \
  }                                                                                                \
  RLK_MULTIVERSION void strip_8(const T* w, const Strip& strip, const Fp8Rule& rule, uint8_t* out, \
                                const Scales& scales) {                                            \
    quantize_strip<f32x8>(w, strip, rule, out, scales);                                            \
  }                                                                                                \
  RLK_SIXTEEN int32_t amax_16(const T* w, int64_t count) {                                         \
    return reduce_max(row_magnitudes<f32x16>(w, count, i32x16{}));                                 \
  }                                                                                                \
  RLK_MULTIVERSION int32_t amax_8(const T* w, int64_t count) {                                     \
    return reduce_max(row_magnitudes<f32x8>(w, count, i32x8{}));                                   \
  }                                                                                                \
  RLK_SIXTEEN void encode_16(int64_t order, const T* w, int64_t count, float factor,               \
                             uint8_t* out) {                                                       \
    encode_by<f32x16>(order, w, count, factor, out);                                               \
  }                                                                                                \
  RLK_MULTIVERSION void encode_8(int64_t order, const T* w, int64_t count, float factor,           \
                                 uint8_t* out) {                                                   \
    encode_by<f32x8>(order, w, count, factor, out);                                                \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE

std::tuple<Tensor, Tensor> forward(Tensor w, std::optional<Tensor> amax, int64_t high, int64_t wide,
                                   int64_t order, double amax_floor, double scale_floor,
                                   double zero_scale, bool power_of_two) {
  RLK_CHECK_CPU(w);
  RLK_CHECK_DIM(w, 2);
  RLK_CHECK_CONTIGUOUS(w);
  STD_TORCH_CHECK(high >= 0 && wide >= 0, "high and wide must be at least 0");
  STD_TORCH_CHECK(order >= kDivide && order <= kRceil, "order must be in [0, 3], got ", order);
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
  using torch::headeronly::ScalarType;
  Tensor codes = torch::stable::new_empty(w, {rows, columns}, ScalarType::Byte);
  const bool bytes = order == kRceil;
  Tensor scale =
      torch::stable::new_empty(w, {down, across}, bytes ? ScalarType::Byte : ScalarType::Float);
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
  const Scales scales{bytes ? nullptr : scale.mutable_data_ptr<float>(),
                      bytes ? scale.mutable_data_ptr<uint8_t>() : nullptr};
  if (count == 0) {
    // rows without columns have no blocks
    return {codes, scale};
  }
  RLK_DISPATCH_FLOAT(w, T, {
    const T* data = w.const_data_ptr<T>();
    if (down * across == 1) {
      const auto piece = [](const T* p, int64_t n) {
        return sixteen_lanes() ? amax_16(p, n) : amax_8(p, n);
      };
      const float a =
          amax.has_value() ? *amax->const_data_ptr<float>() : tensor_amax(data, count, piece);
      const Fp8Scale s = fp8_scale(a, rule);
      scales.put(0, s);
      torch::stable::parallel_for(0, count, kQuantizeGrain, [&](int64_t begin, int64_t end) {
        if (sixteen_lanes())
          encode_16(order, data + begin, end - begin, s.factor, out + begin);
        else
          encode_8(order, data + begin, end - begin, s.factor, out + begin);
      });
    } else {
      const int64_t grain = std::max<int64_t>(1, kQuantizeGrain / (high * columns));
      torch::stable::parallel_for(0, down, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Strip strip{std::min(high, rows - i * high), columns, wide};
          const Scales mine{bytes ? nullptr : scales.floats + i * across,
                            bytes ? scales.bytes + i * across : nullptr};
          const int64_t at = i * high * columns;
          if (sixteen_lanes())
            strip_16(data + at, strip, rule, out + at, mine);
          else
            strip_8(data + at, strip, rule, out + at, mine);
        }
      });
    }
  });
  return {codes, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("quantize_fp8", TORCH_BOX(&forward)); }

}  // namespace rlkern
