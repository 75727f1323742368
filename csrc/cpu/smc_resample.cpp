// Systematic resampling, group by group: a group's rows in order, all sums in float64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

#include "check.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 16;

struct Group {
  const float* log_weights;
  int64_t first, count;
  double u;
  int64_t* parents;
  float* new_log_weights;

  // The effective sample size; resamples where it is below share * count.
  float resample(double share) const {
    keep();
    double top = -INFINITY, total = 0.0, squares = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const double x = log_weights[j];
      if (std::isnan(x) || x == INFINITY) return NAN;
      top = std::max(top, x);
    }
    if (top == -INFINITY) return 0.0f;
    for (int64_t j = 0; j < count; ++j) {
      const double w = std::exp(log_weights[j] - top);
      total += w;
      squares += w * w;
    }
    const double size = total * total / squares, n = static_cast<double>(count);
    if (!(size < share * n)) return static_cast<float>(size);
    double sum = 0.0;
    int64_t child = 0, last = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double w = std::exp(log_weights[j] - top);
      if (w == 0.0) continue;
      sum += w;
      last = j;
      const double until = std::ceil(sum / total * n - u);
      for (; child < count && static_cast<double>(child) < until; ++child)
        parents[child] = first + j;
    }
    // of a running sum that rounds to less than the total
    for (; child < count; ++child) parents[child] = first + last;
    std::fill_n(new_log_weights, count, static_cast<float>(top + std::log(total / n)));
    return static_cast<float>(size);
  }

 private:
  void keep() const {
    for (int64_t j = 0; j < count; ++j) {
      parents[j] = first + j;
      new_log_weights[j] = log_weights[j];
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> smc_resample(Tensor log_weights, Tensor u, Tensor cu_seqlens,
                                                double ess_threshold) {
  RLK_CHECK_CPU(log_weights);
  RLK_CHECK_DTYPE(log_weights, Float);
  RLK_CHECK_DIM(log_weights, 1);
  RLK_CHECK_CONTIGUOUS(log_weights);
  RLK_CHECK_DTYPE(cu_seqlens, Long);
  RLK_CHECK_DIM(cu_seqlens, 1);
  RLK_CHECK_CONTIGUOUS(cu_seqlens);
  const int64_t rows = log_weights.size(0), groups = cu_seqlens.size(0) - 1;
  RLK_CHECK_DTYPE(u, Float);
  RLK_CHECK_SIZE(u, 0, groups);
  RLK_CHECK_CONTIGUOUS(u);
  using torch::headeronly::ScalarType;
  Tensor parents = torch::stable::new_empty(log_weights, {rows}, ScalarType::Long);
  Tensor ess = torch::stable::new_empty(log_weights, {groups}, ScalarType::Float);
  Tensor weights = torch::stable::new_empty(log_weights, {rows}, ScalarType::Float);
  const float* from = log_weights.const_data_ptr<float>();
  const float* offsets = u.const_data_ptr<float>();
  const int64_t* bounds = cu_seqlens.const_data_ptr<int64_t>();
  int64_t* parent_out = parents.mutable_data_ptr<int64_t>();
  float* ess_out = ess.mutable_data_ptr<float>();
  float* weight_out = weights.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, groups, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = std::clamp<int64_t>(bounds[g], 0, rows);
      const int64_t stop = std::clamp<int64_t>(bounds[g + 1], first, rows);
      const Group group{from + first,      first, stop - first, offsets[g], parent_out + first,
                        weight_out + first};
      ess_out[g] = group.resample(ess_threshold);
    }
  });
  return {parents, ess, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("smc_resample", TORCH_BOX(&smc_resample)); }

}  // namespace rlkern
