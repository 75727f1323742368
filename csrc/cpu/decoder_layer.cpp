// A decoder layer of Llama's kind over packed tokens, in one call: what it is made of takes less
// time in a decode step than the calls from Python would. Rounds where rlkern/rollout/layer.py
// does.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "check.h"
#include "decoder.h"
#include "dispatch.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

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

// x + y
template <class T>
struct Add {
  static RLK_HD f32x16 of(f32x16 x, f32x16 y) { return x + y; }
};

// silu(x) y
template <class T>
struct Gate {
  static RLK_HD f32x16 of(f32x16 x, f32x16 y) { return rounded<T>(x / (1.0f + exp(-x))) * y; }
};

// x[i] = f(x[i], y[i])
template <class F, class T>
RLK_HD void each(T* x, const T* y, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(x + i, F::of(load(x + i), load(y + i)));
  if (i < end)
    store_partial(x + i,
                  F::of(load_partial(x + i, end - i, 0.0f), load_partial(y + i, end - i, 0.0f)),
                  end - i);
}

#define RLK_CLONES(F, T)                                                             \
  RLK_MULTIVERSION void clones(F<T>, T* x, const T* y, int64_t begin, int64_t end) { \
    each<F<T>>(x, y, begin, end);                                                    \
  }
RLK_CLONES(Add, float)
RLK_CLONES(Add, bf16)
RLK_CLONES(Add, fp16)
RLK_CLONES(Gate, float)
RLK_CLONES(Gate, bf16)
RLK_CLONES(Gate, fp16)

template <template <class> class F>
void combine(const Tensor& x, const Tensor& y) {
  RLK_DISPATCH_FLOAT(x, T, {
    T* const to = x.mutable_data_ptr<T>();
    const T* const from = y.const_data_ptr<T>();
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      clones(F<T>{}, to, from, begin, end);
    });
  });
}

Tensor decoder_layer(Tensor x, Tensor norm_1, Tensor norm_2, Maybe q_norm, Maybe k_norm, double eps,
                     Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor o_weight,
                     Tensor gate_weight, Tensor up_weight, Tensor down_weight, Maybe q_bias,
                     Maybe k_bias, Maybe v_bias, Maybe o_bias, Maybe gate_bias, Maybe up_bias,
                     Maybe down_bias, Tensor cos, Tensor sin, Tensor write_slots, Tensor k_cache,
                     Tensor v_cache, Tensor rows, Tensor items, Tensor slots, Tensor trees,
                     Tensor parts, Tensor part_offsets, int64_t chunk, int64_t max_rows,
                     double scale) {
  RLK_CHECK_DIM(x, 2);
  RLK_CHECK_DIM(k_cache, 4);
  const int64_t tokens = x.size(0), width = k_cache.size(3), kv_heads = k_cache.size(2);
  RLK_CHECK_SIZE(k_weight, 0, kv_heads * width);
  RLK_CHECK_SIZE(v_weight, 0, kv_heads * width);
  const int64_t heads = q_weight.size(0) / width;
  const auto project = [&](const Tensor& weight, const Maybe& bias, const Tensor& from,
                           int64_t count) {
    return torch::stable::view(decoder_linear(from, weight, bias), {tokens, count, width});
  };
  const Tensor h = rms_norm(x, norm_1, eps, {}, {});
  const Tensor q = rms_norm(project(q_weight, q_bias, h, heads), q_norm, eps, cos, sin);
  const Tensor k = rms_norm(project(k_weight, k_bias, h, kv_heads), k_norm, eps, cos, sin);
  write_kv(k, project(v_weight, v_bias, h, kv_heads), write_slots, k_cache, v_cache, {}, {});
  const Tensor read = std::get<0>(tree_attention(q, k_cache, v_cache, rows, items, slots, trees,
                                                 parts, part_offsets, chunk, max_rows, scale, 0.0));
  const Tensor middle =
      decoder_linear(torch::stable::view(read, {tokens, heads * width}), o_weight, o_bias);
  combine<Add>(middle, x);
  const Tensor wide = rms_norm(middle, norm_2, eps, {}, {});
  const Tensor gate = decoder_linear(wide, gate_weight, gate_bias);
  combine<Gate>(gate, decoder_linear(wide, up_weight, up_bias));
  Tensor out = decoder_linear(gate, down_weight, down_bias);
  combine<Add>(out, middle);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }

}  // namespace rlkern
