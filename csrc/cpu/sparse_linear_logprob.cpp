// Statistics of the softmax over each row's kept tokens, from those rows of the weight alone.
//
// A thread takes whole tokens: dot products with four kept rows at a time, folded into the token's
// statistics in blocks. The gradient of the hidden states goes the same way; that of the weight
// sorts the slots of kept_ids by token id, and a thread takes whole ids. All sums run in the order
// of the slots, in float32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "rlkern/math/softcap.h"
#include "rlkern/math/softmax_stats.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// Slots whose logits are folded together: 2 KiB of floats.
constexpr int64_t kBlock = 512;
// Rows of the weight that one walk along a hidden state meets: with one sum each, and a token in
// registers, AVX2 has registers for four.
constexpr int kRows = 4;

// dots[r] = hidden . rows[r], `hidden` in float32 and padded with zeros to whole vectors.
template <class T>
RLK_HD void dots_of(const float* hidden, const T* const* rows, int64_t depth, float* dots) {
  f32x16 sum[kRows] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    const f32x16 h = load(hidden + k);
    for (int r = 0; r < kRows; ++r) sum[r] += h * load(rows[r] + k);
  }
  if (k < depth) {
    const f32x16 h = load(hidden + k);
    for (int r = 0; r < kRows; ++r) sum[r] += h * load_partial(rows[r] + k, depth - k, 0.0f);
  }
  for (int r = 0; r < kRows; ++r) dots[r] = reduce_add(sum[r]);
}

// sum += scales . rows, in the order of the rows.
template <class T>
RLK_HD void add_rows(const float* scales, const T* const* rows, int64_t depth, float* sum) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    f32x16 s = load(sum + k);
    for (int r = 0; r < kRows; ++r) s += scales[r] * load(rows[r] + k);
    store(sum + k, s);
  }
  if (k < depth) {
    f32x16 s = load(sum + k);
    for (int r = 0; r < kRows; ++r) s += scales[r] * load_partial(rows[r] + k, depth - k, 0.0f);
    store(sum + k, s);
  }
}

template <class T>
RLK_HD void add_row(float scale, const T* row, int64_t depth, float* sum) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) store(sum + k, load(sum + k) + scale * load(row + k));
  if (k < depth) store(sum + k, load(sum + k) + scale * load_partial(row + k, depth - k, 0.0f));
}

template <class T>
RLK_HD void widen(const T* row, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) store(out + k, load(row + k));
  if (k < depth) store(out + k, load_partial(row + k, depth - k, 0.0f));
}

template <class T>
RLK_HD void narrow(const float* sum, int64_t depth, T* out) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) store(out + k, load(sum + k));
  if (k < depth) store_partial(out + k, load(sum + k), depth - k);
}

// SoftmaxStats, and squares = sum_j e^{2 d_j}.
struct KeptStats {
  SoftmaxStats softmax;
  float squares = 0.0f;

  void merge(const KeptStats& other, float inv_temperature) {
    const float before = softmax.max;
    softmax.merge(other.softmax, inv_temperature);
    squares = moved(squares, before, inv_temperature) +
              moved(other.squares, other.softmax.max, inv_temperature);
  }
  float sum_sq_prob() const { return squares / (softmax.sum * softmax.sum); }

 private:
  // Squares with the reference point `max`, from now on with that of the sums.
  float moved(float sum, float max, float inv_temperature) const {
    if (sum == 0.0f || max == softmax.max) return sum;
    const float scale = exp((max - softmax.max) * inv_temperature);
    return scale * scale * sum;
  }
};

// Statistics of `count` capped logits, padded with -inf to whole vectors.
RLK_HD KeptStats stats_of(const float* logits, int64_t count, float inv_temperature) {
  f32x16 top = splat(-INFINITY);
  for (int64_t j = 0; j < count; j += kLanes) top = vmax(load(logits + j), top);
  KeptStats kept;
  SoftmaxStats& stats = kept.softmax;
  stats.max = reduce_max(top);
  // No token counts: nothing to add. The sums start from a finite maximum.
  if (stats.max == -INFINITY) {
    for (int64_t j = 0; j < count; ++j)
      if (std::isnan(logits[j])) stats.sum = NAN;
    return kept;
  }
  f32x16 sum{}, dot{}, squares{};
  for (int64_t j = 0; j < count; j += kLanes) {
    f32x16 d = (load(logits + j) - stats.max) * inv_temperature;
    d = d < kExpUnderflow ? splat(kExpUnderflow) : d;
    const f32x16 e = exp(d);
    sum += e;
    dot += e * d;
    squares += e * e;
  }
  stats.sum = reduce_add(sum);
  stats.dot = reduce_add(dot);
  kept.squares = reduce_add(squares);
  return kept;
}

