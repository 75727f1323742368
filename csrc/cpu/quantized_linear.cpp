// Products with quantised weights, whose codes are decoded on the way: decoding tokens by the
// handful is bound by the bytes of the weight, of which there are a half or a quarter of
// bfloat16's.
//
// A token's result is the same in bits whatever the number of tokens and threads, so that a rollout
// engine and a trainer agree. The gradient multiplies the upstream one by the decoded weight.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>

#include "check.h"
#include "dispatch.h"
#include "quantized_linear_tile.h"
// after the intrinsics
#include "matmul.h"
#include "rlkern/math/quant.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kScaleBlock = 128;
constexpr int64_t kNvfp4Block = 16;
constexpr int kWeightRows = 4;
// Multiplications that make a thread worth starting.
constexpr int64_t kGrain = 1 << 16;
// Of packed tokens, which are read once for four rows of the weight: within L2.
constexpr int64_t kTokenBytes = 512 * 1024;

// Memory aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(std::aligned_alloc(64, std::max<int64_t>(64, round_up(bytes, 64)))) {
    STD_TORCH_CHECK(data_, "no memory for ", bytes, " bytes");
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

// A weight as the schema gives it: FP8 codes with float scales by block, or NVFP4.
struct Quantized {
  int64_t rows, depth, high, wide;
  const uint8_t* codes;
  const float* scales;        // of FP8
  const uint8_t* nibbles;     // scales of NVFP4
  const float* global_scale;  // of NVFP4

  bool nvfp4() const { return nibbles != nullptr; }
  int64_t across() const { return (depth + wide - 1) / wide; }
  int64_t row_bytes() const { return nvfp4() ? depth / 2 : depth; }
  const uint8_t* row(int64_t n) const { return codes + n * row_bytes(); }
  const uint8_t* row_nibbles(int64_t n) const { return nibbles + n * (depth / kNvfp4Block); }
  // One factor for each block along k; of NVFP4 one for all.
  const float* factors(int64_t n) const {
    return nvfp4() ? global_scale : scales + n / high * across();
  }
  int64_t factor_stride() const { return nvfp4() || wide >= depth ? 0 : 1; }
};

// Codes as floats; of NVFP4 times the scales of their blocks, which is exact.
RLK_HD void decode_fp8_body(const uint8_t* codes, int64_t count, float* out) {
  typedef uint8_t u8x8 __attribute__((vector_size(8)));
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    const i32x8 code = __builtin_convertvector(load_as<u8x8>(codes + k), i32x8);
    const i32x8 value = Bits<f32x8>::of(from_e4m3<f32x8>(code & 127));
    store_as(out + k, Bits<f32x8>::from(value | ((code & 128) << 24)));
  }
  for (; k < count; ++k) {
    const float value = from_e4m3<float>(codes[k] & 127);
    out[k] = codes[k] & 128 ? -value : value;
  }
}
RLK_HD void decode_nvfp4_body(const uint8_t* codes, const uint8_t* scales, int64_t blocks,
                              float* out) {
  typedef uint8_t u8x8 __attribute__((vector_size(8)));
  for (int64_t b = 0; b < blocks; ++b, codes += 8, out += 16) {
    const float scale = from_e4m3<float>(scales[b] & 127);
    const i32x8 pairs = __builtin_convertvector(load_as<u8x8>(codes), i32x8);
    const f32x8 even = from_e2m1<f32x8>(pairs & 15) * scale;
    const f32x8 odd = from_e2m1<f32x8>(pairs >> 4) * scale;
    store_as(out, __builtin_shuffle(even, odd, i32x8{0, 8, 1, 9, 2, 10, 3, 11}));
    store_as(out + 8, __builtin_shuffle(even, odd, i32x8{4, 12, 5, 13, 6, 14, 7, 15}));
  }
}
RLK_MULTIVERSION void decode_fp8(const uint8_t* codes, int64_t count, float* out) {
  decode_fp8_body(codes, count, out);
}
RLK_MULTIVERSION void decode_nvfp4(const uint8_t* codes, const uint8_t* scales, int64_t blocks,
                                   float* out) {
  decode_nvfp4_body(codes, scales, blocks, out);
}

// `count` columns from k on, without the factors; of NVFP4 both are multiples of 16.
void decode(const Quantized& w, int64_t n, int64_t k, int64_t count, float* out) {
  if (w.nvfp4())
    decode_nvfp4(w.row(n) + k / 2, w.row_nibbles(n) + k / kNvfp4Block, count / kNvfp4Block, out);
  else
    decode_fp8(w.row(n) + k, count, out);
}

