// NVFP4: a pass over the tensor for its largest magnitude, then block by block. The scales of
// sixteen (or eight) blocks are computed at once, a lane each.
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

constexpr int64_t kBlock = 16;
// Blocks whose largest magnitudes, then scales, then codes are computed in turn: 4 KiB of floats.
constexpr int64_t kChunk = 64;

// TE's fmaxf passes over NaN; the others carry it on.
template <Nvfp4Recipe recipe, class I>
RLK_HD I counted(I magnitude) {
  if constexpr (recipe == kTe)
    return magnitude > kInfinityBits ? magnitude ^ magnitude : magnitude;
  else
    return magnitude;
}

// Two codes to a byte: lanes 2i and 2i + 1 are the halves of a 64-bit lane.
RLK_HD void store_nibbles(uint8_t* out, i32x16 codes) {
  typedef int64_t i64x8 __attribute__((vector_size(64)));
  typedef uint8_t u8x8 __attribute__((vector_size(8)));
  const i64x8 pairs = (i64x8)codes;
  store_as(out, __builtin_convertvector((pairs | (pairs >> 28)) & 0xFF, u8x8));
}
RLK_HD void store_nibbles(uint8_t* out, i32x8 codes) {
  typedef int64_t i64x4 __attribute__((vector_size(32)));
  typedef uint8_t u8x4 __attribute__((vector_size(4)));
  const i64x4 pairs = (i64x4)codes;
  store_as(out, __builtin_convertvector((pairs | (pairs >> 28)) & 0xFF, u8x4));
}

template <class V, Nvfp4Recipe recipe, class T>
RLK_HD void encode_block(const T* p, float factor, uint8_t* out) {
  for (int64_t j = 0; j < kBlock; j += kWidth<V>) {
    const V x = widen<V>(p + j);
    V v = kDividesElements<recipe> ? x / factor : x * factor;
    // ModelOpt takes the sign from v < 0: adding 0 makes +0 of -0.
    if constexpr (recipe == kModelopt) v = v + 0.0f;
    store_nibbles(out + j / 2, e2m1<V>(v));
  }
}

// The bits of max |w| of `count` blocks side by side, 0 in the rest of the chunk.
template <class V, Nvfp4Recipe recipe, class T>
RLK_HD void largest_of_blocks(const T* w, int64_t rows, int64_t columns, int64_t count,
                              int32_t* most) {
  std::fill(most + count, most + kChunk, 0);
  for (int64_t b = 0; b < count; ++b) {
    typename Narrow<V>::Ints top{};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kBlock; j += kWidth<V>)
        top = larger(top, counted<recipe>(magnitudes(widen<V>(w + i * columns + b * kBlock + j))));
    most[b] = reduce_max(top);
  }
}

// `rows` rows that share their block scales: 1, or up to 16 of 16x16 blocks.
template <class V, Nvfp4Recipe recipe, class T>
RLK_HD void quantize_rows(const T* w, int64_t rows, int64_t columns, Nvfp4Global global,
                          uint8_t* codes, uint8_t* scales) {
  using I = typename Narrow<V>::Ints;
  const int64_t blocks = columns / kBlock;
  int32_t most[kChunk];
  float factors[kChunk];
  uint8_t bytes[kChunk];
  for (int64_t first = 0; first < blocks; first += kChunk) {
    const int64_t count = std::min(kChunk, blocks - first);
    const T* from = w + first * kBlock;
    largest_of_blocks<V, recipe>(from, rows, columns, count, most);
    for (int64_t b = 0; b < count; b += kWidth<V>) {
      V factor;
      const I code = nvfp4_scale<recipe>(load_as<V>(most + b), global, factor);
      store_as(factors + b, factor);
      store_as(bytes + b, __builtin_convertvector(code, typename Narrow<V>::Bytes));
    }
    for (int64_t i = 0; i < rows; ++i) {
      std::copy(bytes, bytes + count, scales + i * blocks + first);
      uint8_t* out = codes + i * columns / 2 + first * kBlock / 2;
      for (int64_t b = 0; b < count; ++b)
        encode_block<V, recipe>(from + i * columns + b * kBlock, factors[b], out + b * kBlock / 2);
    }
  }
}

// One of the two ways to encode a block: by a scale that makes its largest element 6 or 4.
struct Candidate {
  uint8_t scales[kChunk];
  float steps[kChunk], factors[kChunk];
  uint8_t codes[kBlock / 2];