// d[j] = dL/dx of `count` logits x, without the target's own term. -inf gets 0: slots that do not
// count, and probabilities of 0.
template <bool kCap>
RLK_HD void logit_gradients(const float* logits, int64_t count, float inv_temperature,
                            Softcap softcap, float logsumexp, const SoftmaxGrad& g, float* d) {
  for (int64_t j = 0; j < count; ++j) {
    const float y = kCap ? softcap.apply(logits[j]) : logits[j];
    float value = g.off_target(y * inv_temperature - logsumexp) * inv_temperature;
    if constexpr (kCap) value *= softcap.slope(y);
    d[j] = logits[j] == -INFINITY ? 0.0f : value;
  }
}

#define RLK_INSTANTIATE(T)                                                                   \
  RLK_MULTIVERSION void dots_with(const float* hidden, const T* const* rows, int64_t depth,  \
                                  float* dots) {                                             \
    dots_of(hidden, rows, depth, dots);                                                      \
  }                                                                                          \
  RLK_MULTIVERSION void add_scaled(const float* scales, const T* const* rows, int64_t depth, \
                                   float* sum) {                                             \
    add_rows(scales, rows, depth, sum);                                                      \
  }                                                                                          \
  RLK_MULTIVERSION void add_one(float scale, const T* row, int64_t depth, float* sum) {      \
    add_row(scale, row, depth, sum);                                                         \
  }                                                                                          \
  RLK_MULTIVERSION void to_float(const T* row, int64_t depth, float* out) {                  \
    widen(row, depth, out);                                                                  \
  }                                                                                          \
  RLK_MULTIVERSION void from_float(const float* sum, int64_t depth, T* out) {                \
    narrow(sum, depth, out);                                                                 \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE

// Whole vectors, from -inf to the soft cap's -cap too.
RLK_MULTIVERSION void cap_block(float* logits, int64_t count, Softcap softcap) {
  for (int64_t j = 0; j < count; j += kLanes) store(logits + j, softcap.apply(load(logits + j)));
}
RLK_MULTIVERSION KeptStats block_stats(const float* logits, int64_t count, float inv_temperature) {
  return stats_of(logits, count, inv_temperature);
}
RLK_MULTIVERSION void block_gradients(const float* logits, int64_t count, float inv_temperature,
                                      Softcap softcap, float logsumexp, const SoftmaxGrad& g,
                                      float* d) {
  softcap.on() ? logit_gradients<true>(logits, count, inv_temperature, softcap, logsumexp, g, d)
               : logit_gradients<false>(logits, count, inv_temperature, softcap, logsumexp, g, d);
}

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;

  explicit Matrix(const Tensor& t)
      : data(t.const_data_ptr<T>()), rows(t.size(0)), columns(t.size(1)), stride(t.stride(0)) {}
  const T* row(int64_t i) const { return data + i * stride; }
};