// Tokens: floats, or codes with a factor for each 128 of a row.
template <class T>
struct Input {
  int64_t tokens, depth;
  const T* values;
  const uint8_t* codes;
  const float* factors;

  int64_t blocks() const { return (depth + kScaleBlock - 1) / kScaleBlock; }
  void row(int64_t m, float* out) const {
    if (codes) return decode_fp8(codes + m * depth, depth, out);
    for (int64_t k = 0; k < depth; ++k) out[k] = static_cast<float>(values[m * depth + k]);
  }
};

// (M, N) results, with the bias that they get before they are rounded.
template <class T>
struct Output {
  T* data;
  const T* bias;
  int64_t columns;

  void put(int64_t m, int64_t n, float value) const {
    data[m * columns + n] = static_cast<T>(bias ? value + static_cast<float>(bias[n]) : value);
  }
};

// Blocks of k that `depth` has for whoever has a factor for each.
struct Factors {
  const float* weight[kWeightRows];
  int64_t weight_stride;
  const float* token;  // or null
};

// One token and four rows: weights [4][padded], the token's padded with zeros.
RLK_HD void four_dots_body(const float* w, const float* x, int64_t padded, int64_t block,
                           const Factors& f, float* out) {
  f32x16 total[kWeightRows] = {};
  for (int64_t b = 0; b * block < padded; ++b) {
    f32x16 sum[kWeightRows] = {};
    for (int64_t k = b * block; k < std::min(padded, (b + 1) * block); k += kLanes)
      for (int r = 0; r < kWeightRows; ++r) sum[r] += load(w + r * padded + k) * load(x + k);
    for (int r = 0; r < kWeightRows; ++r) {
      const float factor = f.weight[r][b * f.weight_stride];
      total[r] += sum[r] * (f.token ? factor * f.token[b] : factor);
    }
  }
  for (int r = 0; r < kWeightRows; ++r) out[r] = reduce_add(total[r]);
}
RLK_MULTIVERSION void four_dots(const float* w, const float* x, int64_t padded, int64_t block,
                                const Factors& f, float* out) {
  four_dots_body(w, x, padded, block, f, out);
}

// Of four rows from n on; the last ones stand for those that are not there.
template <class F>
void for_rows(int64_t n, int64_t rows, const F& f) {
  for (int r = 0; r < kWeightRows; ++r) f(r, std::min(n + r, rows - 1));
}

template <class F>
void for_row_groups(int64_t rows, int64_t work_of_row, const F& f) {
  const int64_t groups = (rows + kWeightRows - 1) / kWeightRows;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 4 * work_of_row));
  torch::stable::parallel_for(0, groups, grain, f);
}

template <class T>
void forward_anywhere(const Quantized& w, const Input<T>& x, const Output<T>& out) {
  const int64_t padded = round_up(w.depth, kLanes);
  const int64_t block =
      x.factors || w.factor_stride() ? kScaleBlock : std::max(padded, kScaleBlock);
  Buffer tokens(x.tokens * padded * 4);
  for (int64_t m = 0; m < x.tokens; ++m) {
    float* const row = tokens.as<float>() + m * padded;
    x.row(m, row);
    std::fill(row + w.depth, row + padded, 0.0f);
  }
  for_row_groups(w.rows, x.tokens * w.depth, [&](int64_t begin, int64_t end) {
    Buffer weights(kWeightRows * padded * 4);
    float* const rows = weights.as<float>();
    std::fill_n(rows, kWeightRows * padded, 0.0f);
    for (int64_t n = begin * kWeightRows; n < std::min(w.rows, end * kWeightRows);
         n += kWeightRows) {
      Factors factors{{}, w.factor_stride(), nullptr};
      for_rows(n, w.rows, [&](int r, int64_t row) {
        decode(w, row, 0, w.depth, rows + r * padded);
        factors.weight[r] = w.factors(row);
      });
      for (int64_t m = 0; m < x.tokens; ++m) {
        float four[kWeightRows];
        if (x.factors) factors.token = x.factors + m * x.blocks();
        four_dots(rows, tokens.as<float>() + m * padded, padded, block, factors, four);
        for (int r = 0; r < kWeightRows && n + r < w.rows; ++r) out.put(m, n + r, four[r]);
      }
    }
  });
}

#if defined(__x86_64__)
// Steps of decoded weights that stay in L1 while the tokens pass by.
constexpr int64_t kSteps = 16;
constexpr int64_t kFew = 4;  // tokens at a time; no more than these decode in registers

