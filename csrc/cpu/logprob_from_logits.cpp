// Log-prob, logsumexp, entropy and their kin of given logits: each logit is read once, and each
// gradient written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

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
// Where a block has a value for the top-k, that many are passed over at a time.
constexpr int64_t kStrip = 128;

template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);

// What happens to logits between memory and the softmax.
struct View {
  int64_t vocab;  // columns that exist
  Softcap softcap;
  bool round;        // to bfloat16
  const bool* mask;  // by column; null: every one is allowed

  bool plain() const { return !softcap.on() && !round && !mask; }
};

// Logits past `left` are -inf.
template <class V, class T>
RLK_HD V load_logits(const T* p, int64_t left) {
  if (left >= kWidth<V>) return widen<V>(p);
  V x = V{} - INFINITY;
  for (int64_t i = 0; i < left; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}

// y[0 .. n) of logits x as the softmax sees them, with their part of the mask; y has room for
// whole vectors.
template <class V, class T>
RLK_HD void see(const T* x, const bool* mask, int64_t n, const View& view, float* y) {
  const Softcap softcap = view.softcap;
  const bool round = view.round;
  for (int64_t j = 0; j < n; j += kWidth<V>) {
    V v = load_logits<V>(x + j, n - j);
    if (round) v = round_to_bf16(v);
    if (softcap.on()) v = softcap.apply(v);
    if (mask) {
      const auto allowed = lanes_where<V>(mask + j, n - j);
      v = only(allowed, v) + only(~allowed, V{} - INFINITY);
    }
    store(y + j, v);
  }
}

// The k largest values of a row that is offered from its first column on. Of equal ones the first
// stays; -inf is never among them.
class TopK {
 public:
  struct Entry {
    float value;
    int64_t column;
    bool operator<(const Entry& other) const {
      return value > other.value || (value == other.value && column < other.column);
    }
  };

  explicit TopK(int64_t k) : k_(k) { clear(); }
  void clear() {
    entries_.clear();
    bar_ = k_ > 0 ? -INFINITY : INFINITY;
  }
  // What a value must exceed.
  float bar() const { return bar_; }

  // x[0 .. n) begins at column `first`.
  template <class V, class T>
  RLK_HD void offer(const T* x, int64_t n, int64_t first) {
    for (int64_t j = 0; j < n; j += kStrip) {
      const int64_t end = std::min(n, j + kStrip);
      V top = V{} - INFINITY;
      for (int64_t i = j; i < end; i += kWidth<V>) top = vmax(load_logits<V>(x + i, end - i), top);
      if (!(reduce_max(top) > bar_)) continue;
      for (int64_t i = j; i < end; ++i)
        if (static_cast<float>(x[i]) > bar_) push({static_cast<float>(x[i]), first + i});
    }
  }

  // Largest first; nothing may be offered after it.
  const std::vector<Entry>& sorted() {
    std::sort_heap(entries_.begin(), entries_.end());
    return entries_;
  }

 private:
  void push(Entry entry) {
    if (static_cast<int64_t>(entries_.size()) == k_) {
      std::pop_heap(entries_.begin(), entries_.end());
      entries_.back() = entry;
    } else {
      entries_.push_back(entry);
    }
    std::push_heap(entries_.begin(), entries_.end());
    if (static_cast<int64_t>(entries_.size()) == k_) bar_ = entries_.front().value;
  }

  int64_t k_;
  float bar_;
  std::vector<Entry> entries_;
};

template <class V, class T>
RLK_HD SoftmaxStats block_stats(const T* row, int64_t count, float inv) {
  V top = V{} - INFINITY;
  for (int64_t j = 0; j < count; j += kWidth<V>)
    top = vmax(load_logits<V>(row + j, count - j), top);
  SoftmaxStats stats;
  stats.max = reduce_max(top);
  // All -inf: nothing to add. The sums start from a finite maximum, else -inf - -inf is NaN.
  if (stats.max == -INFINITY) {
    for (int64_t j = 0; j < count; ++j)
      if (std::isnan(static_cast<float>(row[j]))) stats.sum = NAN;
    return stats;
  }
  V sum{}, dot{}, sq{};
  for (int64_t j = 0; j < count; j += kWidth<V>) {
    V d = (load_logits<V>(row + j, count - j) - stats.max) * inv;
    d = at_least(d, kExpUnderflow);
    const V e = exp_in_range(d);
    sum += e;
    dot += e * d;
    sq += e * e;
  }
  stats.sum = reduce_add(sum);
  stats.dot = reduce_add(dot);
  stats.sq = reduce_add(sq);
  return stats;
}

// Adds a block that starts at column `first`.
template <class V, class T>
RLK_HD void fold(const T* block, int64_t first, int64_t count, float inv, SoftmaxStats& stats,
                 TopK& best) {
  const SoftmaxStats more = block_stats<V>(block, count, inv);
  if (more.max > best.bar()) best.offer<V>(block, count, first);
  stats.merge(more, inv);
}

template <class V, class T>
RLK_HD SoftmaxStats row_stats(const T* row, const View& view, float inv, TopK& best) {
  SoftmaxStats stats;
  best.clear();
  const bool plain = view.plain();
  float seen[kBlock];
  for (int64_t j = 0; j < view.vocab; j += kBlock) {
    const int64_t count = std::min(kBlock, view.vocab - j);
    if (plain) {
      fold<V>(row + j, j, count, inv, stats, best);
      continue;
    }
    see<V>(row + j, view.mask ? view.mask + j : nullptr, count, view, seen);
    fold<V>(seen, j, count, inv, stats, best);
  }
  return stats;
}

// The gradient of a block off the picked columns, of logits as the softmax sees them; `grad` may be
// where y is. With kPlain neither the cap nor the mask is looked at.
template <class V, bool kPlain, class S, class T>
RLK_HD void block_grad(const S* y, T* grad, int64_t count, float inv, float logsumexp,
                       SoftmaxGrad g, Softcap softcap, const bool* mask) {
  for (int64_t j = 0; j < count; j += kWidth<V>) {
    const int64_t left = count - j;
    const V v = load_logits<V>(y + j, left);
    V d = g.off_target(v * inv - logsumexp) * inv;
    if constexpr (!kPlain) {
      if (softcap.on()) d *= softcap.slope(v);
      if (mask) d = only(lanes_where<V>(mask + j, left), d);
    }
    if (left >= kWidth<V>)
      store(grad + j, d);
    else
      store_partial(grad + j, d, left);
  }
}

template <class V, class T>
RLK_HD void row_grad(const T* row, T* grad, const View& view, float inv, float logsumexp,
                     SoftmaxGrad g) {
  if (view.plain()) {
    block_grad<V, true>(row, grad, view.vocab, inv, logsumexp, g, view.softcap, nullptr);
    return;
  }
  float seen[kBlock];
  for (int64_t j = 0; j < view.vocab; j += kBlock) {
    const int64_t count = std::min(kBlock, view.vocab - j);
    const bool* mask = view.mask ? view.mask + j : nullptr;
    see<V>(row + j, mask, count, view, seen);
    block_grad<V, false>(seen, grad + j, count, inv, logsumexp, g, view.softcap, mask);
  }
}

// Sixteen lanes with AVX-512, eight without (see vec.h).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLK_SIXTEEN __attribute__((target("arch=x86-64-v4")))
bool sixteen() { return cpu_isa() >= Isa::kAvx512; }
#else
#define RLK_SIXTEEN
bool sixteen() { return false; }
#endif
#define RLK_INSTANTIATE(T)                                                                       \
  RLK_SIXTEEN SoftmaxStats stats_16(const T* row, const View& view, float inv, TopK& best) {     \
    return row_stats<f32x16>(row, view, inv, best);                                              \
  }                                                                                              \
  RLK_MULTIVERSION SoftmaxStats stats_8(const T* row, const View& view, float inv, TopK& best) { \
    return row_stats<f32x8>(row, view, inv, best);                                               \
  }                                                                                              \
  RLK_SIXTEEN void grad_16(const T* row, T* grad, const View& view, float inv, float logsumexp,  \
                           SoftmaxGrad g) {                                                      \
    row_grad<f32x16>(row, grad, view, inv, logsumexp, g);                                        \
  }                                                                                              \
  RLK_MULTIVERSION void grad_8(const T* row, T* grad, const View& view, float inv,               \
                               float logsumexp, SoftmaxGrad g) {                                 \
    row_grad<f32x8>(row, grad, view, inv, logsumexp, g);                                         \
  }                                                                                              \
  RLK_SIXTEEN void see_16(const T* x, const bool* mask, int64_t n, const View& view, float* y) { \
    see<f32x16>(x, mask, n, view, y);                                                            \
  }                                                                                              \
  RLK_MULTIVERSION void see_8(const T* x, const bool* mask, int64_t n, const View& view,         \
                              float* y) {                                                        \
    see<f32x8>(x, mask, n, view, y);                                                             \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE
#undef RLK_SIXTEEN

template <class V>
const V* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<V>() : nullptr;
}

// The schemas' arguments beside the upstream gradients, checked.
struct Inputs {
  int64_t num_rows, columns, stride, num_ids, ignore_index;
  const int64_t *targets, *ids;
  const float* row_temperature;
  float temperature;
  View view;

  Inputs(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& ids,
         const std::optional<Tensor>& vocab_mask, const std::optional<Tensor>& row_temperature,
         double temperature, double logit_scale, double softcap, int64_t ignore_index,
         int64_t vocab_size, bool round_logits)
      : ignore_index(ignore_index), temperature(static_cast<float>(temperature)) {
    RLK_CHECK_CPU(logits);
    RLK_CHECK_DIM(logits, 2);
    RLK_CHECK_DTYPE(targets, Long);
    RLK_CHECK_CONTIGUOUS(targets);
    num_rows = logits.size(0);
    columns = logits.size(1);
    stride = logits.stride(0);
    RLK_CHECK_SIZE(targets, 0, num_rows);
    STD_TORCH_CHECK(columns == 0 || logits.stride(1) == 1, "logits must have contiguous rows");
    STD_TORCH_CHECK(vocab_size >= 0 && vocab_size <= columns, "vocab_size must be in [0, ", columns,
                    "], got ", vocab_size);
    if (ids) {
      RLK_CHECK_DTYPE(*ids, Long);
      RLK_CHECK_DIM(*ids, 2);
      RLK_CHECK_SIZE(*ids, 0, num_rows);
      RLK_CHECK_CONTIGUOUS(*ids);
    }
    if (vocab_mask) {
      RLK_CHECK_DTYPE(*vocab_mask, Bool);
      RLK_CHECK_SIZE(*vocab_mask, 0, columns);
      RLK_CHECK_CONTIGUOUS(*vocab_mask);
    }
    num_ids = ids ? ids->size(1) : 0;
    this->targets = targets.const_data_ptr<int64_t>();
    this->ids = optional_data<int64_t>(ids);
    this->row_temperature = optional_data<float>(row_temperature);
    // rounding moves no bfloat16
    const bool round =
        round_logits && logits.scalar_type() != torch::headeronly::ScalarType::BFloat16;
    view = {vocab_size,
            {static_cast<float>(logit_scale), static_cast<float>(softcap)},
            round,
            optional_data<bool>(vocab_mask)};
  }

  float inverse_temperature(int64_t row) const {
    return view.softcap.inverse(row_temperature ? row_temperature[row] : temperature);
  }
  bool in_vocab(int64_t column) const { return column >= 0 && column < view.vocab; }
  // A thread is worth starting for about this many logits.
  int64_t grain() const { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns)); }
};

