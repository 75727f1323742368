// A token a row: each logit is read once from memory; filters read the row again, from the cache,
// for the few that they can keep.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "isa.h"
#include "lanes.h"
#include "rlkern/math/philox.h"
#include "rlkern/math/sample.h"
#include "vec.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace rlkern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = kSampleChunk;
// Where a chunk has a logit that may be kept, that many are passed over at a time.
constexpr int64_t kStrip = 128;
// Logits are told apart by this many steps of 1 / kBinsPerNat below the largest.
constexpr int64_t kBins = 2048;
constexpr float kBinsPerNat = 32.0f;
constexpr float kLeastFinite = std::numeric_limits<float>::lowest();

template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);

// Logits past `left` are -inf.
template <class V, class T>
RLK_HD V load_logits(const T* p, int64_t left) {
  if (left >= kWidth<V>) return widen<V>(p);
  V x = V{} - INFINITY;
  for (int64_t i = 0; i < left; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}

// What one reading of a chunk leaves.
struct Chunk {
  float max;
  float dot;    // sum of e^d d, NaN where the chunk has a NaN or +inf
  int64_t sum;  // of weights; both with d relative to the chunk's own maximum
};

template <class V>
RLK_HD auto truncated_weights(V e) {
  return __builtin_convertvector(weight_of(e), typename Narrow<V>::Ints);
}

// groups[kLanes]: maxima of disjoint columns, -inf where there are fewer
template <class V, class T>
RLK_HD Chunk chunk_stats(const T* x, int64_t count, float inv, float* groups) {
  using I = typename Narrow<V>::Ints;
  V top = V{} - INFINITY;
  for (int64_t j = 0; j < count; j += kWidth<V>)
    top = greater(load_logits<V>(x + j, count - j), top);
  for (int64_t i = 0; i < kLanes; ++i) groups[i] = i < kWidth<V> ? top[i] : -INFINITY;
  Chunk chunk{reduce_max(top), 0.0f, 0};
  if (chunk.max == -INFINITY) {
    for (int64_t j = 0; j < count; ++j)
      if (std::isnan(static_cast<float>(x[j]))) chunk.dot = NAN;
    return chunk;
  }
  V dot{};
  I low{}, high{};
  for (int64_t j = 0; j < count; j += kWidth<V>) {
    const V d = greater(V{} - kExpNormal, (load_logits<V>(x + j, count - j) - chunk.max) * inv);
    const V e = exp_normal(d);
    dot += e * d;
    const I weights = truncated_weights(e);
    low += weights & 0xFFFF;
    high += weights >> 16;
  }
  chunk.dot = reduce_add(dot);
  for (int64_t i = 0; i < kWidth<V>; ++i) chunk.sum += low[i] + (int64_t{high[i]} << 16);
  return chunk;
}

template <class V, class T>
RLK_HD void row_stats(const T* row, int64_t vocab, float inv, Chunk* chunks, float* groups) {
  for (int64_t j = 0; j < vocab; j += kChunk, ++chunks, groups += kLanes)
    *chunks = chunk_stats<V>(row + j, std::min(kChunk, vocab - j), inv, groups);
}

// out[0 .. n) = the weights of x relative to `top`; has room for whole vectors
template <class V, class T>
RLK_HD void find_weights(const T* x, int64_t n, float top, float inv, int32_t* out) {
  for (int64_t j = 0; j < n; j += kWidth<V>) {
    const V d = (load_logits<V>(x + j, n - j) - top) * inv;
    store_as(out + j, truncated_weights(exp_decay(d)));
  }
}

// The finite logits from `cut` on, by their columns; how many there are. With null out they are
// counted alone.
template <class V, class T>
RLK_HD int64_t collect(const T* row, int64_t vocab, const Chunk* chunks, float cut, float* values,
                       int32_t* columns) {
  cut = std::max(cut, kLeastFinite);
  int64_t found = 0;
  for (int64_t first = 0; first < vocab; first += kChunk, ++chunks) {
    if (!(chunks->max >= cut)) continue;
    const int64_t end = std::min(vocab, first + kChunk);
    for (int64_t j = first; j < end; j += kStrip) {
      const int64_t stop = std::min(end, j + kStrip);
      V top = V{} - INFINITY;
      for (int64_t i = j; i < stop; i += kWidth<V>)
        top = greater(load_logits<V>(row + i, stop - i), top);
      if (reduce_max(top) < cut) continue;
      if (!values) {
        for (int64_t i = j; i < stop; ++i) found += static_cast<float>(row[i]) >= cut;
        continue;
      }
      for (int64_t i = j; i < stop; ++i) {
        const float x = static_cast<float>(row[i]);
        values[found] = x;
        columns[found] = static_cast<int32_t>(i);
        found += x >= cut;
      }
    }
  }
  return found;
}

// The columns of a row that are kept, `room` at most.
template <class V, class T>
RLK_HD void find_kept(const T* row, int64_t vocab, float threshold, int64_t last, int64_t* out,
                      int64_t room) {
  int64_t found = 0;
  for (int64_t j = 0; j < vocab; j += kStrip) {
    const int64_t stop = std::min(vocab, j + kStrip);
    V top = V{} - INFINITY;
    for (int64_t i = j; i < stop; i += kWidth<V>)
      top = greater(load_logits<V>(row + i, stop - i), top);
    if (reduce_max(top) < threshold) continue;
    for (int64_t i = j; i < stop && found < room; ++i) {
      const float x = static_cast<float>(row[i]);
      out[found] = i;
      found += x > threshold || (x == threshold && i <= last);
    }
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
#define RLK_INSTANTIATE(T)                                                                        \
  RLK_SIXTEEN void stats_16(const T* row, int64_t vocab, float inv, Chunk* chunks,                \
                            float* groups) {                                                      \
    row_stats<f32x16>(row, vocab, inv, chunks, groups);                                           \
  }                                                                                               \
  RLK_MULTIVERSION void stats_8(const T* row, int64_t vocab, float inv, Chunk* chunks,            \
                                float* groups) {                                                  \
    row_stats<f32x8>(row, vocab, inv, chunks, groups);                                            \
  }                                                                                               \
  RLK_SIXTEEN void weights_16(const T* x, int64_t n, float top, float inv, int32_t* out) {        \
    find_weights<f32x16>(x, n, top, inv, out);                                                    \
  }                                                                                               \
  RLK_MULTIVERSION void weights_8(const T* x, int64_t n, float top, float inv, int32_t* out) {    \
    find_weights<f32x8>(x, n, top, inv, out);                                                     \
  }                                                                                               \
  RLK_SIXTEEN int64_t collect_16(const T* row, int64_t vocab, const Chunk* chunks, float cut,     \
                                 float* values, int32_t* columns) {                               \
    return collect<f32x16>(row, vocab, chunks, cut, values, columns);                             \
  }                                                                                               \
  RLK_MULTIVERSION int64_t collect_8(const T* row, int64_t vocab, const Chunk* chunks, float cut, \
                                     float* values, int32_t* columns) {                           \
    return collect<f32x8>(row, vocab, chunks, cut, values, columns);                              \
  }                                                                                               \
  RLK_SIXTEEN void kept_16(const T* row, int64_t vocab, float threshold, int64_t last,            \
                           int64_t* out, int64_t room) {                                          \
    find_kept<f32x16>(row, vocab, threshold, last, out, room);                                    \
  }                                                                                               \
  RLK_MULTIVERSION void kept_8(const T* row, int64_t vocab, float threshold, int64_t last,        \
                               int64_t* out, int64_t room) {                                      \
    find_kept<f32x8>(row, vocab, threshold, last, out, room);                                     \
  }
RLK_INSTANTIATE(float)
RLK_INSTANTIATE(bf16)
RLK_INSTANTIATE(fp16)
#undef RLK_INSTANTIATE
#undef RLK_SIXTEEN

template <class T>
void weights(const T* x, int64_t n, float top, float inv, int32_t* out) {
  sixteen() ? weights_16(x, n, top, inv, out) : weights_8(x, n, top, inv, out);
}
template <class T>
int64_t collected(const T* row, int64_t vocab, const Chunk* chunks, float cut, float* values,
                  int32_t* columns) {
  return sixteen() ? collect_16(row, vocab, chunks, cut, values, columns)
                   : collect_8(row, vocab, chunks, cut, values, columns);
}
template <class T>
void kept(const T* row, int64_t vocab, float threshold, int64_t last, int64_t* out, int64_t room) {
  sixteen() ? kept_16(row, vocab, threshold, last, out, room)
            : kept_8(row, vocab, threshold, last, out, room);
}

// A row's filters; each may be off.
struct Filters {
  int64_t top_k;
  float top_p, log_min_p;

  bool has_top_k() const { return top_k > 0; }
  bool has_top_p() const { return !(top_p >= 1.0f); }
  bool has_min_p() const { return log_min_p > -INFINITY; }
  bool any() const { return has_top_k() || has_top_p() || has_min_p(); }
};

// Logits above the threshold are kept, and those equal to it up to a column.
struct Kept {
  float threshold = -INFINITY;
  int64_t last = -1;
};

// The first position whose weight takes the sum of those up to it past `target`.
int64_t position_of(const int32_t* weights, int64_t n, int64_t target) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += weights[i];
    if (sum > target) return i;
  }
  return n - 1;
}

// One row at a time, with the memory that it takes.
template <class T>
class Sampler {
 public:
  Sampler(int64_t vocab, bool filters)
      : vocab_(vocab),
        chunks_((vocab + kChunk - 1) / kChunk),
        groups_(chunks_.size() * kLanes),
        masses_(chunks_.size()),
        sums_(chunks_.size()),
        weights_((filters ? vocab : kChunk) + kLanes),
        values_(filters ? vocab + kLanes : 0),
        columns_(filters ? vocab + kLanes : 0) {}

  struct Result {
    int64_t token = -1;
    float logprob = NAN, full_logprob = NAN, entropy = NAN;
    Kept kept{INFINITY, -1};
    int64_t count = 0;
  };

  Result sample(const T* row, float inv, bool greedy, const Filters& filters,
                const Philox<uint32_t>& random, bool wants_count) {
    row_ = row;
    inv_ = inv;
    if (sixteen())
      stats_16(row, vocab_, inv, chunks_.data(), groups_.data());
    else
      stats_8(row, vocab_, inv, chunks_.data(), groups_.data());
    Result result;
    if (!merge()) return result;
    const double log_sum = std::log(sum_);
    result.entropy = static_cast<float>(log_sum - dot_ / sum_);
    double kept_log_sum = log_sum;
    float logit;
    if (filters.any()) {
      result.kept = filter(filters);
      result.count = kept_;
      kept_log_sum = std::log(static_cast<double>(weigh_kept()) / kUnitMass);
      const int64_t i = greedy ? top_of_kept() : draw_kept(random);
      result.token = columns_[i];
      logit = values_[i];
    } else {
      result.kept = {};
      if (wants_count)
        result.count = collected(row, vocab_, chunks_.data(), kLeastFinite, nullptr, nullptr);
      result.token = greedy ? top() : draw(random);
      logit = static_cast<float>(row[result.token]);
    }
    const double d = static_cast<double>(logit - max_) * inv;
    result.logprob = static_cast<float>(d - kept_log_sum);
    result.full_logprob = static_cast<float>(d - log_sum);
    return result;
  }

 private:
  // The row's maximum, mass and entropy sum, out of its chunks; false where it has no distribution.
  bool merge() {
    max_ = -INFINITY;
    bool regular = true;
    for (const Chunk& chunk : chunks_) {
      max_ = std::max(max_, chunk.max);
      regular = regular && !std::isnan(chunk.dot);
    }
    if (!regular || max_ == -INFINITY) return false;
    mass_ = 0;
    dot_ = 0.0;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const Chunk& chunk = chunks_[c];
      sums_[c] = chunk.sum;
      masses_[c] = 0;
      if (chunk.max == -INFINITY) continue;
      const float shift = (chunk.max - max_) * inv_;
      masses_[c] = mass_of(chunk.sum, shift);
      mass_ += masses_[c];
      dot_ += exp_decay(shift) *
              (chunk.dot + static_cast<double>(chunk.sum) / kUnitWeight * std::max(shift, -1e4f));
    }
    sum_ = static_cast<double>(mass_) / kUnitMass;
    return true;
  }

  // The chunk that the draw falls into.
  int64_t draw_chunk(const Philox<uint32_t>& random, int64_t mass) const {
    int64_t left = scaled_down(random.words[0], random.words[1], mass);
    int64_t c = 0;
    while (left >= masses_[c]) left -= masses_[c++];
    return c;
  }
  int64_t draw_within(const Philox<uint32_t>& random, const int32_t* weights, int64_t n,
                      int64_t sum) const {
    return position_of(weights, n, scaled_down(random.words[2], random.words[3], sum));
  }

  int64_t draw(const Philox<uint32_t>& random) {
    const int64_t c = draw_chunk(random, mass_), first = c * kChunk;
    const int64_t count = std::min(kChunk, vocab_ - first);
    weights(row_ + first, count, chunks_[c].max, inv_, weights_.data());
    return first + draw_within(random, weights_.data(), count, sums_[c]);
  }

  int64_t top() const {
    int64_t j = 0;
    while (chunks_[j / kChunk].max != max_) j += kChunk;
    while (static_cast<float>(row_[j]) != max_) ++j;
    return j;
  }

  // A logit that every kept one reaches; without `tight`, whatever the rounding of sums.
  float lower_bound(const Filters& filters, bool tight) {
    float cut = kLeastFinite;
    if (filters.has_top_k()) {
      // that many groups have a logit at least as large
      const size_t k = filters.top_k;
      if (k <= groups_.size()) {
        std::nth_element(groups_.begin(), groups_.begin() + (k - 1), groups_.end(),
                         std::greater<float>());
        cut = std::max(cut, groups_[k - 1]);
      }
    } else if (filters.has_top_p() && tight) {
      // all tokens below this weight have less than 1 - p between them
      const double rest = std::max(0.0, 1.0 - static_cast<double>(filters.top_p)) * sum_;
      cut = std::max(cut, logit_of(std::log(rest / static_cast<double>(vocab_))));
    }
    // beside a top-k the mass that top-p is a share of counts what min-p would drop
    if (filters.has_min_p() && !(filters.has_top_k() && filters.has_top_p()))
      cut = std::max(cut, logit_of(filters.log_min_p));
    return std::min(cut, max_);
  }
  // Somewhat below the logit whose d is given: what is rounded must not drop one.
  float logit_of(double d) const {
    const double x = max_ + d / inv_;
    return static_cast<float>(x - 1e-5 * (1.0 + std::abs(x) + std::abs(max_) + std::abs(d / inv_)));
  }

  // Leaves what is kept in values_ and columns_, kept_ of them.
  Kept filter(const Filters& filters, bool tight = true) {
    kept_ = collected(row_, vocab_, chunks_.data(), lower_bound(filters, tight), values_.data(),
                      columns_.data());
    int64_t mass = mass_;
    if (filters.has_top_k()) {
      if (filters.top_k < kept_) {
        scratch_.assign(values_.begin(), values_.begin() + kept_);
        const auto at = scratch_.begin() + (filters.top_k - 1);
        std::nth_element(scratch_.begin(), at, scratch_.end(), std::greater<float>());
        keep([bar = *at](float x, int32_t) { return x >= bar; });
      }
      mass = 0;
    }
    if (filters.has_top_p()) {
      weights(values_.data(), kept_, max_, inv_, weights_.data());
      if (filters.has_top_k()) {
        for (int64_t i = 0; i < kept_; ++i) mass += weights_[i];
        mass <<= kMassShift;
      }
      const Kept nucleus = top_p(static_cast<double>(filters.top_p) * static_cast<double>(mass));
      // 1 - p is lost in the rounding of the weights
      if (nucleus.last < 0 && !filters.has_top_k() && tight) return filter(filters, false);
      keep([=](float x, int32_t column) {
        return x > nucleus.threshold || (x == nucleus.threshold && column <= nucleus.last);
      });
    }
    if (filters.has_min_p())
      keep([=, this](float x, int32_t) { return (x - max_) * inv_ >= filters.log_min_p; });
    Kept kept{INFINITY, -1};
    for (int64_t i = 0; i < kept_; ++i) kept.threshold = std::min(kept.threshold, values_[i]);
    for (int64_t i = 0; i < kept_; ++i)
      if (values_[i] == kept.threshold) kept.last = columns_[i];
    return kept;
  }

  template <class Wanted>
  void keep(const Wanted& wanted) {
    int64_t n = 0;
    for (int64_t i = 0; i < kept_; ++i) {
      const float x = values_[i];
      const int32_t column = columns_[i];
      values_[n] = x;
      columns_[n] = column;
      n += wanted(x, column);
    }
    kept_ = n;
  }

  int64_t bin_of(float x) const {
    const float step = (max_ - x) * inv_ * kBinsPerNat;
    return step < kBins - 1 ? static_cast<int64_t>(step) : kBins - 1;
  }

  // By logit, then by column, the tokens before which there is less than `wanted`; weights_ is
  // theirs. Sorted is only the bin in which the sum gets there. Last is -1 where it does not.
  Kept top_p(double wanted) {
    const auto reaches = [=](int64_t before) {
      return !(static_cast<double>(before << kMassShift) < wanted);
    };
    bins_.assign(kBins, 0);
    for (int64_t i = 0; i < kept_; ++i) bins_[bin_of(values_[i])] += weights_[i];
    int64_t bin = 0, before = 0;
    while (bin < kBins && !reaches(before + bins_[bin])) before += bins_[bin++];
    if (bin == kBins) return {};
    std::vector<std::pair<float, int32_t>>& sorted = sorted_;
    sorted.clear();
    for (int64_t i = 0; i < kept_; ++i)
      if (bin_of(values_[i]) == bin) sorted.push_back({values_[i], weights_[i]});
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    Kept kept{INFINITY, -1};
    int64_t ties = 0;
    for (const auto& [x, weight] : sorted) {
      // one stays, whatever p
      if (reaches(before) && (before > 0 || ties > 0)) break;
      ties = x == kept.threshold ? ties + 1 : 1;
      kept.threshold = x;
      before += weight;
    }
    for (int64_t i = 0; ties > 0; ++i)
      if (values_[i] == kept.threshold && --ties == 0) kept.last = columns_[i];
    return kept;
  }

  // weights_, sums_ and masses_ of what is kept, chunk by chunk; the masses' sum.
  int64_t weigh_kept() {
    std::fill(masses_.begin(), masses_.end(), 0);
    kept_mass_ = 0;
    for (int64_t begin = 0, end; begin < kept_; begin = end) {
      const int64_t c = columns_[begin] / kChunk;
      end = std::lower_bound(columns_.begin() + begin, columns_.begin() + kept_, (c + 1) * kChunk) -
            columns_.begin();
      weights(values_.data() + begin, end - begin, chunks_[c].max, inv_, weights_.data() + begin);
      sums_[c] = 0;
      for (int64_t i = begin; i < end; ++i) sums_[c] += weights_[i];
      masses_[c] = mass_of(sums_[c], (chunks_[c].max - max_) * inv_);
      kept_mass_ += masses_[c];
    }
    return kept_mass_;
  }

  int64_t draw_kept(const Philox<uint32_t>& random) const {
    const int64_t c = draw_chunk(random, kept_mass_);
    const auto begin = columns_.begin(), end = begin + kept_;
    const int64_t first = std::lower_bound(begin, end, c * kChunk) - begin;
    const int64_t last = std::lower_bound(begin + first, end, (c + 1) * kChunk) - begin;
    return first + draw_within(random, weights_.data() + first, last - first, sums_[c]);
  }
  int64_t top_of_kept() const {
    return std::find(values_.begin(), values_.begin() + kept_, max_) - values_.begin();
  }

  const int64_t vocab_;
  const T* row_;
  float inv_, max_;
  int64_t mass_, kept_mass_, kept_;
  double sum_, dot_;
  std::vector<Chunk> chunks_;
  std::vector<float> groups_;
  std::vector<int64_t> masses_, sums_;
  std::vector<int32_t> weights_;
  std::vector<float> values_, scratch_;
  std::vector<int32_t> columns_;
  std::vector<int64_t> bins_;
  std::vector<std::pair<float, int32_t>> sorted_;
};