template <class Decoder, class Math, bool kPromote, class X, class T>
void forward_vbmi(const Quantized& w, const X* x, const float* token_factors, int64_t tokens,
                  const Output<T>& out) {
  const int64_t steps = (w.depth + vbmi::kStep - 1) / vbmi::kStep, padded = steps * vbmi::kStep;
  const int64_t blocks = (w.depth + kScaleBlock - 1) / kScaleBlock;
  const int64_t bytes = padded * Math::kTokenBytes;
  Buffer packed(tokens * bytes);
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(1, kGrain / padded), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
          vbmi::pack_token<Decoder>(x + m * w.depth, w.depth, packed.as<char>() + m * bytes);
      });
  const int64_t turn = std::min(tokens, std::max<int64_t>(16, kTokenBytes / bytes / 4 * 4));
  for_row_groups(w.rows, tokens * w.depth, [&](int64_t begin, int64_t end) {
    const int64_t words = w.nvfp4() ? vbmi::scale_words_of(w.depth) : 0;
    Buffer decoded(kWeightRows * std::min(kSteps, steps) * 2 * 64);
    Buffer scales(kWeightRows * words * static_cast<int64_t>(sizeof(vbmi::ScaleWords)));
    Buffer sums(turn * kWeightRows * 64), factors(kPromote ? turn * blocks * 4 : 0);
    for (int64_t m0 = 0; m0 < tokens; m0 += turn) {
      const int64_t count = std::min(turn, tokens - m0);
      int64_t scaled = -1;  // the rows of blocks whose factors are at hand
      for (int64_t n = begin * kWeightRows; n < std::min(w.rows, end * kWeightRows);
           n += kWeightRows) {
        vbmi::Weights weights{{}, {}, w.depth, 0, steps, nullptr, {}};
        float row_factors[kWeightRows], row_bias[kWeightRows];
        for_rows(n, w.rows, [&](int r, int64_t row) {
          row_factors[r] = w.factor_stride() ? 1.0f : *w.factors(row);
          row_bias[r] = out.bias ? static_cast<float>(out.bias[row]) : 0.0f;
          weights.codes[r] = w.row(row);
          weights.scales[r] = scales.as<vbmi::ScaleWords>() + r * words;
          if (words)
            vbmi::scale_words(w.row_nibbles(row), w.depth / kNvfp4Block,
                              scales.as<vbmi::ScaleWords>() + r * words);
        });
        if (kPromote && scaled != n / kScaleBlock) {
          scaled = n / kScaleBlock;
          for (int64_t m = 0; m < count; ++m)
            for (int64_t b = 0; b < blocks; ++b) {
              const float of_weight = w.factor_stride() ? w.factors(n)[b] : 1.0f;
              const float of_token = token_factors ? token_factors[(m0 + m) * blocks + b] : 1.0f;
              factors.as<float>()[m * blocks + b] = of_weight * of_token;
            }
        }
        const int64_t chunk = count <= kFew ? steps : kSteps;
        for (weights.begin = 0; weights.begin < steps; weights.begin += chunk) {
          weights.end = std::min(steps, weights.begin + chunk);
          if (count > kFew) {
            vbmi::decode_rows<Decoder>(weights, decoded.as<__m512i>());
            weights.decoded = decoded.as<__m512i>();
          }
          // of the next steps, or rows, while there are tokens: two rows for each of the first
          // calls
          const bool more = weights.end < steps;
          const bool last = n + 2 * kWeightRows > w.rows;
          const int64_t at = more ? weights.end * vbmi::kStep / Decoder::kCodesPerByte
                                  : w.row_bytes() * kWeightRows;
          for (int64_t m = 0, call = 0; m < count; ++call) {
            const bool wanted = weights.decoded && call < 2 && (more || !last);
            for (int i = 0; i < 2; ++i)
              weights.next[i] = wanted ? weights.codes[2 * call + i] + at : nullptr;
            const vbmi::Tokens some{packed.as<char>() + (m0 + m) * bytes, bytes,
                                    factors.as<float>() + m * blocks, blocks};
            const int taken = static_cast<int>(std::min(kFew, count - m));
            vbmi::add_four_rows<Decoder, Math, kPromote>(weights, some, taken,
                                                         sums.as<__m512>() + m * kWeightRows);
            m += taken;
          }
        }
        vbmi::put_rows<kPromote>(sums.as<__m512>(), count, row_factors,
                                 out.bias ? row_bias : nullptr,
                                 static_cast<int>(std::min<int64_t>(kWeightRows, w.rows - n)),
                                 out.data + m0 * out.columns + n, out.columns);
      }
    }
  });
}

