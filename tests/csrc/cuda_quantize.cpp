// The CUDA quantisers as functions of plain C, for test_cuda_kernels.py to call without a GPU.
#include "cuda_on_cpu.h"
//
#include "../../csrc/cuda/quantize_fp8.cuh"
#include "../../csrc/cuda/quantize_nvfp4.cuh"

namespace {

template <class Run>
void by_dtype(int dtype, Run run) {
  if (dtype == 0) run(float{});
  if (dtype == 1) run(c10::BFloat16{});
  if (dtype == 2) run(c10::Half{});
}

}  // namespace

extern "C" {

int64_t rlk_fp8_grid(int64_t high, int64_t wide, int64_t rows, int64_t columns) {
  return rlkern::fp8_grid(rlkern::fp8_shape(high, wide), rows, columns);
}
int64_t rlk_nvfp4_grid(int64_t rows, int64_t columns, bool square) {
  return rlkern::nvfp4_grid(rows, columns, square);
}

void rlk_quantize_fp8(int dtype, const void* w, const float* amax, const uint8_t* previous,
                      uint8_t* codes, float* scales, uint8_t* byte_scales, float* counts,
                      int64_t rows, int64_t columns, int64_t high, int64_t wide, int64_t order,
                      float amax_floor, float scale_floor, float zero_scale, bool power_of_two,
                      int32_t* most, double* sums) {
  by_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    rlkern::Fp8Args<T> a{};
    a.w = static_cast<const T*>(w);
    a.amax = amax ? amax : reinterpret_cast<const float*>(most);
    a.previous = previous;
    a.codes = codes;
    a.scales = scales;
    a.byte_scales = byte_scales;
    a.counts = counts;
    a.rows = rows;
    a.columns = columns;
    a.rule = {order, amax_floor, scale_floor, zero_scale, power_of_two};
    rlkern::quantize_fp8(a, rlkern::fp8_shape(high, wide), most, sums, 0);
  });
}

void rlk_quantize_nvfp4(int dtype, const void* w, const float* amax, const uint8_t* previous,
                        uint8_t* codes, uint8_t* scales, float* decode, float* counts, int64_t rows,
                        int64_t columns, int64_t recipe, bool square, int64_t rule, bool stochastic,
                        int64_t seed, int32_t* most, double* sums) {
  by_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    rlkern::Nvfp4Args<T> a{};
    a.w = static_cast<const T*>(w);
    a.amax = amax ? amax : reinterpret_cast<const float*>(most);
    a.previous = previous;
    a.codes = codes;
    a.scales = scales;
    a.decode = decode;
    a.counts = counts;
    a.rows = rows;
    a.columns = columns;
    a.recipe = recipe;
    a.rule = rule;
    a.stochastic = stochastic;
    a.seed = static_cast<uint64_t>(seed);
    rlkern::quantize_nvfp4(a, square, most, sums, 0);
  });
}
}