// kept_ids of either integer type, in rows.
class KeptSets {
 public:
  KeptSets(const Tensor& kept_ids, const Tensor& kept_offsets, int64_t vocab)
      : slots_(kept_ids.numel()),
        rows_(kept_offsets.numel() - 1),
        vocab_(vocab),
        offsets_(kept_offsets.const_data_ptr<int64_t>()) {
    if (kept_ids.scalar_type() == torch::headeronly::ScalarType::Int)
      narrow_ = kept_ids.const_data_ptr<int32_t>();
    else
      wide_ = kept_ids.const_data_ptr<int64_t>();
  }
  int64_t slots() const { return slots_; }
  int64_t rows() const { return rows_; }
  // in [0, N] whatever kept_offsets holds
  int64_t begin(int64_t row) const { return std::clamp<int64_t>(offsets_[row], 0, slots_); }
  int64_t end(int64_t row) const { return std::max(begin(row), begin(row + 1)); }
  // -1: not in the vocabulary
  int64_t id(int64_t slot) const {
    const int64_t id = narrow_ ? narrow_[slot] : wide_[slot];
    return id >= 0 && id < vocab_ ? id : -1;
  }
  // tokens a thread is worth starting for, at about 64 k products
  int64_t grain(int64_t depth) const {
    const int64_t products = slots_ * std::max<int64_t>(1, depth);
    return std::max<int64_t>(1, 65536 * rows_ / std::max<int64_t>(1, products));
  }

 private:
  int64_t slots_, rows_, vocab_;
  const int64_t* offsets_;
  const int32_t* narrow_ = nullptr;
  const int64_t* wide_ = nullptr;
};

// What happens to logits, and by which temperature.
struct Scaling {
  const float* temperatures;  // of every row, or nullptr
  float temperature;
  Softcap softcap;

  float inverse(int64_t row) const {
    return softcap.inverse(temperatures ? temperatures[row] : temperature);
  }
};

struct Results {
  float *logprob, *logsumexp, *entropy, *sum_sq_prob;
  bool* is_top1;
  float* logits;         // of every slot, or nullptr
  int64_t* target_slot;  // nullptr where logits are
};

template <class T>
void forward_rows(const Matrix<T>& hidden, const Matrix<T>& weight, const T* bias,
                  const KeptSets& kept, const int64_t* targets, const Scaling& scaling,
                  int64_t ignore_index, bool round_logits, const Results& out) {
  const int64_t depth = hidden.columns;
  torch::stable::parallel_for(0, kept.rows(), kept.grain(depth), [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> token(new float[padded(depth)]());
    alignas(64) float x[kBlock];
    for (int64_t t = first; t < last; ++t) {
      const float inv = scaling.inverse(t);
      const int64_t begin = kept.begin(t), end = kept.end(t);
      KeptStats stats;
      int64_t hit = -1;
      float target_logit = 0.0f;
      bool has_kept = false;
      if (begin < end) to_float(hidden.row(t), depth, token.get());
      for (int64_t j = begin; j < end; j += kBlock) {
        const int64_t count = std::min(kBlock, end - j);
        std::fill_n(x, padded(count), -INFINITY);
        // whole groups of rows that count; the last one is filled up with its own last row
        int64_t at[kRows];
        const T* rows[kRows];
        int filled = 0;
        for (int64_t i = 0; i <= count; ++i) {
          const int64_t id = i < count ? kept.id(j + i) : -1;
          if (id >= 0) {
            has_kept = true;
            rows[filled] = weight.row(id);
            at[filled++] = i;
            if (hit < 0 && id == targets[t]) hit = j + i;
          }
          if (filled == kRows || (i == count && filled > 0)) {
            for (int r = filled; r < kRows; ++r) rows[r] = rows[filled - 1];
            float dots[kRows];
            dots_with(token.get(), rows, depth, dots);
            for (int r = 0; r < filled; ++r) {
              float& logit = x[at[r]];
              logit = dots[r];
              if (bias) logit += static_cast<float>(bias[kept.id(j + at[r])]);
              if (round_logits) logit = static_cast<float>(static_cast<bf16>(logit));
            }
            filled = 0;
          }
        }
        if (out.logits) std::copy_n(x, count, out.logits + j);
        if (scaling.softcap.on()) {
          cap_block(x, count, scaling.softcap);
          for (int64_t i = 0; i < padded(count); ++i)
            if (i >= count || kept.id(j + i) < 0) x[i] = -INFINITY;
        }
        if (hit >= j) target_logit = x[hit - j];
        stats.merge(block_stats(x, count, inv), inv);
      }
      const bool in_vocab = targets[t] >= 0 && targets[t] < weight.rows;
      const bool ignored = targets[t] == ignore_index;
      const float logprob = hit >= 0               ? stats.softmax.logprob(target_logit, inv)
                            : in_vocab && has_kept ? -INFINITY
                                                   : NAN;
      out.logprob[t] = ignored ? 0.0f : logprob;
      out.logsumexp[t] = stats.softmax.logsumexp(inv);
      out.entropy[t] = has_kept ? stats.softmax.entropy() : 0.0f;
      out.sum_sq_prob[t] = has_kept ? stats.sum_sq_prob() : 0.0f;
      out.is_top1[t] =
          hit >= 0 && !ignored && target_logit >= stats.softmax.max && !std::isnan(logprob);
      if (out.target_slot) out.target_slot[t] = ignored ? -1 : hit;
    }
  });
}