template <class V>
const V* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<V>() : nullptr;
}

void check_logits(const Tensor& logits, int64_t vocab_size) {
  RLK_CHECK_CPU(logits);
  RLK_CHECK_DIM(logits, 2);
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) <= 1, "logits must have contiguous rows");
  STD_TORCH_CHECK(vocab_size > 0 && vocab_size <= logits.size(1) && vocab_size <= 1 << 22,
                  "vocab_size must be in [1, min(V, 2^22)], got ", vocab_size);
}

// A thread is worth starting for about this many logits.
int64_t grain(int64_t vocab) { return std::max<int64_t>(1, 16384 / vocab); }

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs sample_tokens(Tensor logits, Tensor branch_ids, Tensor positions,
                      Tensor inverse_temperature, std::optional<Tensor> greedy,
                      std::optional<Tensor> top_k, std::optional<Tensor> top_p,
                      std::optional<Tensor> log_min_p, int64_t seed, int64_t vocab_size,
                      bool wants_count) {
  check_logits(logits, vocab_size);
  const int64_t rows = logits.size(0), stride = logits.stride(0);
#define RLK_CHECK_ROWS(t, type) \
  RLK_CHECK_CPU(t);             \
  RLK_CHECK_DTYPE(t, type);     \
  RLK_CHECK_DIM(t, 1);          \
  RLK_CHECK_SIZE(t, 0, rows);   \
  RLK_CHECK_CONTIGUOUS(t)
  RLK_CHECK_ROWS(branch_ids, Long);
  RLK_CHECK_ROWS(positions, Long);
  RLK_CHECK_ROWS(inverse_temperature, Float);
  if (greedy) {
    RLK_CHECK_ROWS(*greedy, Bool);
  }
  if (top_k) {
    RLK_CHECK_ROWS(*top_k, Long);
  }
  if (top_p) {
    RLK_CHECK_ROWS(*top_p, Float);
  }
  if (log_min_p) {
    RLK_CHECK_ROWS(*log_min_p, Float);
  }
#undef RLK_CHECK_ROWS
  using torch::headeronly::ScalarType;
  const auto empty = [&](int64_t n, ScalarType type) {
    return torch::stable::new_empty(logits, {n}, type);
  };
  Tensor token = empty(rows, ScalarType::Long);
  Tensor logprob = empty(rows, ScalarType::Float);
  Tensor full_logprob = empty(rows, ScalarType::Float);
  Tensor entropy = empty(rows, ScalarType::Float);
  Tensor threshold = empty(rows, ScalarType::Float);
  Tensor last = empty(rows, ScalarType::Long);
  Tensor count = empty(wants_count ? rows : 0, ScalarType::Long);
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* logprob_out = logprob.mutable_data_ptr<float>();
  float* full_out = full_logprob.mutable_data_ptr<float>();
  float* entropy_out = entropy.mutable_data_ptr<float>();
  float* threshold_out = threshold.mutable_data_ptr<float>();
  int64_t* last_out = last.mutable_data_ptr<int64_t>();
  int64_t* count_out = count.mutable_data_ptr<int64_t>();
  const int64_t* branch = branch_ids.const_data_ptr<int64_t>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const float* inverse = inverse_temperature.const_data_ptr<float>();
  const bool* is_greedy = optional_data<bool>(greedy);
  const int64_t* ks = optional_data<int64_t>(top_k);
  const float* ps = optional_data<float>(top_p);
  const float* logs = optional_data<float>(log_min_p);
  RLK_DISPATCH_FLOAT(logits, T, {
    const T* data = logits.const_data_ptr<T>();
    torch::stable::parallel_for(0, rows, grain(vocab_size), [&](int64_t begin, int64_t end) {
      Sampler<T> sampler(vocab_size, ks || ps || logs);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = ks ? ks[i] : 0;
        const Filters filters{k < vocab_size ? k : 0, ps ? ps[i] : 1.0f,
                              logs ? std::min(logs[i], 0.0f) : -INFINITY};
        const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
        const auto random =
            Philox<uint32_t>::of(Philox<uint32_t>{{low(branch[i]), low(branch[i] >> 32),
                                                   low(position[i]), low(position[i] >> 32)}},
                                 static_cast<uint64_t>(seed));
        const auto result = sampler.sample(data + i * stride, inverse[i], is_greedy && is_greedy[i],
                                           filters, random, wants_count);
        token_out[i] = result.token;
        logprob_out[i] = result.logprob;
        full_out[i] = result.full_logprob;
        entropy_out[i] = result.entropy;
        threshold_out[i] = result.kept.threshold;
        last_out[i] = result.kept.last;
        if (wants_count) count_out[i] = result.count;
      }
    });
  });
  return {token, logprob, full_logprob, entropy, threshold, last, count};
}

