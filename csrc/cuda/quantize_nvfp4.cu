// Registration of quantize_nvfp4 on CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "quantize_nvfp4.cuh"
#include "stream.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor w, std::optional<Tensor> amax,
                                                   std::optional<Tensor> previous, int64_t recipe,
                                                   bool square, int64_t rule, bool stochastic,
                                                   int64_t seed, bool statistics) {
  RLK_CHECK_CUDA(w);
  RLK_CHECK_DIM(w, 2);
  RLK_CHECK_CONTIGUOUS(w);
  const int64_t rows = w.size(0), columns = w.size(1);
  STD_TORCH_CHECK(columns % kChunk == 0, "w must have a multiple of 16 columns, got ", columns);
  STD_TORCH_CHECK(recipe >= kTe && recipe <= kFouroversix, "recipe must be in [0, 5], got ",
                  recipe);
  STD_TORCH_CHECK(rule >= kNone && rule <= kMagnitudes, "rule must be in [0, 2], got ", rule);
  STD_TORCH_CHECK(rule == kNone || ((recipe == kTe || recipe == kFouroversix) && !square),
                  "rule needs recipe 0 or 5 and 1x16 blocks");
  STD_TORCH_CHECK(!stochastic || rule == kNone, "four over six rounds to nearest");
  if (amax.has_value()) {
    RLK_CHECK_CUDA(*amax);
    RLK_CHECK_DTYPE(*amax, Float);
    STD_TORCH_CHECK(amax->numel() == 1, "amax must be one number");
  }
  if (previous.has_value()) {
    RLK_CHECK_CUDA(*previous);
    RLK_CHECK_DTYPE(*previous, Byte);
    RLK_CHECK_CONTIGUOUS(*previous);
    STD_TORCH_CHECK(previous->numel() == rows * columns / 2,
                    "previous must have a byte for two of w");
  }
  const OnDevice on(w);
  using torch::headeronly::ScalarType;
  Tensor codes = torch::stable::new_empty(w, {rows, columns / 2}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(w, {rows, columns / kChunk}, ScalarType::Byte);
  Tensor decode = torch::stable::new_empty(w, {}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(w, {statistics ? Counts::kNum : 0}, ScalarType::Double);
  const int64_t num_rows = statistics ? nvfp4_grid(rows, columns, square) : 0;
  Tensor counts = torch::stable::new_empty(w, {num_rows, Counts::kNum}, ScalarType::Float);
  Tensor most = torch::stable::new_zeros(w, {amax.has_value() ? 0 : 1}, ScalarType::Int);
  int32_t* found = amax.has_value() ? nullptr : most.mutable_data_ptr<int32_t>();
  RLK_DISPATCH_FLOAT(w, T, {
    Nvfp4Args<T> a{};
    a.w = w.const_data_ptr<T>();
    a.amax = found ? reinterpret_cast<const float*>(found) : amax->const_data_ptr<float>();
    a.previous = previous.has_value() ? previous->const_data_ptr<uint8_t>() : nullptr;
    a.codes = codes.mutable_data_ptr<uint8_t>();
    a.scales = scales.mutable_data_ptr<uint8_t>();
    a.decode = decode.mutable_data_ptr<float>();
    a.counts = statistics ? counts.mutable_data_ptr<float>() : nullptr;
    a.rows = rows;
    a.columns = columns;
    a.recipe = recipe;
    a.rule = rule;
    a.stochastic = stochastic;
    a.seed = static_cast<uint64_t>(seed);
    quantize_nvfp4(a, square, found, statistics ? sums.mutable_data_ptr<double>() : nullptr,
                   on.stream);
  });
  check_launch();
  return {codes, scales, decode, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CUDA, m) { m.impl("quantize_nvfp4", TORCH_BOX(&forward)); }

}  // namespace rlkern
