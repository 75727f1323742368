// Policy loss, its gradient coefficients and metrics in one pass over the tokens, in chunks of a
// fixed size whose sums are merged in order: the same bits for every number of threads.
#include "rlkern/math/policy_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "isa.h"
#include "vec.h"

namespace rlkern {

// This kernel is made of selects: sixteen lanes with AVX-512, eight without (see vec.h).
namespace {

using torch::stable::Tensor;

// 2048 tokens: the sequence's numbers, spread over its tokens, stay in 32 KiB of L1.
constexpr int64_t kChunk = 2048;
// A thread is worth starting for about this many tokens.
constexpr int64_t kGrain = 8192;

// A run of tokens with everything that one of them needs; null: not given or not wanted.
struct Tokens {
  int64_t count;
  const float *logprob, *old_logprob, *advantage, *weight, *log_ratio, *ref_logprob, *entropy;
  // -1 or 0 by token; null: all count, and `count` is a multiple of kLanes
  const int32_t* counts;
  float *grad, *grad_entropy;
};

struct Partial {
  float sum[kNumPolicySums];
  float least, most;
};

template <class F>
using Ints = decltype(Bits<F>::of(F{}));
template <class F>
constexpr int64_t kWidth = sizeof(F) / sizeof(float);

// Past `left` elements: zeros.
template <class V, class T>
RLK_HD V load_upto(const T* p, int64_t left) {
  V x{};
  if (left >= kWidth<V>)
    std::memcpy(&x, p, sizeof x);
  else
    for (int64_t i = 0; i < left; ++i) x[i] = p[i];
  return x;
}

// 0 where the token does not count, whatever lies there
template <class F>
RLK_HD F load_counting(const float* p, int64_t left, Ints<F> counts) {
  return Bits<F>::from(Bits<F>::of(load_upto<F>(p, left)) & counts);
}

template <class F>
RLK_HD void store_upto(float* p, F x, int64_t left) {
  if (left >= kWidth<F>)
    std::memcpy(p, &x, sizeof x);
  else
    for (int64_t i = 0; i < left; ++i) p[i] = x[i];
}

// A vector of tokens. kAll: none is masked. left: the tokens from i on; a constant where the loop
// is over whole vectors.
template <bool kAll, class F>
RLK_HD void some_tokens(const PolicyParams& p, const Tokens& t, int64_t i, int64_t left,
                        PolicyStats<F>& stats) {
  const Ints<F> counts = kAll ? Ints<F>{} - 1 : load_upto<Ints<F>>(t.counts + i, left);
  const F one = Bits<F>::from(Bits<F>::of(F{} + 1.0f) & counts);
  PolicyInput<F> in{};
  in.logprob = load_counting<F>(t.logprob + i, left, counts);
  in.old_logprob = load_counting<F>(t.old_logprob + i, left, counts);
  in.advantage = load_counting<F>(t.advantage + i, left, counts);
  in.weight = load_counting<F>(t.weight + i, left, counts);
  in.log_ratio =
      t.log_ratio ? load_counting<F>(t.log_ratio + i, left, counts) : in.logprob - in.old_logprob;
  if (t.ref_logprob) in.ref_logprob = load_counting<F>(t.ref_logprob + i, left, counts);
  if (t.entropy) in.entropy = load_counting<F>(t.entropy + i, left, counts);
  const F grad = policy_token(p, in, one, t.ref_logprob, t.entropy, stats);
  if (t.grad) store_upto<F>(t.grad + i, grad, left);
  if (t.grad_entropy) store_upto<F>(t.grad_entropy + i, -p.entropy_coef * in.weight, left);
}

template <class F>
RLK_HD void all_tokens(const PolicyParams& p, const Tokens& t, Partial& out) {
  constexpr int64_t kStep = kWidth<F>;
  PolicyStats<F> stats;
  int64_t i = 0;
  if (!t.counts)
    for (; i < t.count; i += kStep) some_tokens<true>(p, t, i, kStep, stats);
  for (; i + kStep <= t.count; i += kStep) some_tokens<false>(p, t, i, kStep, stats);
  if (i < t.count) some_tokens<false>(p, t, i, t.count - i, stats);
  for (int k = 0; k < kNumPolicySums; ++k) out.sum[k] = reduce_add(stats.sum[k]);
  out.least = stats.least[0];
  out.most = stats.most[0];
  for (int lane = 1; lane < kStep; ++lane) {
    out.least = std::min(out.least, stats.least[lane]);
    out.most = std::max(out.most, stats.most[lane]);
  }
}

RLK_MULTIVERSION void run_eight(const PolicyParams& p, const Tokens& t, Partial& out) {
  all_tokens<f32x8>(p, t, out);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("arch=x86-64-v4"))) void run_sixteen(const PolicyParams& p, const Tokens& t,
                                                           Partial& out) {
  all_tokens<f32x16>(p, t, out);
}
const auto run_tokens = cpu_isa() >= Isa::kAvx512 ? run_sixteen : run_eight;
#else
const auto run_tokens = run_eight;
#endif

// Of one sequence: the tokens that count, and the mean of logprob - old_logprob over them.
struct SequenceStats {
  int64_t length;
  float log_ratio;
};

int64_t count_tokens(const bool* mask, int64_t count) {
  int64_t total = 0, i = 0;
  for (uint64_t eight; i + 8 <= count; i += 8) {
    std::memcpy(&eight, mask + i, 8);
    total += eight * 0x0101010101010101u >> 56;  // the sum of eight bytes of 0 or 1
  }
  for (; i < count; ++i) total += mask[i];
  return total;
}

RLK_MULTIVERSION void spread(const bool* mask, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = -static_cast<int32_t>(mask[i]);
}

RLK_MULTIVERSION float sum_log_ratio(const float* logprob, const float* old_logprob,
                                     const int32_t* counts, int64_t count) {
  constexpr int64_t kStep = kWidth<f32x8>;
  const i32x8 all = i32x8{} - 1;
  f32x8 sum{};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const i32x8 lanes = counts ? load_upto<i32x8>(counts + i, kStep) : all;
    sum += load_counting<f32x8>(logprob + i, kStep, lanes) -
           load_counting<f32x8>(old_logprob + i, kStep, lanes);
  }
  if (i < count) {
    const i32x8 lanes = counts ? load_upto<i32x8>(counts + i, count - i) : all;
    sum += load_counting<f32x8>(logprob + i, count - i, lanes) -
           load_counting<f32x8>(old_logprob + i, count - i, lanes);
  }
  return reduce_add(sum);
}

