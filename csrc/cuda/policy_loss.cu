// Policy loss on CUDA: statistics of sequences where needed, tokens in blocks, one block that adds
// the blocks' sums. No atomics, fixed orders: two runs give the same bits.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "rlkern/math/policy_loss.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Tokens of one block: the order of the sums depends on it and on nothing else.
constexpr int kBlock = 1024;

// Where sequences begin: cu_seqlens of either integer type, or rows of one length.
struct Sequences {
  const int32_t* narrow;
  const int64_t* wide;
  int64_t count, row, tokens;

  // in [0, T] whatever cu_seqlens holds
  __device__ int64_t begin(int64_t i) const {
    const int64_t at = narrow ? narrow[i] : wide ? wide[i] : i * row;
    return at < 0 ? 0 : at > tokens ? tokens : at;
  }
  __device__ int64_t length(int64_t i) const {
    const int64_t n = begin(i + 1) - begin(i);
    return n > 0 ? n : 0;
  }
  // the last sequence that begins at or before the token; -1: none holds it
  __device__ int64_t at(int64_t token) const {
    if (!narrow && !wide) return token / row;
    int64_t low = -1, high = count;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (begin(middle) <= token)
        low = middle;
      else
        high = middle;
    }
    return low >= 0 && token < begin(low + 1) ? low : -1;
  }
};

struct Inputs {
  const float *logprob, *old_logprob, *advantage, *ref_logprob, *entropy;
  const bool* mask;
  Sequences sequences;
  bool per_token;
};

// Of each sequence: the tokens that count, the mean of logprob - old_logprob; null: not needed.
struct SequenceStats {
  int64_t* length;
  float* log_ratio;
};

template <class T, class Merge>
__device__ T warp_merge(T value, Merge merge) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = merge(value, __shfl_down_sync(0xffffffffu, value, offset));
  return value;
}

// The merge of all threads' values, in thread 0; the tree is fixed. Every thread must call it.
template <class T, class Merge>
__device__ T block_merge(T value, Merge merge) {
  __shared__ T shared[kWarps];
  value = warp_merge(value, merge);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = merge(value, shared[warp]);
  return value;
}

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  __device__ float operator()(float a, float b) const { return b < a ? b : a; }
};
struct Most {
  __device__ float operator()(float a, float b) const { return b > a ? b : a; }
};

__global__ void __launch_bounds__(kThreads) sequence_kernel(Inputs in, SequenceStats out) {
  const int64_t i = blockIdx.x;
  const int64_t begin = in.sequences.begin(i), end = begin + in.sequences.length(i);
  int64_t length = 0;
  double total = 0;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (in.mask && !in.mask[t]) continue;
    ++length;
    if (out.log_ratio) total += in.logprob[t] - in.old_logprob[t];
  }
  length = block_merge(length, Add());
  total = block_merge(total, Add());
  if (threadIdx.x != 0) return;
  out.length[i] = length;
  if (out.log_ratio) out.log_ratio[i] = static_cast<float>(total / (length > 0 ? length : 1));
}

__device__ int64_t length_of(const Inputs& in, const SequenceStats& stats, int64_t i) {
  return stats.length ? stats.length[i] : in.sequences.length(i);
}

// What the weighted losses are divided by: every block counts for itself, S reads from L2.
__device__ double divisor(const Inputs& in, const SequenceStats& stats, int denominator) {
  int64_t total = 0;
  if (denominator == kTokens || denominator == kFilledSequences)
    for (int64_t i = threadIdx.x; i < in.sequences.count; i += kThreads) {
      const int64_t length = length_of(in, stats, i);
      total += denominator == kTokens ? length : length > 0;
    }
  total = block_merge(total, Add());
  if (denominator == kNothing) total = 1;
  if (denominator == kAllSequences) total = in.sequences.count;
  return static_cast<double>(total > 0 ? total : 1);
}

// partials: [blocks, kNumPolicySums + 2], the sums, then the least and the greatest ratio
constexpr int kColumns = kNumPolicySums + 2;

