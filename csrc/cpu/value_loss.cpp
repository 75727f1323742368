// Clipped value loss, its gradient and metrics in one pass: a thread a sequence, whose sums are
// added in the order of the sequences.
#include "rlkern/math/value_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
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
constexpr int kLanes = 8;

// The schema's `denominator`: NOTHING, TOKENS, ... in reference.py.
enum Denominator : int64_t { kNothing, kTokens, kFilledSequences, kAllSequences };

struct Sums {
  double loss = 0.0, clipped = 0.0, value = 0.0;
};

struct Inputs {
  const float *values, *returns;
  const float* old_values;  // null: not clipped
  const bool* mask;         // null: all tokens count
  float width;
};

// Eight running sums of each kind, so that one addition does not wait for the last.
RLK_HD Sums sequence_sums(const Inputs& in, int64_t begin, int64_t length, float weight,
                          float* grad) {
  double loss[kLanes] = {}, clipped[kLanes] = {}, value[kLanes] = {};
  for (int64_t base = 0; base < length; base += kLanes) {
    const int64_t size = std::min<int64_t>(kLanes, length - base);
    for (int64_t j = 0; j < size; ++j) {
      const int64_t i = begin + base + j;
      const bool counts = !in.mask || in.mask[i];
      const float v = counts ? in.values[i] : 0.0f, r = counts ? in.returns[i] : 0.0f;
      const float old = in.old_values ? (counts ? in.old_values[i] : 0.0f) : v;
      const ValueTerm t = value_term(v, r, old, in.width);
      loss[j] += t.squared;
      clipped[j] += t.clipped;
      value[j] += v;
      if (grad) grad[i] = t.clipped || !counts ? 0.0f : weight * t.error;
    }
  }
  Sums sums;
  for (int j = 0; j < kLanes; ++j) {
    sums.loss += loss[j];
    sums.clipped += clipped[j];
    sums.value += value[j];
  }
  return sums;
}

RLK_MULTIVERSION Sums run_sequence(const Inputs& in, int64_t begin, int64_t length, float weight,
                                   float* grad) {
  return sequence_sums(in, begin, length, weight, grad);
}

void check_tokens(const Tensor& t, int64_t tokens) {
  RLK_CHECK_CPU(t);
  RLK_CHECK_DTYPE(t, Float);
  RLK_CHECK_DIM(t, 1);
  RLK_CHECK_SIZE(t, 0, tokens);
  RLK_CHECK_CONTIGUOUS(t);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor values, Tensor returns,
                                           std::optional<Tensor> old_values, Tensor cu_seqlens,
                                           std::optional<Tensor> mask, double cliprange,
                                           int64_t denominator, bool divide_by_length, double scale,
                                           bool want_grad) {
  const int64_t tokens = values.numel();
  check_tokens(values, tokens);
  check_tokens(returns, tokens);
  if (old_values.has_value()) check_tokens(*old_values, tokens);
  if (mask.has_value()) {
    RLK_CHECK_CPU(*mask);
    RLK_CHECK_DTYPE(*mask, Bool);
    RLK_CHECK_DIM(*mask, 1);
    RLK_CHECK_SIZE(*mask, 0, tokens);
    RLK_CHECK_CONTIGUOUS(*mask);
  }
  const Segments segments(cu_seqlens, tokens);
  const int64_t num = segments.count();
  const Inputs in{values.const_data_ptr<float>(), returns.const_data_ptr<float>(),
                  old_values.has_value() ? old_values->const_data_ptr<float>() : nullptr,
                  mask.has_value() ? mask->const_data_ptr<bool>() : nullptr,
                  static_cast<float>(cliprange)};

  std::vector<int64_t> lengths(num);
  int64_t count = 0, filled = 0;
  for (int64_t i = 0; i < num; ++i) {
    const int64_t begin = segments.begin(i), length = segments.length(i);
    lengths[i] = in.mask ? std::count(in.mask + begin, in.mask + begin + length, true) : length;
    count += lengths[i];
    filled += lengths[i] > 0;
  }
  const int64_t divisors[] = {1, count, filled, num};
  STD_TORCH_CHECK(denominator >= kNothing && denominator <= kAllSequences,
                  "denominator must be in [0, 4), got ", denominator);
  const double shared = scale / static_cast<double>(std::max<int64_t>(1, divisors[denominator]));

  Tensor grad = torch::stable::new_empty(values, {want_grad ? tokens : 0});
  float* grad_out = want_grad ? grad.mutable_data_ptr<float>() : nullptr;
  // tokens outside of all sequences
  if (want_grad) std::fill_n(grad_out, tokens, 0.0f);
  std::vector<Sums> sums(num);
  std::vector<double> weights(num);
  torch::stable::parallel_for(0, num, segments.grain(kGrain), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t own = divide_by_length ? std::max<int64_t>(1, lengths[i]) : 1;
      weights[i] = shared / static_cast<double>(own);
      sums[i] = run_sequence(in, segments.begin(i), segments.length(i),
                             static_cast<float>(weights[i]), grad_out);
    }
  });

  Sums all;
  for (int64_t i = 0; i < num; ++i) {
    all.loss += weights[i] * sums[i].loss;
    all.clipped += sums[i].clipped;
    all.value += sums[i].value;
  }
  Tensor loss = torch::stable::new_empty(values, {});
  Tensor metrics = torch::stable::new_empty(values, {3});
  *loss.mutable_data_ptr<float>() = static_cast<float>(0.5 * all.loss);
  float* out = metrics.mutable_data_ptr<float>();
  const double share = 1.0 / static_cast<double>(std::max<int64_t>(1, count));
  out[0] = static_cast<float>(count);
  out[1] = static_cast<float>(all.clipped * share);
  out[2] = static_cast<float>(all.value * share);
  return {loss, metrics, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("value_loss_fwd", TORCH_BOX(&forward)); }

}  // namespace rlkern