template <class T>
void forward_vbmi(const Quantized& w, const Input<T>& x, const Output<T>& out) {
  using vbmi::Bf16Math, vbmi::FloatMath, vbmi::Fp8Decoder, vbmi::Nvfp4Decoder;
  if (x.codes)
    return forward_vbmi<Fp8Decoder, Bf16Math, true>(w, x.codes, x.factors, x.tokens, out);
  // half precision has more digits than bfloat16: as float
  using Math = std::conditional_t<std::is_same_v<T, bf16>, Bf16Math, FloatMath>;
  if (w.nvfp4())
    return forward_vbmi<Nvfp4Decoder, Math, false>(w, x.values, nullptr, x.tokens, out);
  if (w.factor_stride())
    return forward_vbmi<Fp8Decoder, Math, true>(w, x.values, nullptr, x.tokens, out);
  forward_vbmi<Fp8Decoder, Math, false>(w, x.values, nullptr, x.tokens, out);
}
#endif

bool has_vbmi() {
#if defined(__x86_64__)
  static const bool has = cpu_isa() == Isa::kAvx512Bf16 && vbmi::supported();
  return has;
#else
  return false;
#endif
}

Quantized quantized(const Tensor& data, const Tensor& scale,
                    const std::optional<Tensor>& global_scale, int64_t depth, int64_t high,
                    int64_t wide) {
  RLK_CHECK_CPU(data);
  RLK_CHECK_DIM(data, 2);
  RLK_CHECK_CONTIGUOUS(data);
  RLK_CHECK_DTYPE(data, Byte);
  RLK_CHECK_CPU(scale);
  RLK_CHECK_DIM(scale, 2);
  RLK_CHECK_CONTIGUOUS(scale);
  STD_TORCH_CHECK(high >= 0 && wide >= 0, "high and wide must be at least 0");
  Quantized w{data.size(0), depth,   high,   wide, data.const_data_ptr<uint8_t>(),
              nullptr,      nullptr, nullptr};
  w.high = high ? high : std::max<int64_t>(1, w.rows);
  w.wide = wide ? wide : std::max<int64_t>(1, depth);
  RLK_CHECK_SIZE(scale, 0, (w.rows + w.high - 1) / w.high);
  RLK_CHECK_SIZE(scale, 1, w.across());
  if (wide == kNvfp4Block) {
    STD_TORCH_CHECK(global_scale.has_value() && high == 1 && depth % kNvfp4Block == 0,
                    "NVFP4 has a global scale, and blocks of 1 x 16");
    RLK_CHECK_SIZE(data, 1, depth / 2);
    RLK_CHECK_DTYPE(scale, Byte);
    RLK_CHECK_CPU(*global_scale);
    RLK_CHECK_DTYPE(*global_scale, Float);
    STD_TORCH_CHECK(global_scale->numel() == 1, "global_scale must be one number");
    w.nibbles = scale.const_data_ptr<uint8_t>();
    w.global_scale = global_scale->const_data_ptr<float>();
    return w;
  }
  STD_TORCH_CHECK(!global_scale.has_value(), "FP8 has no global scale");
  STD_TORCH_CHECK(wide == 0 || wide == kScaleBlock, "wide must be 0, 16 or 128, got ", wide);
  RLK_CHECK_SIZE(data, 1, depth);
  RLK_CHECK_DTYPE(scale, Float);
  w.scales = scale.const_data_ptr<float>();
  return w;
}