__global__ void __launch_bounds__(kThreads)
    token_kernel(Inputs in, SequenceStats sequence, PolicyParams params, int denominator,
                 bool divide_by_length, double scale, float* grad, float* grad_entropy,
                 float* partials) {
  const double shared_weight = scale / divisor(in, sequence, denominator);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock;
  PolicyStats<float> stats;
  for (int64_t t = first + threadIdx.x; t < first + kBlock && t < in.sequences.tokens;
       t += kThreads) {
    const int64_t i = in.sequences.at(t);
    const bool counts = i >= 0 && (!in.mask || in.mask[t]);
    PolicyInput<float> token{};
    // masked slots may hold NaN or inf: they are not read
    if (counts) {
      token.logprob = in.logprob[t];
      token.old_logprob = in.old_logprob[t];
      token.advantage = in.advantage[in.per_token ? t : i];
      token.weight = policy_weight(shared_weight, divide_by_length, length_of(in, sequence, i));
      token.log_ratio =
          sequence.log_ratio ? sequence.log_ratio[i] : token.logprob - token.old_logprob;
      if (in.ref_logprob) token.ref_logprob = in.ref_logprob[t];
      if (in.entropy) token.entropy = in.entropy[t];
    }
    const float d = policy_token(params, token, counts ? 1.0f : 0.0f, in.ref_logprob != nullptr,
                                 in.entropy != nullptr, stats);
    if (grad) grad[t] = d;
    if (grad_entropy) grad_entropy[t] = -params.entropy_coef * token.weight;
  }
  float* out = partials + static_cast<int64_t>(blockIdx.x) * kColumns;
  for (int k = 0; k < kNumPolicySums; ++k) {
    const float sum = block_merge(stats.sum[k], Add());
    if (threadIdx.x == 0) out[k] = sum;
  }
  const float least = block_merge(stats.least, Least());
  const float most = block_merge(stats.most, Most());
  if (threadIdx.x != 0) return;
  out[kNumPolicySums] = least;
  out[kNumPolicySums + 1] = most;
}

__global__ void __launch_bounds__(kThreads)
    merge_kernel(const float* partials, int64_t num_blocks, float* loss, float* metrics) {
  double sum[kNumPolicySums] = {};
  float least = INFINITY, most = -INFINITY;
  for (int64_t block = threadIdx.x; block < num_blocks; block += kThreads) {
    const float* row = partials + block * kColumns;
    for (int k = 0; k < kNumPolicySums; ++k) sum[k] += row[k];
    least = Least()(least, row[kNumPolicySums]);
    most = Most()(most, row[kNumPolicySums + 1]);
  }
  for (int k = 0; k < kNumPolicySums; ++k) sum[k] = block_merge(sum[k], Add());
  least = block_merge(least, Least());
  most = block_merge(most, Most());
  if (threadIdx.x != 0) return;
  *loss = static_cast<float>(sum[kLossSum]);
  policy_metrics(sum, least, most, metrics);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "policy_loss: ", cudaGetErrorString(error));
}