  template <class V>
  RLK_HD void set(int64_t b, V raw, Nvfp4Global global) {
    const auto code = e4m3<V>(raw);
    const V s = from_e4m3<V>(code);
    store_as(scales + b, __builtin_convertvector(code, typename Narrow<V>::Bytes));
    store_as(steps + b, s);
    store_as(factors + b, te_factor(s, global));
  }

  // Encodes block b; the sum of its errors from left to right.
  template <class V, bool kSquares, class T>
  RLK_HD float encode(int64_t b, const T* p, float amax) {
    float terms[kBlock];
    for (int64_t j = 0; j < kBlock; j += kWidth<V>) {
      const V x = widen<V>(p + j);
      const auto code = e2m1<V>(x * factors[b]);
      store_nibbles(codes + j / 2, code);
      const V off = from_e2m1<V>(code) * steps[b] * amax / 1536.0f - x;
      store_as(terms + j, kSquares ? off * off : Bits<V>::from(magnitudes(off)));
    }
    float error = terms[0];
    for (int64_t i = 1; i < kBlock; ++i) error += terms[i];
    return error;
  }
};

template <class V, bool kSquares, class T>
RLK_HD void four_over_six(const T* w, int64_t columns, Nvfp4Global global, float amax,
                          uint8_t* codes, uint8_t* scales) {
  const int64_t blocks = columns / kBlock;
  int32_t most[kChunk];
  Candidate six, four;
  for (int64_t first = 0; first < blocks; first += kChunk) {
    const int64_t count = std::min(kChunk, blocks - first);
    const T* from = w + first * kBlock;
    largest_of_blocks<V, kTe>(from, 1, columns, count, most);
    for (int64_t b = 0; b < count; b += kWidth<V>) {
      const V raw = load_as<V>(most + b) / 6.0f * global.encode;
      six.set<V>(b, raw, global);
      four.set<V>(b, raw * 1.5f, global);
    }
    for (int64_t b = 0; b < count; ++b) {
      const T* block = from + b * kBlock;
      const float error6 = six.encode<V, kSquares>(b, block, amax);
      const float error4 = four.encode<V, kSquares>(b, block, amax);
      const Candidate& best = error4 < error6 ? four : six;
      scales[first + b] = best.scales[b];
      std::copy(best.codes, best.codes + kBlock / 2, codes + (first + b) * kBlock / 2);
    }
  }
}

template <class V, class T>
RLK_HD void quantize_rows_by(int64_t recipe, const T* w, int64_t rows, int64_t columns,
                             Nvfp4Global global, uint8_t* codes, uint8_t* scales) {
  switch (recipe) {
    case kTe:
      return quantize_rows<V, kTe>(w, rows, columns, global, codes, scales);
    case kVllm:
      return quantize_rows<V, kVllm>(w, rows, columns, global, codes, scales);
    case kCompressedTensors:
      return quantize_rows<V, kCompressedTensors>(w, rows, columns, global, codes, scales);
    case kTorchao:
      return quantize_rows<V, kTorchao>(w, rows, columns, global, codes, scales);
    default:
      return quantize_rows<V, kModelopt>(w, rows, columns, global, codes, scales);
  }
}

template <class V, class T>
RLK_HD int32_t amax_by(bool ignores_nan, const T* w, int64_t count) {
  if (!ignores_nan) return reduce_max(row_magnitudes<V>(w, count, typename Narrow<V>::Ints{}));
  typename Narrow<V>::Ints top{};
  for (int64_t j = 0; j < count; j += kWidth<V>)
    top = larger(top, counted<kTe>(magnitudes(load_up_to<V>(w + j, count - j))));
  return reduce_max(top);
}