// Some logits of a row as the softmax sees them: by the instructions that the row goes through, so
// that the largest of the row is equal to its maximum.
template <class T>
class Picked {
 public:
  explicit Picked(int64_t most)
      : x_(most), allowed_(new bool[most]), y_((most + kLanes - 1) / kLanes * kLanes) {}

  // In the columns' order; NaN where there is no such column.
  const float* read(const Inputs& in, const T* row, const int64_t* columns, int64_t count) {
    const bool* mask = in.view.mask;
    for (int64_t k = 0; k < count; ++k) {
      const bool exists = in.in_vocab(columns[k]);
      x_[k] = exists ? row[columns[k]] : static_cast<T>(NAN);
      allowed_[k] = !(mask && exists) || mask[columns[k]];
    }
    const bool* allowed = mask ? allowed_.get() : nullptr;
    if (sixteen())
      see_16(x_.data(), allowed, count, in.view, y_.data());
    else
      see_8(x_.data(), allowed, count, in.view, y_.data());
    return y_.data();
  }

 private:
  std::vector<T> x_;
  std::unique_ptr<bool[]> allowed_;
  std::vector<float> y_;
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs forward(Tensor logits, Tensor targets, std::optional<Tensor> ids,
                std::optional<Tensor> vocab_mask, std::optional<Tensor> row_temperature,
                double temperature, double logit_scale, double softcap, int64_t ignore_index,
                int64_t vocab_size, bool round_logits, int64_t topk) {
  const Inputs in(logits, targets, ids, vocab_mask, row_temperature, temperature, logit_scale,
                  softcap, ignore_index, vocab_size, round_logits);
  STD_TORCH_CHECK(topk >= 0 && topk <= vocab_size, "topk must be in [0, vocab_size], got ", topk);
  using torch::headeronly::ScalarType;
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(logits, shape, type);
  };
  const int64_t rows = in.num_rows;
  Tensor logprob = empty({rows}, ScalarType::Float);
  Tensor logsumexp = empty({rows}, ScalarType::Float);
  Tensor entropy = empty({rows}, ScalarType::Float);
  Tensor sum_sq_prob = empty({rows}, ScalarType::Float);
  Tensor is_top1 = empty({rows}, ScalarType::Bool);
  Tensor id_logprob = empty({rows, in.num_ids}, ScalarType::Float);
  Tensor topk_values = empty({rows, topk}, ScalarType::Float);
  Tensor topk_ids = empty({rows, topk}, ScalarType::Long);
  float* logprob_out = logprob.mutable_data_ptr<float>();
  float* lse_out = logsumexp.mutable_data_ptr<float>();
  float* entropy_out = entropy.mutable_data_ptr<float>();
  float* sum_sq_out = sum_sq_prob.mutable_data_ptr<float>();
  bool* top1_out = is_top1.mutable_data_ptr<bool>();
  float* id_out = id_logprob.mutable_data_ptr<float>();
  float* value_out = topk_values.mutable_data_ptr<float>();
  int64_t* column_out = topk_ids.mutable_data_ptr<int64_t>();

