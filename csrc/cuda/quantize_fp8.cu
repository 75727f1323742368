// Registration of quantize_fp8 on CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "quantize_fp8.cuh"
#include "stream.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> forward(Tensor w, std::optional<Tensor> amax,
                                           std::optional<Tensor> previous, int64_t high,
                                           int64_t wide, int64_t order, double amax_floor,
                                           double scale_floor, double zero_scale, bool power_of_two,
                                           bool statistics) {
  RLK_CHECK_CUDA(w);
  RLK_CHECK_DIM(w, 2);
  RLK_CHECK_CONTIGUOUS(w);
  STD_TORCH_CHECK(order >= kDivide && order <= kEven, "order must be in [0, 7], got ", order);
  const Fp8Shape shape = fp8_shape(high, wide);
  STD_TORCH_CHECK(shape != Fp8Shape::kNone, "no kernel has blocks of ", high, " x ", wide);
  const int64_t rows = w.size(0), columns = w.size(1);
  const bool whole = shape == Fp8Shape::kTensor;
  if (amax.has_value()) {
    RLK_CHECK_CUDA(*amax);
    RLK_CHECK_DTYPE(*amax, Float);
    STD_TORCH_CHECK(amax->numel() == 1 && whole, "amax must be one number, of one block");
  }
  if (previous.has_value()) {
    RLK_CHECK_CUDA(*previous);
    RLK_CHECK_DTYPE(*previous, Byte);
    RLK_CHECK_CONTIGUOUS(*previous);
    STD_TORCH_CHECK(previous->numel() == rows * columns,
                    "previous must have an element for each of w");
  }
  const OnDevice on(w);
  using torch::headeronly::ScalarType;
  const int64_t down = high ? ceil_div(rows, high) : std::min<int64_t>(rows, 1);
  const int64_t across = wide ? ceil_div(columns, wide) : std::min<int64_t>(columns, 1);
  const bool bytes = has_byte_scales(order), finds = whole && !amax.has_value();
  Tensor codes = torch::stable::new_empty(w, {rows, columns}, ScalarType::Byte);
  Tensor scales =
      torch::stable::new_empty(w, {down, across}, bytes ? ScalarType::Byte : ScalarType::Float);
  Tensor sums = torch::stable::new_empty(w, {statistics ? Counts::kNum : 0}, ScalarType::Double);
  const int64_t num_rows = statistics ? fp8_grid(shape, rows, columns) : 0;
  Tensor counts = torch::stable::new_empty(w, {num_rows, Counts::kNum}, ScalarType::Float);
  Tensor most = torch::stable::new_zeros(w, {finds ? 1 : 0}, ScalarType::Int);
  int32_t* found = finds ? most.mutable_data_ptr<int32_t>() : nullptr;
  RLK_DISPATCH_FLOAT(w, T, {
    Fp8Args<T> a{};
    a.w = w.const_data_ptr<T>();
    if (whole)
      a.amax = found ? reinterpret_cast<const float*>(found) : amax->const_data_ptr<float>();
    a.previous = previous.has_value() ? previous->const_data_ptr<uint8_t>() : nullptr;
    a.codes = codes.mutable_data_ptr<uint8_t>();
    a.scales = bytes ? nullptr : scales.mutable_data_ptr<float>();
    a.byte_scales = bytes ? scales.mutable_data_ptr<uint8_t>() : nullptr;
    a.counts = statistics ? counts.mutable_data_ptr<float>() : nullptr;
    a.rows = rows;
    a.columns = columns;
    a.rule = {order, static_cast<float>(amax_floor), static_cast<float>(scale_floor),
              static_cast<float>(zero_scale), power_of_two};
    quantize_fp8(a, shape, found, statistics ? sums.mutable_data_ptr<double>() : nullptr,
                 on.stream);
  });
  check_launch();
  return {codes, scales, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CUDA, m) { m.impl("quantize_fp8", TORCH_BOX(&forward)); }

}  // namespace rlkern
