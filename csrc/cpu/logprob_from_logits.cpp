// Log-prob, logsumexp and entropy of given logits: each logit is read once, and each gradient
// written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "dispatch.h"
#include "isa.h"
#include "rlkern/math/softcap.h"
#include "rlkern/math/softmax_stats.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// 8 KiB of floats: read for the maximum, then again from L1 for the sums.
constexpr int64_t kBlock = 2048;

// Logits as the softmax sees them; past `left` there are none.
template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);

template <class V, bool kCap, class T>
RLK_HD V load_logits(const T* p, int64_t left, Softcap softcap) {
  V x = V{} - INFINITY;
  if (left >= kWidth<V>)
    x = widen<V>(p);
  else
    for (int64_t i = 0; i < left; ++i) x[i] = static_cast<float>(p[i]);
  if constexpr (kCap) {
    x = softcap.apply(x);
    for (int64_t i = left; i < kWidth<V>; ++i) x[i] = -INFINITY;
  }
  return x;
}

template <class V, bool kCap, class T>
RLK_HD SoftmaxStats block_stats(const T* row, int64_t count, float inv, Softcap softcap) {
  V top = V{} - INFINITY;
  for (int64_t j = 0; j < count; j += kWidth<V>)
    top = vmax(load_logits<V, kCap>(row + j, count - j, softcap), top);
  SoftmaxStats stats;
  stats.max = reduce_max(top);
  // All -inf: nothing to add. The sums start from a finite maximum, else -inf - -inf is NaN.
  if (stats.max == -INFINITY) {
    for (int64_t j = 0; j < count; ++j)
      if (std::isnan(static_cast<float>(row[j]))) stats.sum = NAN;
    return stats;
  }
  V sum{}, dot{};
  for (int64_t j = 0; j < count; j += kWidth<V>) {
    V d = (load_logits<V, kCap>(row + j, count - j, softcap) - stats.max) * inv;
    d = at_least(d, kExpUnderflow);
    const V e = exp(d);
    sum += e;
    dot += e * d;
  }
  stats.sum = reduce_add(sum);
  stats.dot = reduce_add(dot);
  return stats;
}

template <class V, bool kCap, class T>
RLK_HD SoftmaxStats row_stats(const T* row, int64_t vocab, float inv, Softcap softcap) {
  SoftmaxStats stats;
  for (int64_t j = 0; j < vocab; j += kBlock)
    stats.merge(block_stats<V, kCap>(row + j, std::min(kBlock, vocab - j), inv, softcap), inv);
  return stats;
}

template <class V, bool kCap, class T>
RLK_HD void row_grad(const T* row, T* grad, int64_t vocab, float inv, float logsumexp,
                     SoftmaxGrad g, Softcap softcap) {
  for (int64_t j = 0; j < vocab; j += kWidth<V>) {
    const int64_t left = vocab - j;
    const V y = load_logits<V, kCap>(row + j, left, softcap);
    V d = g.off_target(y * inv - logsumexp) * inv;
    if constexpr (kCap) d *= softcap.slope(y);
    if (left >= kWidth<V>)
      store(grad + j, d);
    else
      store_partial(grad + j, d, left);
  }
}

template <class V, class T>
RLK_HD SoftmaxStats any_stats(const T* row, int64_t vocab, float inv, Softcap softcap) {
  return softcap.on() ? row_stats<V, true>(row, vocab, inv, softcap)
                      : row_stats<V, false>(row, vocab, inv, softcap);
}
template <class V, class T>
RLK_HD void any_grad(const T* row, T* grad, int64_t vocab, float inv, float logsumexp,
                     SoftmaxGrad g, Softcap softcap) {
  softcap.on() ? row_grad<V, true>(row, grad, vocab, inv, logsumexp, g, softcap)
               : row_grad<V, false>(row, grad, vocab, inv, logsumexp, g, softcap);
}