  RLK_DISPATCH_FLOAT(logits, T, {
    const T* data = logits.const_data_ptr<T>();
    torch::stable::parallel_for(0, rows, in.grain(), [&](int64_t begin, int64_t end) {
      TopK best(topk);
      Picked<T> picked(std::max<int64_t>(1, in.num_ids));
      for (int64_t i = begin; i < end; ++i) {
        const T* row = data + i * in.stride;
        const float inv = in.inverse_temperature(i);
        const SoftmaxStats stats =
            sixteen() ? stats_16(row, in.view, inv, best) : stats_8(row, in.view, inv, best);
        const auto value = [&](int64_t column, float y) {
          return column == ignore_index ? 0.0f : stats.logprob(y, inv);
        };
        const float hit = *picked.read(in, row, in.targets + i, 1);
        logprob_out[i] = value(in.targets[i], hit);
        lse_out[i] = stats.logsumexp(inv);
        entropy_out[i] = stats.entropy();
        sum_sq_out[i] = stats.sum_sq_prob();
        top1_out[i] = in.targets[i] != ignore_index && hit >= stats.max && !std::isnan(stats.sum);
        const int64_t* wanted = in.ids + i * in.num_ids;
        const float* y = picked.read(in, row, wanted, in.num_ids);
        for (int64_t k = 0; k < in.num_ids; ++k)
          id_out[i * in.num_ids + k] = value(wanted[k], y[k]);
        const auto& entries = best.sorted();
        for (int64_t k = 0; k < topk; ++k) {
          const bool any = k < static_cast<int64_t>(entries.size());
          value_out[i * topk + k] = any ? stats.logprob(entries[k].value, inv) : -INFINITY;
          column_out[i * topk + k] = any ? entries[k].column : -1;
        }
      }
    });
  });
  return {logprob, logsumexp, entropy, sum_sq_prob, is_top1, id_logprob, topk_values, topk_ids};
}