struct Upstream {
  const float *logprob, *logsumexp, *entropy;
};

// d[slot] for every slot, 0 for those in no row; the row of each slot.
void slot_gradients(const Upstream& upstream, const KeptSets& kept, const float* logits,
                    const int64_t* target_slot, const float* logsumexp, const float* entropy,
                    const Scaling& scaling, float* d, int64_t* row_of) {
  std::fill_n(d, kept.slots(), 0.0f);
  std::fill_n(row_of, kept.slots(), int64_t{-1});
  torch::stable::parallel_for(0, kept.rows(), kept.grain(16), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float inv = scaling.inverse(t);
      const int64_t begin = kept.begin(t), count = kept.end(t) - begin, hit = target_slot[t];
      const bool found = hit >= begin && hit < begin + count;
      const SoftmaxGrad g(upstream.logprob && found ? upstream.logprob[t] : 0.0f,
                          upstream.entropy ? upstream.entropy[t] : 0.0f,
                          upstream.logsumexp ? upstream.logsumexp[t] : 0.0f,
                          upstream.entropy ? entropy[t] : 0.0f);
      const Softcap softcap = scaling.softcap;
      block_gradients(logits + begin, count, inv, softcap, logsumexp[t], g, d + begin);
      if (found) {
        const float slope = softcap.on() ? softcap.slope(softcap.apply(logits[hit])) : 1.0f;
        d[hit] += g.target * inv * slope;
      }
      std::fill_n(row_of + begin, count, t);
    }
  });
}

template <class T>
void hidden_gradient(const Matrix<T>& weight, const KeptSets& kept, const float* d, T* grad) {
  const int64_t depth = weight.columns;
  torch::stable::parallel_for(0, kept.rows(), kept.grain(depth), [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> sum(new float[padded(depth)]);
    for (int64_t t = first; t < last; ++t) {
      std::fill_n(sum.get(), padded(depth), 0.0f);
      float scales[kRows];
      const T* rows[kRows];
      int filled = 0;
      const auto flush = [&] {
        if (filled == kRows)
          add_scaled(scales, rows, depth, sum.get());
        else
          for (int r = 0; r < filled; ++r) add_one(scales[r], rows[r], depth, sum.get());
        filled = 0;
      };
      for (int64_t slot = kept.begin(t); slot < kept.end(t); ++slot) {
        const int64_t id = kept.id(slot);
        if (id < 0) continue;
        scales[filled] = d[slot];
        rows[filled++] = weight.row(id);
        if (filled == kRows) flush();
      }
      flush();
      from_float(sum.get(), depth, grad + t * depth);
    }
  });
}

template <class T>
void weight_gradient(const Matrix<T>& hidden, int64_t vocab, const KeptSets& kept, const float* d,
                     const int64_t* row_of, T* grad) {
  const int64_t depth = hidden.columns;
  // the slots of each id, in their order: a counting sort
  std::vector<int64_t> starts(vocab + 1, 0);
  for (int64_t slot = 0; slot < kept.slots(); ++slot)
    if (row_of[slot] >= 0 && kept.id(slot) >= 0) ++starts[kept.id(slot)];
  int64_t total = 0;
  for (int64_t id = 0; id <= vocab; ++id) total += std::exchange(starts[id], total);
  std::vector<int64_t> order(total);
  for (int64_t slot = 0; slot < kept.slots(); ++slot)
    if (row_of[slot] >= 0 && kept.id(slot) >= 0) order[starts[kept.id(slot)]++] = slot;
  // starts[id] is now where id ends

  constexpr int64_t kGrain = 256;
  torch::stable::parallel_for(0, vocab, kGrain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> sum(new float[padded(depth)]);
    for (int64_t id = first; id < last; ++id) {
      const int64_t begin = id ? starts[id - 1] : 0, end = starts[id];
      if (begin == end) {
        std::fill_n(grad + id * depth, depth, static_cast<T>(0.0f));
        continue;
      }
      std::fill_n(sum.get(), padded(depth), 0.0f);
      for (int64_t i = begin; i < end; ++i)
        add_one(d[order[i]], hidden.row(row_of[order[i]]), depth, sum.get());
      from_float(sum.get(), depth, grad + id * depth);
    }
  });
}

