// LATR's test and ROSE's diversity, from the top log-probs of each row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

template <class T>
RLK_HD f32x16 load_up_to(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_partial(p, left, 0.0f);
}

template <class T>
RLK_HD float squared_length(const T* e, int64_t width) {
  f32x16 sum{};
  for (int64_t h = 0; h < width; h += kLanes) {
    const f32x16 x = load_up_to(e + h, width - h);
    sum += x * x;
  }
  return reduce_add(sum);
}

// |sum_i scale_i e_i|^2
template <class T>
RLK_HD float mixed_length(const T* const* rows, const float* scales, int64_t count, int64_t width) {
  f32x16 length{};
  for (int64_t h = 0; h < width; h += kLanes) {
    f32x16 mean{};
    for (int64_t i = 0; i < count; ++i) mean += scales[i] * load_up_to(rows[i] + h, width - h);
    length += mean * mean;
  }
  return reduce_add(length);
}

#define RLK_CLONES(T)                                                                              \
  RLK_MULTIVERSION float length_of(const T* e, int64_t width) { return squared_length(e, width); } \
  RLK_MULTIVERSION float length_of(const T* const* rows, const float* scales, int64_t count,       \
                                   int64_t width) {                                                \
    return mixed_length(rows, scales, count, width);                                               \
  }
RLK_CLONES(float)
RLK_CLONES(bf16)
RLK_CLONES(fp16)
#undef RLK_CLONES

struct Candidates {
  const float* log_probs;
  const int64_t* ids;
  int64_t top;
};

// sum_i p_i^2 - |sum_i p_i e_i / |e_i||^2
template <class T>
float diversity_of(const Candidates& row, const T* embedding, int64_t vocab, int64_t stride,
                   int64_t width, std::vector<const T*>& rows, std::vector<float>& scales) {
  rows.clear();
  scales.clear();
  float squares = 0.0f;
  for (int64_t i = 0; i < row.top; ++i) {
    if (row.ids[i] < 0 || row.ids[i] >= vocab) continue;
    const float p = std::exp(row.log_probs[i]);
    const T* const e = embedding + row.ids[i] * stride;
    const float length = length_of(e, width);
    squares += p * p;
    rows.push_back(e);
    scales.push_back(p / std::sqrt(length == 0.0f ? 1.0f : length));
  }
  return squares - length_of(rows.data(), scales.data(), rows.size(), width);
}

std::tuple<Tensor, Tensor> branch_select(Tensor log_probs, Tensor ids, Tensor entropy,
                                         std::optional<Tensor> embedding, int64_t m, int64_t top,
                                         double tau_abs, double tau_rel) {
  RLK_CHECK_CPU(log_probs);
  RLK_CHECK_DTYPE(log_probs, Float);
  RLK_CHECK_DIM(log_probs, 2);
  RLK_CHECK_CONTIGUOUS(log_probs);
  const int64_t rows = log_probs.size(0), count = log_probs.size(1);
  RLK_CHECK_DTYPE(ids, Long);
  RLK_CHECK_DIM(ids, 2);
  RLK_CHECK_SIZE(ids, 0, rows);
  RLK_CHECK_SIZE(ids, 1, count);
  RLK_CHECK_CONTIGUOUS(ids);
  RLK_CHECK_DTYPE(entropy, Float);
  RLK_CHECK_SIZE(entropy, 0, rows);
  RLK_CHECK_CONTIGUOUS(entropy);
  STD_TORCH_CHECK(m >= 1 && m <= count && top >= 0 && top <= count,
                  "m and top must be at most the number of log-probs, ", count);
  using torch::headeronly::ScalarType;
  Tensor branch = torch::stable::new_empty(log_probs, {rows, m}, ScalarType::Bool);
  Tensor diversity = torch::stable::new_empty(log_probs, {embedding ? rows : 0});
  const float* values = log_probs.const_data_ptr<float>();
  const int64_t* tokens = ids.const_data_ptr<int64_t>();
  bool* passes = branch.mutable_data_ptr<bool>();
  const float least = static_cast<float>(tau_abs), apart = static_cast<float>(tau_rel);
  for (int64_t i = 0; i < rows; ++i) {
    const float largest = std::exp(values[i * count]);
    for (int64_t j = 0; j < m; ++j) {
      const float p = std::exp(values[i * count + j]);
      passes[i * m + j] = j > 0 && p > least && largest - p < apart && tokens[i * count + j] >= 0;
    }
  }
  if (!embedding) return {branch, diversity};
  RLK_CHECK_CPU(*embedding);
  RLK_CHECK_DIM(*embedding, 2);
  const int64_t vocab = embedding->size(0), width = embedding->size(1);
  STD_TORCH_CHECK(width <= 1 || embedding->stride(1) == 1, "embedding must have contiguous rows");
  const float* h = entropy.const_data_ptr<float>();
  float* out = diversity.mutable_data_ptr<float>();
  RLK_DISPATCH_FLOAT(*embedding, T, {
    const T* table = embedding->const_data_ptr<T>();
    const int64_t stride = embedding->stride(0);
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, top * width));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<const T*> chosen;
      std::vector<float> scales;
      for (int64_t i = begin; i < end; ++i) {
        const Candidates row{values + i * count, tokens + i * count, top};
        out[i] = h[i] * diversity_of(row, table, vocab, stride, width, chosen, scales);
      }
    });
  });
  return {branch, diversity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("branch_select", TORCH_BOX(&branch_select)); }

}  // namespace rlkern
