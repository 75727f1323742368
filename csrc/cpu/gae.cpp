// Generalised advantage estimation: a thread a sequence, from its last token to its first.
#include "rlkern/math/gae.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "segments.h"

namespace rlkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A thread is worth starting for about this many tokens.
constexpr int64_t kGrain = 8192;

// raw: where whitening will read the advantages from; null: they are final.
template <class T>
ShiftedSums sequence_back(const GaeParams& params, const T* rewards, const T* values,
                          const bool* mask, int64_t length, T* advantages, T* returns,
                          double* raw) {
  GaeCarry carry;
  ShiftedSums sums;
  for (int64_t i = length - 1; i >= 0; --i) {
    if (mask && !mask[i]) {
      advantages[i] = returns[i] = T(0);
      continue;
    }
    carry.step(params, static_cast<double>(rewards[i]), static_cast<double>(values[i]));
    returns[i] = static_cast<T>(carry.advantage + carry.value);
    advantages[i] = static_cast<T>(carry.advantage);
    if (raw) {
      raw[i] = carry.advantage;
      sums.push(carry.advantage);
    }
  }
  return sums;
}

template <class T>
void run(const GaeParams& params, const Tensor& rewards, const Tensor& values, const bool* mask,
         const Segments& segments, bool whiten, Tensor& advantages, Tensor& returns) {
  const int64_t tokens = rewards.size(0), num = segments.count();
  const T *reward = rewards.const_data_ptr<T>(), *value = values.const_data_ptr<T>();
  T *advantage = advantages.mutable_data_ptr<T>(), *result = returns.mutable_data_ptr<T>();
  // tokens outside of all sequences
  std::fill_n(advantage, tokens, T(0));
  std::fill_n(result, tokens, T(0));
  std::vector<double> raw(whiten ? tokens : 0);
  std::vector<ShiftedSums> sums(num);
  const auto all_sequences = [&](auto&& work) {
    torch::stable::parallel_for(0, num, segments.grain(kGrain), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(i, segments.begin(i), segments.length(i));
    });
  };
  all_sequences([&](int64_t i, int64_t at, int64_t length) {
    sums[i] = sequence_back(params, reward + at, value + at, mask ? mask + at : nullptr, length,
                            advantage + at, result + at, whiten ? raw.data() + at : nullptr);
  });
  if (!whiten) return;
  int64_t count = 0;
  double total = 0.0, squares = 0.0;
  for (const ShiftedSums& s : sums) {
    count += s.count;
    total += s.total();
  }
  const double mean = total / static_cast<double>(std::max<int64_t>(1, count));
  for (const ShiftedSums& s : sums) squares += s.squares_about(mean);
  const double scale = whitening_scale(squares, count);
  all_sequences([&](int64_t, int64_t at, int64_t length) {
    for (int64_t j = at; j < at + length; ++j)
      if (!mask || mask[j]) advantage[j] = static_cast<T>((raw[j] - mean) * scale);
  });
}

std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, Tensor cu_seqlens,
                               std::optional<Tensor> mask, double gamma, double lam, bool whiten) {
  RLK_CHECK_CPU(rewards);
  RLK_CHECK_DIM(rewards, 1);
  RLK_CHECK_CONTIGUOUS(rewards);
  const int64_t tokens = rewards.size(0);
  RLK_CHECK_CPU(values);
  RLK_CHECK_DIM(values, 1);
  RLK_CHECK_SIZE(values, 0, tokens);
  RLK_CHECK_CONTIGUOUS(values);
  STD_TORCH_CHECK(values.scalar_type() == rewards.scalar_type(),
                  "values must have the dtype of rewards");
  if (mask.has_value()) {
    RLK_CHECK_CPU(*mask);
    RLK_CHECK_DTYPE(*mask, Bool);
    RLK_CHECK_DIM(*mask, 1);
    RLK_CHECK_SIZE(*mask, 0, tokens);
    RLK_CHECK_CONTIGUOUS(*mask);
  }
  const Segments segments(cu_seqlens, tokens);
  const bool* counts = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  const GaeParams params{gamma, gamma * lam};
  Tensor advantages = torch::stable::new_empty(rewards, {tokens});
  Tensor returns = torch::stable::new_empty(rewards, {tokens});
  if (rewards.scalar_type() == ScalarType::Double) {
    run<double>(params, rewards, values, counts, segments, whiten, advantages, returns);
  } else {
    RLK_CHECK_DTYPE(rewards, Float);
    run<float>(params, rewards, values, counts, segments, whiten, advantages, returns);
  }
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace rlkern