template <class T>
void bias_gradient(int64_t vocab, const KeptSets& kept, const float* d, T* grad) {
  const std::unique_ptr<float[]> sum(new float[vocab]());
  for (int64_t slot = 0; slot < kept.slots(); ++slot)
    if (kept.id(slot) >= 0) sum[kept.id(slot)] += d[slot];
  for (int64_t id = 0; id < vocab; ++id) grad[id] = static_cast<T>(sum[id]);
}

const float* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

void check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& kept_ids,
                  const Tensor& kept_offsets) {
  RLK_CHECK_CPU(hidden);
  RLK_CHECK_CPU(weight);
  RLK_CHECK_DIM(hidden, 2);
  RLK_CHECK_DIM(weight, 2);
  RLK_CHECK_SIZE(weight, 1, hidden.size(1));
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(),
                  "hidden and weight must have the same dtype");
  STD_TORCH_CHECK(hidden.size(1) == 0 || hidden.stride(1) == 1, "hidden must have contiguous rows");
  STD_TORCH_CHECK(weight.size(1) == 0 || weight.stride(1) == 1, "weight must have contiguous rows");
  RLK_CHECK_CPU(kept_ids);
  RLK_CHECK_DIM(kept_ids, 1);
  RLK_CHECK_CONTIGUOUS(kept_ids);
  STD_TORCH_CHECK(kept_ids.scalar_type() == torch::headeronly::ScalarType::Int ||
                      kept_ids.scalar_type() == torch::headeronly::ScalarType::Long,
                  "kept_ids must have dtype int32 or int64");
  RLK_CHECK_CPU(kept_offsets);
  RLK_CHECK_DTYPE(kept_offsets, Long);
  RLK_CHECK_DIM(kept_offsets, 1);
  RLK_CHECK_CONTIGUOUS(kept_offsets);
  RLK_CHECK_SIZE(kept_offsets, 0, hidden.size(0) + 1);
}

