// Sums and means of packed sequences: a thread a sequence, in float64, in blocks from its
// beginning. The gradient spreads one number per sequence over its tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "segments.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// Eight doubles fill a zmm, and are two ymm: twice that many sums hide the latency of an addition.
constexpr int kHalf = 8;
typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef double f64x8 __attribute__((vector_size(64)));

// A thread is worth starting for about this many values.
constexpr int64_t kGrain = 32768;

// The value where the mask is true, else 0: by its bits, which a NaN does not survive.
template <class T>
RLK_HD f32x8 load_counting(const T* p, const bool* mask) {
  const f32x8 x = widen<f32x8>(p);
  if (!mask) return x;
  const i32x8 keep = -__builtin_convertvector(load_as<u8x8>(mask), i32x8);
  return (f32x8)((i32x8)x & keep);
}

RLK_HD double reduce_add(f64x8 x) {
  double s[4];
  for (int i = 0; i < 4; ++i) s[i] = x[i] + x[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

template <class T>
RLK_HD double sum_of(const T* values, const bool* mask, int64_t count) {
  f64x8 even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kHalf <= count; i += 2 * kHalf) {
    const bool* next = mask ? mask + i : nullptr;
    even += __builtin_convertvector(load_counting(values + i, next), f64x8);
    next = mask ? next + kHalf : nullptr;
    odd += __builtin_convertvector(load_counting(values + i + kHalf, next), f64x8);
  }
  double tail = 0.0;
  for (; i < count; ++i)
    if (!mask || mask[i]) tail += static_cast<double>(static_cast<float>(values[i]));
  return reduce_add(even + odd) + tail;
}

RLK_HD int64_t count_of(const bool* mask, int64_t count) {
  int64_t number = 0;
  for (int64_t i = 0; i < count; ++i) number += mask[i];
  return number;
}

template <class T>
RLK_HD void spread(float each, const bool* mask, int64_t count, T* out) {
  const T value = static_cast<T>(each), zero = static_cast<T>(0.0f);
  if (!mask) {
    std::fill_n(out, count, value);
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = mask[i] ? value : zero;
}

#define RLK_INSTANTIATE(T)                                                                  \
  RLK_MULTIVERSION double segment_sum(const T* values, const bool* mask, int64_t count) {   \
    return mask ? sum_of(values, mask, count)                                               \
                : sum_of(values, static_cast<const bool*>(nullptr), count);                 \
  }                                                                                         \
  RLK_MULTIVERSION void segment_grad(float each, const bool* mask, int64_t count, T* out) { \
    spread(each, mask, count, out);                                                         \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE

RLK_MULTIVERSION int64_t segment_count(const bool* mask, int64_t count) {
  return count_of(mask, count);
}

void check_inputs(const Tensor& values, const std::optional<Tensor>& mask) {
  RLK_CHECK_CPU(values);
  RLK_CHECK_DIM(values, 1);
  RLK_CHECK_CONTIGUOUS(values);
  if (mask.has_value()) {
    RLK_CHECK_CPU(*mask);
    RLK_CHECK_DTYPE(*mask, Bool);
    RLK_CHECK_DIM(*mask, 1);
    RLK_CHECK_SIZE(*mask, 0, values.size(0));
    RLK_CHECK_CONTIGUOUS(*mask);
  }
}

std::tuple<Tensor, Tensor> forward(Tensor values, Tensor cu_seqlens, std::optional<Tensor> mask,
                                   bool mean) {
  check_inputs(values, mask);
  const int64_t tokens = values.size(0);
  const Segments segments(cu_seqlens, tokens);
  const int64_t num = segments.count();
  const auto kFloat = torch::headeronly::ScalarType::Float;
  Tensor out = torch::stable::new_empty(values, {num}, kFloat);
  Tensor count = torch::stable::new_empty(values, {mean ? num : 0}, kFloat);
  float* result = out.mutable_data_ptr<float>();
  float* number = mean ? count.mutable_data_ptr<float>() : nullptr;
  const bool* counts = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  RLK_DISPATCH_FLOAT(values, T, {
    const T* data = values.const_data_ptr<T>();
    torch::stable::parallel_for(0, num, segments.grain(kGrain), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const int64_t begin = segments.begin(s), length = segments.length(s);
        const bool* mine = counts ? counts + begin : nullptr;
        double sum = segment_sum(data + begin, mine, length);
        if (mean) {
          const int64_t n = mine ? segment_count(mine, length) : length;
          number[s] = static_cast<float>(n);
          sum /= static_cast<double>(std::max<int64_t>(1, n));
        }
        result[s] = static_cast<float>(sum);
      }
    });
  });
  return {out, count};
}

Tensor backward(Tensor grad, Tensor values, Tensor cu_seqlens, std::optional<Tensor> mask,
                Tensor count, bool mean) {
  check_inputs(values, mask);
  const int64_t tokens = values.size(0);
  const Segments segments(cu_seqlens, tokens);
  RLK_CHECK_DTYPE(grad, Float);
  RLK_CHECK_CONTIGUOUS(grad);
  RLK_CHECK_SIZE(grad, 0, segments.count());
  RLK_CHECK_DTYPE(count, Float);
  RLK_CHECK_SIZE(count, 0, mean ? segments.count() : 0);
  Tensor grad_values = torch::stable::new_empty(values, {tokens});
  const float* upstream = grad.const_data_ptr<float>();
  const float* number = mean ? count.const_data_ptr<float>() : nullptr;
  const bool* counts = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  RLK_DISPATCH_FLOAT(values, T, {
    T* out = grad_values.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, tokens, kGrain, [&](int64_t first, int64_t last) {
      int64_t bound = segments.last_bound(first);
      for (int64_t token = first; token < last;) {
        const int64_t s = bound++;
        const bool inside = s >= 0 && s < segments.count();
        int64_t end = last;
        if (s < segments.count()) end = std::clamp(segments.begin(s + 1), token, last);
        float each = inside ? upstream[s] : 0.0f;
        if (mean && inside) each /= std::max(1.0f, number[s]);
        segment_grad(each, counts ? counts + token : nullptr, end - token, out + token);
        token = end;
      }
    });
  });
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("segment_reduce_fwd", TORCH_BOX(&forward));
  m.impl("segment_reduce_bwd", TORCH_BOX(&backward));
}

}  // namespace rlkern