Tensor kept_tokens(Tensor logits, Tensor threshold, Tensor last, Tensor offsets, int64_t size,
                   int64_t vocab_size) {
  check_logits(logits, vocab_size);
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  RLK_CHECK_DTYPE(threshold, Float);
  RLK_CHECK_SIZE(threshold, 0, rows);
  RLK_CHECK_CONTIGUOUS(threshold);
  RLK_CHECK_DTYPE(last, Long);
  RLK_CHECK_SIZE(last, 0, rows);
  RLK_CHECK_CONTIGUOUS(last);
  RLK_CHECK_DTYPE(offsets, Long);
  RLK_CHECK_SIZE(offsets, 0, rows + 1);
  RLK_CHECK_CONTIGUOUS(offsets);
  using torch::headeronly::ScalarType;
  Tensor ids = torch::stable::new_empty(logits, {size}, ScalarType::Long);
  int64_t* out = ids.mutable_data_ptr<int64_t>();
  const float* bar = threshold.const_data_ptr<float>();
  const int64_t* until = last.const_data_ptr<int64_t>();
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  RLK_DISPATCH_FLOAT(logits, T, {
    const T* data = logits.const_data_ptr<T>();
    torch::stable::parallel_for(0, rows, grain(vocab_size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = std::max<int64_t>(0, bounds[i]), stop = std::min(size, bounds[i + 1]);
        kept(data + i * stride, vocab_size, bar[i], until[i], out + at, stop - at);
      }
    });
  });
  return ids;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
  m.impl("kept_tokens", TORCH_BOX(&kept_tokens));
}

}  // namespace rlkern