Tensor forward(Tensor x, std::optional<Tensor> x_codes, std::optional<Tensor> x_scale, Tensor data,
               Tensor scale, std::optional<Tensor> global_scale, std::optional<Tensor> bias,
               int64_t high, int64_t wide) {
  RLK_CHECK_CPU(x);
  RLK_CHECK_DIM(x, 2);
  RLK_CHECK_CONTIGUOUS(x);
  const int64_t tokens = x.size(0), depth = x.size(1);
  const Quantized w = quantized(data, scale, global_scale, depth, high, wide);
  STD_TORCH_CHECK(x_codes.has_value() == x_scale.has_value(), "x_codes comes with x_scale");
  if (x_codes.has_value()) {
    STD_TORCH_CHECK(!w.nvfp4(), "x_codes with FP8 weights alone");
    RLK_CHECK_CPU(*x_codes);
    RLK_CHECK_DIM(*x_codes, 2);
    RLK_CHECK_CONTIGUOUS(*x_codes);
    RLK_CHECK_DTYPE(*x_codes, Byte);
    RLK_CHECK_SIZE(*x_codes, 0, tokens);
    RLK_CHECK_SIZE(*x_codes, 1, depth);
    RLK_CHECK_CPU(*x_scale);
    RLK_CHECK_DIM(*x_scale, 2);
    RLK_CHECK_CONTIGUOUS(*x_scale);
    RLK_CHECK_DTYPE(*x_scale, Float);
    RLK_CHECK_SIZE(*x_scale, 0, tokens);
    RLK_CHECK_SIZE(*x_scale, 1, (depth + kScaleBlock - 1) / kScaleBlock);
  }
  if (bias.has_value()) {
    RLK_CHECK_CPU(*bias);
    RLK_CHECK_DIM(*bias, 1);
    RLK_CHECK_SIZE(*bias, 0, w.rows);
    RLK_CHECK_CONTIGUOUS(*bias);
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias must have the dtype of x");
  }
  Tensor y = torch::stable::new_empty(x, {tokens, w.rows});
  if (tokens * w.rows == 0) return y;
  RLK_DISPATCH_FLOAT(x, T, {
    const Output<T> out{y.mutable_data_ptr<T>(),
                        bias.has_value() ? bias->const_data_ptr<T>() : nullptr, w.rows};
    const Input<T> in{tokens, depth, x.const_data_ptr<T>(),
                      x_codes.has_value() ? x_codes->const_data_ptr<uint8_t>() : nullptr,
                      x_scale.has_value() ? x_scale->const_data_ptr<float>() : nullptr};
    if (depth == 0) {
      for (int64_t m = 0; m < tokens; ++m)
        for (int64_t n = 0; n < w.rows; ++n) out.put(m, n, 0.0f);
#if defined(__x86_64__)
    } else if (has_vbmi()) {
      forward_vbmi(w, in, out);
#endif
    } else {
      forward_anywhere(w, in, out);
    }
  });
  return y;
}

// grad W, W decoded and scaled in float: panels of its columns, blocks of its rows.
Tensor backward(Tensor grad, Tensor data, Tensor scale, std::optional<Tensor> global_scale,
                int64_t depth, int64_t high, int64_t wide) {
  RLK_CHECK_CPU(grad);
  RLK_CHECK_DIM(grad, 2);
  RLK_CHECK_CONTIGUOUS(grad);
  STD_TORCH_CHECK(depth >= 0, "depth must be at least 0");
  const Quantized w = quantized(data, scale, global_scale, depth, high, wide);
  RLK_CHECK_SIZE(grad, 1, w.rows);
  const int64_t tokens = grad.size(0);
  Tensor result = torch::stable::new_empty(grad, {tokens, depth});
  if (tokens * depth == 0) return result;
  RLK_DISPATCH_FLOAT(grad, T, {
    const auto kernels = tile_kernels<float, T>();
    const int64_t panel = kernels.panel, tall = round_up(tokens, kernels.rows);
    Buffer upstream(tall * w.rows * 4);
    copy_rows(grad.const_data_ptr<T>(), w.rows, tokens, w.rows, tall, upstream.as<float>());
    T* const out = result.mutable_data_ptr<T>();
    const int64_t panels = (depth + panel - 1) / panel;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, tall * w.rows));
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      Buffer weights(kScaleBlock * panel * 4), sums(tall * panel * 4);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t k = p * panel, count = std::min(panel, depth - k);
        std::fill_n(sums.as<float>(), tall * panel, 0.0f);
        for (int64_t n = 0; n < w.rows; n += kScaleBlock) {
          const int64_t rows = std::min(kScaleBlock, w.rows - n);
          for (int64_t i = 0; i < rows; ++i) {
            float* const row = weights.as<float>() + i * panel;
            decode(w, n + i, k, count, row);
            const float* const factors = w.factors(n + i);
            for (int64_t j = 0; j < count; ++j)
              row[j] *= factors[w.factor_stride() ? (k + j) / kScaleBlock : 0];
            std::fill(row + count, row + panel, 0.0f);
          }
          kernels.product(upstream.as<float>() + n, w.rows, 1, weights.as<float>(), rows, tall,
                          panel, sums.as<float>(), panel, true);
        }
        for (int64_t m = 0; m < tokens; ++m)
          for (int64_t j = 0; j < count; ++j)
            out[m * depth + k + j] = static_cast<T>(sums.as<float>()[m * panel + j]);
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("quantized_linear_fwd", TORCH_BOX(&forward));
  m.impl("quantized_linear_bwd", TORCH_BOX(&backward));
}

}  // namespace rlkern