#define RLK_INSTANTIATE(T)                                                                         \
  RLK_SIXTEEN void rows_16(int64_t recipe, const T* w, int64_t rows, int64_t columns,              \
                           Nvfp4Global global, uint8_t* codes, uint8_t* scales) {                  \
    quantize_rows_by<f32x16>(recipe, w, rows, columns, global, codes, scales);                     \
  }                                                                                                \
  RLK_MULTIVERSION void rows_8(int64_t recipe, const T* w, int64_t rows, int64_t columns,          \
                               Nvfp4Global global, uint8_t* codes, uint8_t* scales) {              \
    quantize_rows_by<f32x8>(recipe, w, rows, columns, global, codes, scales);                      \
  }                                                                                                \
  RLK_SIXTEEN void four_over_six_16(bool squares, const T* w, int64_t columns, Nvfp4Global global, \
                                    float amax, uint8_t* codes, uint8_t* scales) {                 \
    if (squares)                                                                                   \
      four_over_six<f32x16, true>(w, columns, global, amax, codes, scales);                        \
    else                                                                                           \
      four_over_six<f32x16, false>(w, columns, global, amax, codes, scales);                       \
  }                                                                                                \
  RLK_MULTIVERSION void four_over_six_8(bool squares, const T* w, int64_t columns,                 \
                                        Nvfp4Global global, float amax, uint8_t* codes,            \
                                        uint8_t* scales) {                                         \
    if (squares)                                                                                   \
      four_over_six<f32x8, true>(w, columns, global, amax, codes, scales);                         \
    else                                                                                           \
      four_over_six<f32x8, false>(w, columns, global, amax, codes, scales);                        \
  }                                                                                                \
  RLK_SIXTEEN int32_t amax_16(bool ignores_nan, const T* w, int64_t count) {                       \
    return amax_by<f32x16>(ignores_nan, w, count);                                                 \
  }                                                                                                \
  RLK_MULTIVERSION int32_t amax_8(bool ignores_nan, const T* w, int64_t count) {                   \
    return amax_by<f32x8>(ignores_nan, w, count);                                                  \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE

std::tuple<Tensor, Tensor, Tensor> forward(Tensor w, std::optional<Tensor> amax, int64_t recipe,
                                           bool square, int64_t rule) {
  RLK_CHECK_CPU(w);
  RLK_CHECK_DIM(w, 2);
  RLK_CHECK_CONTIGUOUS(w);
  const int64_t rows = w.size(0), columns = w.size(1), count = rows * columns;
  STD_TORCH_CHECK(columns % kBlock == 0, "w must have a multiple of 16 columns, got ", columns);
  STD_TORCH_CHECK(recipe >= kTe && recipe <= kModelopt, "recipe must be in [0, 4], got ", recipe);
  STD_TORCH_CHECK(rule >= 0 && rule <= 2, "rule must be in [0, 2], got ", rule);
  STD_TORCH_CHECK(rule == 0 || (recipe == kTe && !square), "rule needs recipe 0 and 1x16 blocks");
  if (amax.has_value()) {
    RLK_CHECK_DTYPE(*amax, Float);
    STD_TORCH_CHECK(amax->numel() == 1, "amax must be one number");
  }
  using torch::headeronly::ScalarType;
  Tensor codes = torch::stable::new_empty(w, {rows, columns / 2}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(w, {rows, columns / kBlock}, ScalarType::Byte);
  Tensor decode = torch::stable::new_empty(w, {}, ScalarType::Float);
  uint8_t* codes_out = codes.mutable_data_ptr<uint8_t>();
  uint8_t* scales_out = scales.mutable_data_ptr<uint8_t>();
  const int64_t high = square ? kBlock : 1;
  RLK_DISPATCH_FLOAT(w, T, {
    const T* data = w.const_data_ptr<T>();
    const auto piece = [recipe](const T* p, int64_t n) {
      return sixteen_lanes() ? amax_16(recipe == kTe, p, n) : amax_8(recipe == kTe, p, n);
    };
    const float a =
        amax.has_value() ? *amax->const_data_ptr<float>() : tensor_amax(data, count, piece);
    const Nvfp4Global global = Nvfp4Global::of(recipe, a, rule ? 1536.0f : 2688.0f);
    *decode.mutable_data_ptr<float>() = global.decode;
    const int64_t strips = (rows + high - 1) / high;
    const int64_t grain =
        std::max<int64_t>(1, kQuantizeGrain / std::max<int64_t>(1, high * columns));
    torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * high, tall = std::min(high, rows - row);
        const T* from = data + row * columns;
        uint8_t* to = codes_out + row * columns / 2;
        uint8_t* scale = scales_out + row * columns / kBlock;
        if (rule && sixteen_lanes())
          four_over_six_16(rule == 1, from, columns, global, a, to, scale);
        else if (rule)
          four_over_six_8(rule == 1, from, columns, global, a, to, scale);
        else if (sixteen_lanes())
          rows_16(recipe, from, tall, columns, global, to, scale);
        else
          rows_8(recipe, from, tall, columns, global, to, scale);
      }
    });
  });
  return {codes, scales, decode};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("quantize_nvfp4", TORCH_BOX(&forward)); }

}  // namespace rlkern