// The upstream gradients of one row's log-probs, summed by column.
class Hits {
 public:
  void clear() {
    total_ = 0.0f;
    hits_.clear();
  }
  void add(const Inputs& in, int64_t column, float upstream) {
    if (column == in.ignore_index) return;
    total_ += upstream;
    if (in.in_vocab(column)) hits_.push_back({column, upstream});
  }
  void sum_by_column() {
    const auto before = [](const Hit& x, const Hit& y) { return x.column < y.column; };
    std::stable_sort(hits_.begin(), hits_.end(), before);
    columns_.clear();
    upstream_.clear();
    for (const Hit& hit : hits_) {
      if (!columns_.empty() && columns_.back() == hit.column) {
        upstream_.back() += hit.upstream;
        continue;
      }
      columns_.push_back(hit.column);
      upstream_.push_back(hit.upstream);
    }
  }

  // Of every hit, also those outside the vocabulary.
  float total() const { return total_; }
  int64_t count() const { return columns_.size(); }
  const int64_t* columns() const { return columns_.data(); }
  float upstream(int64_t k) const { return upstream_[k]; }

 private:
  struct Hit {
    int64_t column;
    float upstream;
  };
  float total_;
  std::vector<Hit> hits_;
  std::vector<int64_t> columns_;
  std::vector<float> upstream_;
};

