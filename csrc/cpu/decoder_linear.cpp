// Linear layers of a decode step. Of few rows torch's float32 product takes up to three times as
// long as this: it packs the weight first. Here four rows of the weight are read where they lie,
// for four rows of x at a time. More rows, other dtypes and CPUs without AVX-512 are torch's.
//
// An element is sixteen sums over every sixteenth term, added up in a tree: whatever other rows and
// threads there are.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "decoder.h"
#include "isa.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where it is the faster one, measured within decode steps.
constexpr int64_t kFewRows = 64;
constexpr int64_t kDepth = 128;
// Multiplications that make a thread worth starting.
constexpr int64_t kGrain = 1 << 16;
// Rows of x, and of the weight, that are multiplied at once.
constexpr int kTile = 4;

#if defined(__x86_64__)
#define RLK_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))

// Adds lanes that lie kStep apart: of a where bit kStep of a lane is clear, of b where it is set.
template <int kStep, int... kLane>
RLK_TARGET static inline __attribute__((always_inline)) f32x16
add_lanes(f32x16 a, f32x16 b, std::integer_sequence<int, kLane...>) {
  const f32x16 low =
      __builtin_shuffle(a, b, i32x16{((kLane & kStep) ? kLane - kStep + kLanes : kLane)...});
  const f32x16 high =
      __builtin_shuffle(a, b, i32x16{((kLane & kStep) ? kLane + kLanes : kLane + kStep)...});
  return low + high;
}

// Sixteen vectors -> x[0], whose lane i is the sum of x[i].
template <int kStep>
RLK_TARGET static inline __attribute__((always_inline)) void add_up(f32x16 (&x)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i)
    x[i] = add_lanes<kStep>(x[i], x[i + kStep], std::make_integer_sequence<int, kLanes>{});
  if constexpr (kStep > 1) add_up<kStep / 2>(x);
}

// out[i] = x[i / 4] . w[i % 4] for four rows of x, and four of the weight. Rows of x go on with
// zeros.
RLK_TARGET static __attribute__((noinline)) void tile(const float* x, int64_t stride,
                                                      const float* w, int64_t depth, float* out) {
  f32x16 acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = f32x16{};
  const auto step = [&](int64_t k, const f32x16(&columns)[kTile]) RLK_TARGET {
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      const f32x16 row = load(x + r * stride + k);
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) acc[r * kTile + n] += row * columns[n];
    }
  };
  f32x16 columns[kTile];
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
#pragma GCC unroll 4
    for (int n = 0; n < kTile; ++n) columns[n] = load(w + n * depth + k);
#pragma GCC unroll 4
    for (int n = 0; n < kTile; ++n) __builtin_prefetch(w + (n + kTile) * depth + k, 0, 2);
    step(k, columns);
  }
  if (k < depth) {
    for (int n = 0; n < kTile; ++n) columns[n] = load_partial(w + n * depth + k, depth - k, 0.0f);
    step(k, columns);
  }
  add_up<kLanes / 2>(acc);
  store(out, acc[0]);
}

Tensor few_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  // an odd number of cache lines: rows that are a power of two apart share few places in cache
  const int64_t stride = (depth + kLanes - 1) / kLanes * kLanes | kLanes;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  std::vector<float> copy(tiles * kTile * stride);
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(x.const_data_ptr<float>() + r * depth, depth, copy.data() + r * stride);
  const float* const w = weight.const_data_ptr<float>();
  const float* const b = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  float* const to = out.mutable_data_ptr<float>();
  const int64_t work = kTile * tiles * kTile * stride;
  torch::stable::parallel_for(
      0, columns / kTile, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
      [&](int64_t begin, int64_t end) {
        float sums[kLanes];
        for (int64_t n = begin * kTile; n < end * kTile; n += kTile) {
          const f32x4 offset = b ? load_as<f32x4>(b + n) : f32x4{};
          for (int64_t r = 0; r < rows; r += kTile) {
            tile(copy.data() + r * stride, stride, w + n * depth, depth, sums);
            for (int64_t i = 0; i < std::min<int64_t>(kTile, rows - r); ++i)
              store_as(to + (r + i) * columns + n, load_as<f32x4>(sums + i * kTile) + offset);
          }
        }
      });
  return out;
}

bool is_few(const Tensor& x, const Tensor& weight) {
  return x.size(0) <= kFewRows && x.size(1) >= kDepth && weight.size(0) % kTile == 0 &&
         cpu_isa() >= Isa::kAvx512 && x.scalar_type() == ScalarType::Float;
}
#else
bool is_few(const Tensor&, const Tensor&) { return false; }
#endif

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor decoder_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  RLK_CHECK_CPU(x);
  RLK_CHECK_DIM(x, 2);
  RLK_CHECK_CONTIGUOUS(x);
  RLK_CHECK_CPU(weight);
  RLK_CHECK_DIM(weight, 2);
  RLK_CHECK_SIZE(weight, 1, x.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  if (bias.has_value()) {
    RLK_CHECK_DIM(*bias, 1);
    RLK_CHECK_SIZE(*bias, 0, weight.size(0));
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias must have the dtype of x");
  }
  if (!is_few(x, weight) || !weight.is_contiguous() || (bias.has_value() && !bias->is_contiguous()))
    return torch_linear(x, weight, bias);
#if defined(__x86_64__)
  return few_rows(x, weight, bias);
#else
  return torch_linear(x, weight, bias);
#endif
}

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("decoder_linear", TORCH_BOX(&decoder_linear)); }

}  // namespace rlkern