// Where sequences begin: cu_seqlens of either integer type, or rows of one length.
class Sequences {
 public:
  Sequences(const Tensor& logprob, const std::optional<Tensor>& cu_seqlens)
      : tokens_(logprob.numel()), row_(logprob.numel()) {
    if (cu_seqlens.has_value()) {
      count_ = cu_seqlens->numel() - 1;
      if (cu_seqlens->scalar_type() == torch::headeronly::ScalarType::Int)
        narrow_ = cu_seqlens->const_data_ptr<int32_t>();
      else
        wide_ = cu_seqlens->const_data_ptr<int64_t>();
    } else if (logprob.dim() == 2) {
      count_ = logprob.size(0);
      row_ = logprob.size(1);
    }
  }
  int64_t count() const { return count_; }
  // in [0, T] whatever cu_seqlens holds
  int64_t begin(int64_t i) const {
    const int64_t at = narrow_ ? narrow_[i] : wide_ ? wide_[i] : i * row_;
    return std::clamp<int64_t>(at, 0, tokens_);
  }
  int64_t length(int64_t i) const { return std::max<int64_t>(0, begin(i + 1) - begin(i)); }
  // the last sequence that begins at or before the token; -1: none
  int64_t at(int64_t token) const {
    if (!narrow_ && !wide_) return row_ ? token / row_ : -1;
    int64_t low = -1, high = count_;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (begin(middle) <= token ? low : high) = middle;
    }
    return low;
  }

 private:
  int64_t tokens_, row_, count_ = 1;
  const int32_t* narrow_ = nullptr;
  const int64_t* wide_ = nullptr;
};