// `grad` may be the logits themselves.
void write_gradient(const std::optional<Tensor>& grad_logprob,
                    const std::optional<Tensor>& grad_logsumexp,
                    const std::optional<Tensor>& grad_entropy,
                    const std::optional<Tensor>& grad_id_logprob, const Tensor& logits,
                    const Tensor& logsumexp, const Tensor& entropy, const Inputs& in,
                    const Tensor& grad) {
  const float* a = optional_data<float>(grad_logprob);
  const float* c = optional_data<float>(grad_logsumexp);
  const float* b = optional_data<float>(grad_entropy);
  const float* at_ids = optional_data<float>(grad_id_logprob);
  const int64_t num_ids = at_ids ? in.num_ids : 0;
  const float* lse = logsumexp.const_data_ptr<float>();
  const float* row_entropy = entropy.const_data_ptr<float>();
  const int64_t grad_stride = grad.stride(0);
  const View& view = in.view;

  RLK_DISPATCH_FLOAT(logits, T, {
    const T* data = logits.const_data_ptr<T>();
    T* out = grad.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, in.num_rows, in.grain(), [&](int64_t begin, int64_t end) {
      Hits hits;
      Picked<T> picked(1 + num_ids);
      std::vector<T> at_hits(1 + num_ids);
      for (int64_t i = begin; i < end; ++i) {
        hits.clear();
        if (a) hits.add(in, in.targets[i], a[i]);
        for (int64_t k = i * num_ids; k < (i + 1) * num_ids; ++k)
          hits.add(in, in.ids[k], at_ids[k]);
        hits.sum_by_column();
        const float inv = in.inverse_temperature(i);
        const SoftmaxGrad g(hits.total(), b ? b[i] : 0.0f, c ? c[i] : 0.0f,
                            b ? row_entropy[i] : 0.0f);
        const T* row = data + i * in.stride;
        T* grad_row = out + i * grad_stride;
        // before the gradient goes over the logits
        const float* y = picked.read(in, row, hits.columns(), hits.count());
        for (int64_t k = 0; k < hits.count(); ++k) {
          const float slope = view.softcap.on() ? view.softcap.slope(y[k]) : 1.0f;
          const float d = (hits.upstream(k) + g.off_target(y[k] * inv - lse[i])) * inv * slope;
          const bool allowed = !view.mask || view.mask[hits.columns()[k]];
          at_hits[k] = static_cast<T>(allowed ? d : 0.0f);
        }
        if (sixteen())
          grad_16(row, grad_row, view, inv, lse[i], g);
        else
          grad_8(row, grad_row, view, inv, lse[i], g);
        for (int64_t k = 0; k < hits.count(); ++k) grad_row[hits.columns()[k]] = at_hits[k];
        std::fill(grad_row + view.vocab, grad_row + in.columns, T(0.0f));
      }
    });
  });
}

Tensor backward(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_logsumexp,
                std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_id_logprob,
                Tensor logits, Tensor targets, std::optional<Tensor> ids,
                std::optional<Tensor> vocab_mask, std::optional<Tensor> row_temperature,
                Tensor logsumexp, Tensor entropy, double temperature, double logit_scale,
                double softcap, int64_t ignore_index, int64_t vocab_size, bool round_logits) {
  const Inputs in(logits, targets, ids, vocab_mask, row_temperature, temperature, logit_scale,
                  softcap, ignore_index, vocab_size, round_logits);
  Tensor grad = torch::stable::new_empty(logits, {in.num_rows, in.columns});
  write_gradient(grad_logprob, grad_logsumexp, grad_entropy, grad_id_logprob, logits, logsumexp,
                 entropy, in, grad);
  return grad;
}

void backward_inplace(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_logsumexp,
                      std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_id_logprob,
                      Tensor logits, Tensor targets, std::optional<Tensor> ids,
                      std::optional<Tensor> vocab_mask, std::optional<Tensor> row_temperature,
                      Tensor logsumexp, Tensor entropy, double temperature, double logit_scale,
                      double softcap, int64_t ignore_index, int64_t vocab_size, bool round_logits) {
  const Inputs in(logits, targets, ids, vocab_mask, row_temperature, temperature, logit_scale,
                  softcap, ignore_index, vocab_size, round_logits);
  write_gradient(grad_logprob, grad_logsumexp, grad_entropy, grad_id_logprob, logits, logsumexp,
                 entropy, in, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("logprob_from_logits_fwd", TORCH_BOX(&forward));
  m.impl("logprob_from_logits_bwd", TORCH_BOX(&backward));
  m.impl("logprob_from_logits_bwd_inplace", TORCH_BOX(&backward_inplace));
}

}  // namespace rlkern