// Sixteen lanes with AVX-512, eight without (see vec.h).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLK_SIXTEEN __attribute__((target("arch=x86-64-v4")))
bool sixteen() { return cpu_isa() >= Isa::kAvx512; }
#else
#define RLK_SIXTEEN
bool sixteen() { return false; }
#endif
#define RLK_INSTANTIATE(T)                                                                         \
  RLK_SIXTEEN SoftmaxStats stats_16(const T* row, int64_t vocab, float inv, Softcap softcap) {     \
    return any_stats<f32x16>(row, vocab, inv, softcap);                                            \
  }                                                                                                \
  RLK_MULTIVERSION SoftmaxStats stats_8(const T* row, int64_t vocab, float inv, Softcap softcap) { \
    return any_stats<f32x8>(row, vocab, inv, softcap);                                             \
  }                                                                                                \
  RLK_SIXTEEN void grad_16(const T* row, T* grad, int64_t vocab, float inv, float logsumexp,       \
                           SoftmaxGrad g, Softcap softcap) {                                       \
    any_grad<f32x16>(row, grad, vocab, inv, logsumexp, g, softcap);                                \
  }                                                                                                \
  RLK_MULTIVERSION void grad_8(const T* row, T* grad, int64_t vocab, float inv, float logsumexp,   \
                               SoftmaxGrad g, Softcap softcap) {                                   \
    any_grad<f32x8>(row, grad, vocab, inv, logsumexp, g, softcap);                                 \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE
#undef RLK_SIXTEEN

float capped(float logit, Softcap softcap) { return softcap.on() ? softcap.apply(logit) : logit; }

const float* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

// A thread is worth starting for about this many logits.
int64_t grain(int64_t vocab) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, vocab)); }

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor targets,
                                           std::optional<Tensor> row_temperature,
                                           double temperature, double logit_scale, double cap,
                                           int64_t ignore_index, bool want_entropy) {
  RLK_CHECK_CPU(logits);
  RLK_CHECK_DIM(logits, 2);
  RLK_CHECK_DTYPE(targets, Long);
  RLK_CHECK_CONTIGUOUS(targets);
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  RLK_CHECK_SIZE(targets, 0, num_rows);
  STD_TORCH_CHECK(vocab == 0 || logits.stride(1) == 1, "logits must have contiguous rows");
  const auto kFloat = torch::headeronly::ScalarType::Float;
  Tensor logprob = torch::stable::new_empty(logits, {num_rows}, kFloat);
  Tensor logsumexp = torch::stable::new_empty(logits, {num_rows}, kFloat);
  Tensor entropy = torch::stable::new_empty(logits, {want_entropy ? num_rows : 0}, kFloat);
  const float* temperatures = optional_data(row_temperature);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  float* logprob_out = logprob.mutable_data_ptr<float>();
  float* lse_out = logsumexp.mutable_data_ptr<float>();
  float* entropy_out = entropy.mutable_data_ptr<float>();
  const int64_t stride = logits.stride(0);
  const Softcap softcap = {static_cast<float>(logit_scale), static_cast<float>(cap)};

  RLK_DISPATCH_FLOAT(logits, T, {
    const T* data = logits.const_data_ptr<T>();
    torch::stable::parallel_for(0, num_rows, grain(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = data + i * stride;
        const float inv =
            softcap.inverse(temperatures ? temperatures[i] : static_cast<float>(temperature));
        const SoftmaxStats stats =
            sixteen() ? stats_16(row, vocab, inv, softcap) : stats_8(row, vocab, inv, softcap);
        const bool in_vocab = target[i] >= 0 && target[i] < vocab;
        lse_out[i] = stats.logsumexp(inv);
        logprob_out[i] =
            target[i] == ignore_index ? 0.0f
            : in_vocab ? stats.logprob(capped(static_cast<float>(row[target[i]]), softcap), inv)
                       : NAN;
        if (want_entropy) entropy_out[i] = stats.entropy();
      }
    });
  });
  return {logprob, logsumexp, entropy};
}

Tensor backward(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_logsumexp,
                std::optional<Tensor> grad_entropy, Tensor logits, Tensor targets, Tensor logsumexp,
                Tensor entropy, std::optional<Tensor> row_temperature, double temperature,
                double logit_scale, double cap, int64_t ignore_index) {
  RLK_CHECK_CPU(logits);
  RLK_CHECK_DIM(logits, 2);
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  STD_TORCH_CHECK(vocab == 0 || logits.stride(1) == 1, "logits must have contiguous rows");
  Tensor grad = torch::stable::new_empty(logits, {num_rows, vocab});
  const float* a = optional_data(grad_logprob);
  const float* b = optional_data(grad_entropy);
  const float* c = optional_data(grad_logsumexp);
  const float* temperatures = optional_data(row_temperature);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float* lse = logsumexp.const_data_ptr<float>();
  const float* row_entropy = entropy.const_data_ptr<float>();
  const int64_t stride = logits.stride(0);
  const Softcap softcap = {static_cast<float>(logit_scale), static_cast<float>(cap)};

  RLK_DISPATCH_FLOAT(logits, T, {
    const T* data = logits.const_data_ptr<T>();
    T* out = grad.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, num_rows, grain(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float inv =
            softcap.inverse(temperatures ? temperatures[i] : static_cast<float>(temperature));
        const bool ignored = target[i] == ignore_index;
        const SoftmaxGrad g(a && !ignored ? a[i] : 0.0f, b ? b[i] : 0.0f, c ? c[i] : 0.0f,
                            b ? row_entropy[i] : 0.0f);
        const T* row = data + i * stride;
        T* grad_row = out + i * vocab;
        if (sixteen())
          grad_16(row, grad_row, vocab, inv, lse[i], g, softcap);
        else
          grad_8(row, grad_row, vocab, inv, lse[i], g, softcap);
        if (!ignored && target[i] >= 0 && target[i] < vocab) {
          T& slot = out[i * vocab + target[i]];
          const float y = capped(static_cast<float>(data[i * stride + target[i]]), softcap);
          const float slope = softcap.on() ? softcap.slope(y) : 1.0f;
          slot = static_cast<T>((g.target + g.off_target(y * inv - lse[i])) * inv * slope);
        }
      }
    });
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("logprob_from_logits_fwd", TORCH_BOX(&forward));
  m.impl("logprob_from_logits_bwd", TORCH_BOX(&backward));
}

}  // namespace rlkern