Scaling scaling_of(const std::optional<Tensor>& row_temperature, double temperature,
                   double logit_scale, double cap) {
  return {optional_data(row_temperature), static_cast<float>(temperature),
          Softcap{static_cast<float>(logit_scale), static_cast<float>(cap)}};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets, Tensor kept_ids,
    Tensor kept_offsets, std::optional<Tensor> row_temperature, double temperature,
    double logit_scale, double cap, int64_t ignore_index, bool round_logits, bool want_logits) {
  check_inputs(hidden, weight, kept_ids, kept_offsets);
  const int64_t count = hidden.size(0);
  RLK_CHECK_DTYPE(targets, Long);
  RLK_CHECK_CONTIGUOUS(targets);
  RLK_CHECK_SIZE(targets, 0, count);
  if (bias.has_value()) {
    RLK_CHECK_CPU(*bias);
    RLK_CHECK_DIM(*bias, 1);
    RLK_CHECK_CONTIGUOUS(*bias);
    RLK_CHECK_SIZE(*bias, 0, weight.size(0));
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type(),
                    "bias and weight must have the same dtype");
  }
  const KeptSets kept(kept_ids, kept_offsets, weight.size(0));
  const auto kFloat = torch::headeronly::ScalarType::Float;
  Tensor logprob = torch::stable::new_empty(hidden, {count}, kFloat);
  Tensor logsumexp = torch::stable::new_empty(hidden, {count}, kFloat);
  Tensor entropy = torch::stable::new_empty(hidden, {count}, kFloat);
  Tensor sum_sq_prob = torch::stable::new_empty(hidden, {count}, kFloat);
  Tensor is_top1 = torch::stable::new_empty(hidden, {count}, torch::headeronly::ScalarType::Bool);
  Tensor logits = torch::stable::new_empty(hidden, {want_logits ? kept.slots() : 0}, kFloat);
  Tensor target_slot = torch::stable::new_empty(targets, {want_logits ? count : 0});
  const Results results = {logprob.mutable_data_ptr<float>(),
                           logsumexp.mutable_data_ptr<float>(),
                           entropy.mutable_data_ptr<float>(),
                           sum_sq_prob.mutable_data_ptr<float>(),
                           is_top1.mutable_data_ptr<bool>(),
                           want_logits ? logits.mutable_data_ptr<float>() : nullptr,
                           want_logits ? target_slot.mutable_data_ptr<int64_t>() : nullptr};
  RLK_DISPATCH_FLOAT(hidden, T, {
    forward_rows(Matrix<T>(hidden), Matrix<T>(weight),
                 bias.has_value() ? bias->const_data_ptr<T>() : nullptr, kept,
                 targets.const_data_ptr<int64_t>(),
                 scaling_of(row_temperature, temperature, logit_scale, cap), ignore_index,
                 round_logits, results);
  });
  return {logprob, logsumexp, entropy, sum_sq_prob, is_top1, logits, target_slot};
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_logprob,
                                            std::optional<Tensor> grad_logsumexp,
                                            std::optional<Tensor> grad_entropy, Tensor hidden,
                                            Tensor weight, Tensor kept_ids, Tensor kept_offsets,
                                            Tensor logits, Tensor target_slot, Tensor logsumexp,
                                            Tensor entropy, std::optional<Tensor> row_temperature,
                                            double temperature, double logit_scale, double cap,
                                            bool need_hidden, bool need_weight, bool need_bias) {
  check_inputs(hidden, weight, kept_ids, kept_offsets);
  const KeptSets kept(kept_ids, kept_offsets, weight.size(0));
  RLK_CHECK_DTYPE(logits, Float);
  RLK_CHECK_SIZE(logits, 0, kept.slots());
  RLK_CHECK_DTYPE(target_slot, Long);
  RLK_CHECK_SIZE(target_slot, 0, kept.rows());
  RLK_CHECK_SIZE(logsumexp, 0, kept.rows());
  RLK_CHECK_SIZE(entropy, 0, kept.rows());
  Tensor grad_hidden =
      torch::stable::new_empty(hidden, {need_hidden ? hidden.size(0) : 0, hidden.size(1)});
  Tensor grad_weight =
      torch::stable::new_empty(hidden, {need_weight ? weight.size(0) : 0, weight.size(1)});
  Tensor grad_bias = torch::stable::new_empty(hidden, {need_bias ? weight.size(0) : 0});
  const Upstream upstream = {optional_data(grad_logprob), optional_data(grad_logsumexp),
                             optional_data(grad_entropy)};
  const std::unique_ptr<float[]> d(new float[kept.slots() + 1]);
  const std::unique_ptr<int64_t[]> row_of(new int64_t[kept.slots() + 1]);
  slot_gradients(upstream, kept, logits.const_data_ptr<float>(),
                 target_slot.const_data_ptr<int64_t>(), logsumexp.const_data_ptr<float>(),
                 entropy.const_data_ptr<float>(),
                 scaling_of(row_temperature, temperature, logit_scale, cap), d.get(), row_of.get());
  RLK_DISPATCH_FLOAT(hidden, T, {
    if (need_hidden)
      hidden_gradient(Matrix<T>(weight), kept, d.get(), grad_hidden.mutable_data_ptr<T>());
    if (need_weight)
      weight_gradient(Matrix<T>(hidden), weight.size(0), kept, d.get(), row_of.get(),
                      grad_weight.mutable_data_ptr<T>());
    if (need_bias) bias_gradient(weight.size(0), kept, d.get(), grad_bias.mutable_data_ptr<T>());
  });
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("sparse_linear_logprob_fwd", TORCH_BOX(&forward));
  m.impl("sparse_linear_logprob_bwd", TORCH_BOX(&backward));
}

}  // namespace rlkern