const float* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}
const float* shifted(const float* p, int64_t by) { return p ? p + by : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor logprob, Tensor old_logprob, Tensor advantages, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> mask, std::optional<Tensor> ref_logprob, std::optional<Tensor> entropy,
    bool sequence_level, int64_t surrogate, double ratio_low, double ratio_high, double ratio_cap,
    double log_ratio_clamp, int64_t kl_type, double kl_coef, double kl_input_clamp,
    double kl_output_clamp, double entropy_coef, int64_t denominator, bool divide_by_length,
    double scale, bool want_grad, bool want_entropy_grad) {
  RLK_CHECK_CPU(logprob);
  RLK_CHECK_DTYPE(logprob, Float);
  RLK_CHECK_CONTIGUOUS(logprob);
  RLK_CHECK_CONTIGUOUS(old_logprob);
  RLK_CHECK_CONTIGUOUS(advantages);
  const int64_t num_tokens = logprob.numel();
  STD_TORCH_CHECK(old_logprob.numel() == num_tokens, "old_logprob must have the size of logprob");
  const Sequences sequences(logprob, cu_seqlens);
  const int64_t num_sequences = sequences.count();
  const bool per_token = logprob.dim() == 2       ? advantages.dim() == 2
                         : cu_seqlens.has_value() ? advantages.numel() != num_sequences
                                                  : true;
  STD_TORCH_CHECK(advantages.numel() == (per_token ? num_tokens : num_sequences),
                  "advantages must have one element per sequence or per token");

  const PolicyParams params{
      .surrogate = static_cast<int>(surrogate),
      .bounds = {static_cast<float>(ratio_low), static_cast<float>(ratio_high),
                 static_cast<float>(ratio_cap)},
      .log_ratio_clamp = static_cast<float>(log_ratio_clamp),
      .kl = {static_cast<int>(kl_type), static_cast<float>(kl_coef),
             static_cast<float>(kl_input_clamp), static_cast<float>(kl_output_clamp)},
      .entropy_coef = static_cast<float>(entropy_coef),
  };
  const float* live = logprob.const_data_ptr<float>();
  const float* old = old_logprob.const_data_ptr<float>();
  const float* advantage = advantages.const_data_ptr<float>();
  const float* ref = optional_data(ref_logprob);
  const float* token_entropy = optional_data(entropy);
  const bool* counts = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;

  // Statistics of sequences; lengths without a mask are known from cu_seqlens.
  std::vector<SequenceStats> stats;
  if (counts || sequence_level) {
    stats.resize(num_sequences);
    const int64_t grain =
        std::max<int64_t>(1, kGrain * num_sequences / std::max<int64_t>(1, num_tokens));
    torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t first, int64_t last) {
      alignas(64) int32_t row_counts[kChunk];
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = sequences.begin(i), length = sequences.length(i);
        stats[i].length = counts ? count_tokens(counts + begin, length) : length;
        double sum = 0;
        for (int64_t j = begin; sequence_level && j < begin + length; j += kChunk) {
          const int64_t size = std::min(kChunk, begin + length - j);
          if (counts) spread(counts + j, size, row_counts);
          sum += sum_log_ratio(live + j, old + j, counts ? row_counts : nullptr, size);
        }
        stats[i].log_ratio = static_cast<float>(sum / std::max<int64_t>(1, stats[i].length));
      }
    });
  }
  const auto length_of = [&](int64_t i) {
    return stats.empty() ? sequences.length(i) : stats[i].length;
  };
  int64_t divisor = 1;
  if (denominator == kAllSequences) divisor = num_sequences;
  if (denominator == kTokens || denominator == kFilledSequences) {
    divisor = 0;
    for (int64_t i = 0; i < num_sequences; ++i) {
      const int64_t length = length_of(i);
      divisor += denominator == kTokens ? length : length > 0;
    }
  }
  const double shared = scale / std::max<int64_t>(1, divisor);

  const auto kFloat = torch::headeronly::ScalarType::Float;
  Tensor loss = torch::stable::new_empty(logprob, {}, kFloat);
  Tensor metrics = torch::stable::new_empty(logprob, {kNumPolicyMetrics}, kFloat);
  const auto coefficients = [&](bool wanted) {
    if (!wanted) return torch::stable::new_empty(logprob, {0}, kFloat);
    return torch::stable::new_empty(logprob, logprob.sizes(), kFloat);
  };
  Tensor grad = coefficients(want_grad);
  Tensor grad_entropy = coefficients(want_entropy_grad);
  float* grad_out = want_grad ? grad.mutable_data_ptr<float>() : nullptr;
  float* grad_entropy_out = want_entropy_grad ? grad_entropy.mutable_data_ptr<float>() : nullptr;

  const int64_t num_chunks = (num_tokens + kChunk - 1) / kChunk;
  std::vector<Partial> partials(num_chunks);
  torch::stable::parallel_for(0, num_chunks, kGrain / kChunk, [&](int64_t first, int64_t last) {
    alignas(64) float chunk_advantage[kChunk], chunk_weight[kChunk], chunk_log_ratio[kChunk];
    alignas(64) int32_t chunk_counts[kChunk];
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, num_tokens);
      bool all_count = !counts && (end - begin) % kLanes == 0;
      if (counts)
        spread(counts + begin, end - begin, chunk_counts);
      else
        std::fill_n(chunk_counts, end - begin, -1);
      for (int64_t i = sequences.at(begin), token = begin; token < end; ++i) {
        // tokens before the first sequence or after the last do not count
        const bool inside = i >= 0 && i < num_sequences;
        const int64_t stop = i < num_sequences ? std::min(sequences.begin(i + 1), end) : end;
        if (stop <= token) continue;
        const int64_t from = token - begin, size = stop - token;
        if (!inside) std::fill_n(chunk_counts + from, size, 0);
        all_count = all_count && inside;
        if (!per_token) std::fill_n(chunk_advantage + from, size, inside ? advantage[i] : 0.0f);
        if (sequence_level)
          std::fill_n(chunk_log_ratio + from, size, inside ? stats[i].log_ratio : 0.0f);
        const float weight = inside ? policy_weight(shared, divide_by_length, length_of(i)) : 0.0f;
        std::fill_n(chunk_weight + from, size, weight);
        token = stop;
      }
      const Tokens tokens{
          .count = end - begin,
          .logprob = live + begin,
          .old_logprob = old + begin,
          .advantage = per_token ? advantage + begin : chunk_advantage,
          .weight = chunk_weight,
          .log_ratio = sequence_level ? chunk_log_ratio : nullptr,
          .ref_logprob = shifted(ref, begin),
          .entropy = shifted(token_entropy, begin),
          .counts = all_count ? nullptr : chunk_counts,
          .grad = grad_out ? grad_out + begin : nullptr,
          .grad_entropy = grad_entropy_out ? grad_entropy_out + begin : nullptr,
      };
      run_tokens(params, tokens, partials[chunk]);
    }
  });

  double sum[kNumPolicySums] = {};
  float least = INFINITY, most = -INFINITY;
  for (const Partial& partial : partials) {
    for (int k = 0; k < kNumPolicySums; ++k) sum[k] += partial.sum[k];
    least = std::min(least, partial.least);
    most = std::max(most, partial.most);
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum[kLossSum]);
  policy_metrics(sum, least, most, metrics.mutable_data_ptr<float>());
  return {loss, metrics, grad, grad_entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("policy_loss_fwd", TORCH_BOX(&forward)); }

}  // namespace rlkern