template <class T>
const T* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor logprob, Tensor old_logprob, Tensor advantages, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> mask, std::optional<Tensor> ref_logprob, std::optional<Tensor> entropy,
    bool sequence_level, int64_t surrogate, double ratio_low, double ratio_high, double ratio_cap,
    double log_ratio_clamp, int64_t kl_type, double kl_coef, double kl_input_clamp,
    double kl_output_clamp, double entropy_coef, int64_t denominator, bool divide_by_length,
    double scale, bool want_grad, bool want_entropy_grad) {
  using torch::headeronly::ScalarType;
  RLK_CHECK_CUDA(logprob);
  RLK_CHECK_DTYPE(logprob, Float);
  RLK_CHECK_CONTIGUOUS(logprob);
  RLK_CHECK_CONTIGUOUS(old_logprob);
  RLK_CHECK_CONTIGUOUS(advantages);
  const int64_t num_tokens = logprob.numel();
  STD_TORCH_CHECK(old_logprob.numel() == num_tokens, "old_logprob must have the size of logprob");

  Inputs in{};
  in.sequences = {nullptr, nullptr, 1, num_tokens, num_tokens};
  in.per_token = true;
  if (cu_seqlens.has_value()) {
    in.sequences.count = cu_seqlens->numel() - 1;
    if (cu_seqlens->scalar_type() == ScalarType::Int)
      in.sequences.narrow = cu_seqlens->const_data_ptr<int32_t>();
    else
      in.sequences.wide = cu_seqlens->const_data_ptr<int64_t>();
    in.per_token = advantages.numel() != in.sequences.count;
  } else if (logprob.dim() == 2) {
    in.sequences.count = logprob.size(0);
    in.sequences.row = logprob.size(1);
    in.per_token = advantages.dim() == 2;
  }
  const int64_t num_sequences = in.sequences.count;
  STD_TORCH_CHECK(advantages.numel() == (in.per_token ? num_tokens : num_sequences),
                  "advantages must have one element per sequence or per token");
  in.logprob = logprob.const_data_ptr<float>();
  in.old_logprob = old_logprob.const_data_ptr<float>();
  in.advantage = advantages.const_data_ptr<float>();
  in.ref_logprob = optional_data<float>(ref_logprob);
  in.entropy = optional_data<float>(entropy);
  in.mask = optional_data<bool>(mask);
  const PolicyParams params{
      .surrogate = static_cast<int>(surrogate),
      .bounds = {static_cast<float>(ratio_low), static_cast<float>(ratio_high),
                 static_cast<float>(ratio_cap)},
      .log_ratio_clamp = static_cast<float>(log_ratio_clamp),
      .kl = {static_cast<int>(kl_type), static_cast<float>(kl_coef),
             static_cast<float>(kl_input_clamp), static_cast<float>(kl_output_clamp)},
      .entropy_coef = static_cast<float>(entropy_coef),
  };

  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(logprob.get_device_index(), &handle));
  const cudaStream_t stream = static_cast<cudaStream_t>(handle);

  Tensor loss = torch::stable::new_empty(logprob, {}, ScalarType::Float);
  Tensor metrics = torch::stable::new_empty(logprob, {kNumPolicyMetrics}, ScalarType::Float);
  const auto coefficients = [&](bool wanted) {
    if (!wanted) return torch::stable::new_empty(logprob, {0}, ScalarType::Float);
    return torch::stable::new_empty(logprob, logprob.sizes(), ScalarType::Float);
  };
  Tensor grad = coefficients(want_grad);
  Tensor grad_entropy = coefficients(want_entropy_grad);

  SequenceStats stats{};
  std::optional<Tensor> lengths, log_ratios;
  if ((in.mask || sequence_level) && num_sequences > 0) {
    lengths = torch::stable::new_empty(logprob, {num_sequences}, ScalarType::Long);
    stats.length = lengths->mutable_data_ptr<int64_t>();
    if (sequence_level) {
      log_ratios = torch::stable::new_empty(logprob, {num_sequences}, ScalarType::Float);
      stats.log_ratio = log_ratios->mutable_data_ptr<float>();
    }
    sequence_kernel<<<num_sequences, kThreads, 0, stream>>>(in, stats);
    check_launch();
  }
  const int64_t num_blocks = (num_tokens + kBlock - 1) / kBlock;
  Tensor partials = torch::stable::new_empty(logprob, {num_blocks, kColumns}, ScalarType::Float);
  if (num_blocks > 0) {
    token_kernel<<<num_blocks, kThreads, 0, stream>>>(
        in, stats, params, static_cast<int>(denominator), divide_by_length, scale,
        want_grad ? grad.mutable_data_ptr<float>() : nullptr,
        want_entropy_grad ? grad_entropy.mutable_data_ptr<float>() : nullptr,
        partials.mutable_data_ptr<float>());
    check_launch();
  }
  merge_kernel<<<1, kThreads, 0, stream>>>(partials.const_data_ptr<float>(), num_blocks,
                                           loss.mutable_data_ptr<float>(),
                                           metrics.mutable_data_ptr<float>());
  check_launch();
  return {loss, metrics, grad, grad_entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CUDA, m) { m.impl("policy_loss_fwd", TORCH_BOX(&forward)); }

}  // namespace rlkern
