// RMSNorm of rows and, of heads, RoPE after it, rounded to the dtype where transformers rounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "check.h"
#include "decoder.h"
#include "dispatch.h"
#include "rope.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// A thread is worth starting for about this many elements.
constexpr int64_t kGrain = 32768;

template <class T>
RLK_HD f32x16 rounded(f32x16 x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, bf16>) return round_to_bf16(x);
  T narrow[kLanes];
  store(narrow, x);
  return load(narrow);
}

template <class T>
struct Norm {
  const T* x;
  const T* weight;   // null: not normalised
  const float* cos;  // null: not turned
  const float* sin;
  T* out;
  int64_t heads, width, half;
  float eps;

  RLK_HD f32x16 at(const T* row, int64_t d, int64_t count, float inverse) const {
    const bool whole = count >= kLanes;
    const f32x16 v = whole ? load(row + d) : load_partial(row + d, count, 0.0f);
    if (!weight) return v;
    const f32x16 w = whole ? load(weight + d) : load_partial(weight + d, count, 0.0f);
    return rounded<T>(w * rounded<T>(v * inverse));
  }

  // v is rounded already.
  RLK_HD void put(T* row, int64_t d, int64_t count, f32x16 v) const {
    if (count >= kLanes && std::is_same_v<T, bf16>)
      store_as(row + d, __builtin_convertvector(Bits<f32x16>::of(v) >> 16, u16x16));
    else if (count >= kLanes)
      store(row + d, v);
    else
      store_partial(row + d, v, count);
  }

  RLK_HD float inverse_rms(const T* row) const {
    f32x16 sums{};
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      const f32x16 v = load(row + d);
      sums += v * v;
    }
    if (d < width) {
      const f32x16 v = load_partial(row + d, width - d, 0.0f);
      sums += v * v;
    }
    return 1.0f / std::sqrt(reduce_add(sums) / static_cast<float>(width) + eps);
  }

  RLK_HD void operator()(int64_t r) const {
    const T* const row = x + r * width;
    T* const to = out + r * width;
    const float inverse = weight ? inverse_rms(row) : 1.0f;
    for (int64_t d = 0; d < half; d += kLanes) {
      const int64_t count = half - d, token = r / heads * half + d;
      const bool whole = count >= kLanes;
      const f32x16 low = at(row, d, count, inverse), high = at(row, half + d, count, inverse);
      const f32x16 c =
          rounded<T>(whole ? load(cos + token) : load_partial(cos + token, count, 0.0f));
      const f32x16 s =
          rounded<T>(whole ? load(sin + token) : load_partial(sin + token, count, 0.0f));
      put(to, d, count, rounded<T>(rounded<T>(low * c) - rounded<T>(high * s)));
      put(to, half + d, count, rounded<T>(rounded<T>(high * c) + rounded<T>(low * s)));
    }
    for (int64_t d = 2 * half; d < width; d += kLanes)
      put(to, d, width - d, at(row, d, width - d, inverse));
  }
};

template <class T>
RLK_HD void rows(const Norm<T>& norm, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) norm(r);
}

#define RLK_CLONES(T)                                                             \
  RLK_MULTIVERSION void clones(const Norm<T>& norm, int64_t begin, int64_t end) { \
    rows(norm, begin, end);                                                       \
  }
RLK_CLONES(float)
RLK_CLONES(bf16)
RLK_CLONES(fp16)

}  // namespace

Tensor rms_norm(Tensor x, std::optional<Tensor> weight, double eps, std::optional<Tensor> cos,
                std::optional<Tensor> sin) {
  RLK_CHECK_CPU(x);
  RLK_CHECK_CONTIGUOUS(x);
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x must have 2 or 3 dimensions");
  const int64_t tokens = x.size(0), heads = x.dim() == 3 ? x.size(1) : 1;
  const int64_t width = x.size(x.dim() - 1);
  if (weight.has_value()) {
    RLK_CHECK_CPU(*weight);
    RLK_CHECK_DIM(*weight, 1);
    RLK_CHECK_SIZE(*weight, 0, width);
    RLK_CHECK_CONTIGUOUS(*weight);
    STD_TORCH_CHECK(weight->scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  }
  const Rope rope(cos, sin, tokens, width);
  Tensor out = torch::stable::empty_like(x);
  RLK_DISPATCH_FLOAT(x, T, {
    const Norm<T> norm{x.const_data_ptr<T>(),
                       weight.has_value() ? weight->const_data_ptr<T>() : nullptr,
                       rope.cos,
                       rope.sin,
                       out.mutable_data_ptr<T>(),
                       heads,
                       width,
                       rope.half,
                       static_cast<float>(eps)};
    torch::stable::parallel_for(0, tokens * heads,
                                std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)),
                                [&](int64_t begin, int64_t end) { clones(norm, begin, end); });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace rlkern
