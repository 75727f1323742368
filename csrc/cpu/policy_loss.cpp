// Policy loss, its gradient coefficients and metrics by chunks of tokens, in steps that each are
// one loop over the chunk while it is in cache: rejection, correction, surrogate, KL, likelihood,
// entropy. The chunks' sums are merged in order: the same bits for every number of threads.
#include "rlkern/math/policy_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "exp512.h"
#include "isa.h"
#include "lanes.h"
#include "segments.h"
#include "twin.h"
#include "vec.h"

namespace rlkern {

namespace {

using torch::stable::Tensor;

// A chunk, with what its steps need, stays in L1 and L2. A multiple of kStride.
constexpr int64_t kChunk = 2048;
// What a chunk is padded to: a pair of the widest vectors.
constexpr int64_t kStride = 2 * kLanes;
// A thread is worth starting for about this many tokens.
constexpr int64_t kGrain = 16384;

template <class F>
constexpr int64_t kWidth = sizeof(F) / sizeof(float);
template <class F>
using Ints = decltype(Bits<F>::of(F{}));

// What all tokens of a sequence share: by token, or kStride copies of the one number (`by_token`
// 0).
struct Column {
  const float* data = nullptr;
  int64_t by_token = -1;  // a mask of the index

  explicit operator bool() const { return data; }
};

// A run of tokens with everything that one of them needs; null: not given or not wanted.
struct Tokens {
  int64_t count;
  const float *logprob, *old_logprob, *rollout_logprob, *ref_logprob, *entropy, *nll_weight;
  Column advantage, weight, statistic, correction, drifted, kl_mean, length;
  const uint8_t* counts;  // 1 or 0 by token
  float *grad, *grad_entropy;
};

// The tokens from i on; what does not count may be anything.
template <class F>
struct Reader {
  int64_t i;

  RLK_HD F operator()(const float* data) const { return load_as<F>(data + i); }
  RLK_HD F operator()(const Column& column) const {
    return load_as<F>(column.data + (i & column.by_token));
  }
  template <class From>
  RLK_HD F optional(const From& from) const {
    return from ? (*this)(from) : F{};
  }
};

struct Partial {
  float sum[kNumPolicySums];
  int64_t count[kNumPolicyCounts];
  float least, most;
};

template <class F>
RLK_HD void rejection_step(const PolicyParams& p, const Tokens& t, uint8_t* counts) {
  for (int64_t i = 0; i < t.count; i += kWidth<F>) {
    const Reader<F> read{i};
    PolicyInput<F> in{};
    in.old_logprob = read(t.old_logprob);
    in.rollout_logprob = read(t.rollout_logprob);
    Flags<F>::store(counts + i, Flags<F>::load(counts + i) & ~token_rejected(p, in));
  }
}

template <class F>
RLK_HD void correction_step(const PolicyParams& params, const Tokens& t, float* out,
                            PolicyStats<F>& stats) {
  const PolicyParams p = params;  // out could be a part of params
  for (int64_t i = 0; i < t.count; i += kWidth<F>) {
    const Reader<F> read{i};
    const auto counts = Flags<F>::load(t.counts + i);
    PolicyInput<F> in{};
    in.old_logprob = read(t.old_logprob);
    in.rollout_logprob = read(t.rollout_logprob);
    in.correction = read.optional(t.correction);
    in.advantage = read(t.advantage);
    in.drifted = read.optional(t.drifted);
    store_as(out + i, policy_correction(p, in, counts, stats));
  }
}

// Whether none of `count` tokens counts: the end of a padded row, which costs no formula.
template <int64_t count>
RLK_HD bool none_counts(const uint8_t* counts) {
  constexpr int64_t kWord = count < 8 ? count : 8;
  uint64_t any = 0;
  for (int64_t i = 0; i < count; i += kWord) {
    uint64_t word = 0;
    std::memcpy(&word, counts + i, kWord);
    any |= word;
  }
  return any == 0;
}

// Formulas that are a long chain: two vectors at a time.
constexpr bool is_long(SurrogateKind kind) {
  return kind == SurrogateKind::kHazard || kind == SurrogateKind::kSoftGate ||
         kind == SurrogateKind::kGammaWeight || kind == SurrogateKind::kDppoKl;
}

// kOwn: the ratio is that of the token to old_logprob, and nothing else is read.
template <SurrogateKind kKind, bool kOwn, class F>
RLK_HD void surrogate_step(const PolicyParams& params, const Tokens& t, PolicyStats<F>& out) {
  PolicyParams p = params;
  PolicyStats<F> stats = out;
  const bool corrected = bool(t.correction);
  // what is not given reads as anything, for a choice of addresses in place of one by the token
  const Column any{t.logprob};
  const Column statistic = t.statistic ? t.statistic : any, length = t.length ? t.length : any,
               correction = corrected ? t.correction : any;
  const float* const anchor = p.from_rollout ? t.rollout_logprob : t.old_logprob;
  p.from_rollout = !kOwn;
  if (kOwn) p.level = Level::kToken;
  const auto input = [&](int64_t i) __attribute__((always_inline)) {
    const Reader<F> read{i};
    PolicyInput<F> in{};
    in.logprob = read(t.logprob);
    in.old_logprob = read(t.old_logprob);
    in.advantage = read(t.advantage);
    in.weight = read(t.weight);
    if constexpr (!kOwn) {
      in.rollout_logprob = read(anchor);
      in.statistic = read(statistic);
      in.length = read(length);
      in.correction = read(correction);
    } else if (corrected) {
      in.correction = read(t.correction);
    }
    return in;
  };
  const auto finish = [&](int64_t i, const PolicyInput<F>& in, const PolicyToken<F>& token,
                          Surrogate<F> s) __attribute__((always_inline)) {
    const auto counts = Flags<F>::load(t.counts + i);
    const F grad = policy_surrogate<kKind>(p, in, corrected, counts, token, s, stats);
    if (t.grad) store_as(t.grad + i, grad);
  };
  const auto skip = [&](int64_t i) __attribute__((always_inline)) {
    if (t.grad) store_as(t.grad + i, F{});
  };
  if constexpr (is_long(kKind)) {
    for (int64_t i = 0; i < t.count; i += 2 * kWidth<F>) {
      if (none_counts<2 * kWidth<F>>(t.counts + i)) {
        skip(i);
        skip(i + kWidth<F>);
        continue;
      }
      const PolicyInput<F> in = input(i), next_in = input(i + kWidth<F>);
      const PolicyToken<F> x = policy_ratio(p, in), y = policy_ratio(p, next_in);
      const PolicyToken<Twin<F>> both{
          {x.live, y.live}, {x.old, y.old},         {x.a, y.a},
          {x.x, y.x},       {x.decided, y.decided}, {x.z, y.z},
          {x.r, y.r},       {x.past, y.past},       {x.length, y.length}};
      const Surrogate<Twin<F>> s = surrogate(kKind, both, p.shape);
      finish(i, in, x, {s.loss.a, s.grad.a, s.low.a, s.high.a, s.capped.a});
      finish(i + kWidth<F>, next_in, y, {s.loss.b, s.grad.b, s.low.b, s.high.b, s.capped.b});
    }
  } else {
    for (int64_t i = 0; i < t.count; i += kWidth<F>) {
      if (none_counts<kWidth<F>>(t.counts + i)) {
        skip(i);
        continue;
      }
      const PolicyInput<F> in = input(i);
      const PolicyToken<F> token = policy_ratio(p, in);
      finish(i, in, token, surrogate(kKind, token, p.shape));
    }
  }
  out = stats;
}

// A term beside the surrogate. Its derivative goes to `grad`, or to what is there.
template <class F, class Term>
RLK_HD void term_step(const Tokens& t, float* grad, bool adds, const Term& term) {
  for (int64_t i = 0; i < t.count; i += kWidth<F>) {
    const F more = term(Reader<F>{i}, Flags<F>::load(t.counts + i));
    if (grad) store_as(grad + i, adds ? load_as<F>(grad + i) + more : more);
  }
}

template <class F>
RLK_HD void kl_step(const PolicyParams& params, const Tokens& t, PolicyStats<F>& stats) {
  const PolicyParams p = params;
  term_step<F>(t, t.grad, true, [&](Reader<F> read, Mask<F> counts) __attribute__((always_inline)) {
    PolicyInput<F> in{};
    in.logprob = read(t.logprob);
    in.old_logprob = read(t.old_logprob);
    if (p.from_rollout) in.rollout_logprob = read(t.rollout_logprob);
    in.ref_logprob = read(t.ref_logprob);
    in.weight = read(t.weight);
    in.statistic = read.optional(t.statistic);
    in.kl_mean = read.optional(t.kl_mean);
    return policy_kl(p, in, counts, stats);
  });
}

template <class F>
RLK_HD void nll_step(const PolicyParams& params, const Tokens& t, PolicyStats<F>& stats) {
  const PolicyParams p = params;
  term_step<F>(t, t.grad, true, [&](Reader<F> read, Mask<F> counts) __attribute__((always_inline)) {
    PolicyInput<F> in{};
    in.logprob = read(t.logprob);
    in.nll_weight = read(t.nll_weight);
    in.weight = read(t.weight);
    return policy_nll(p, in, counts, stats);
  });
}

template <class F>
RLK_HD void entropy_step(const PolicyParams& params, const Tokens& t, PolicyStats<F>& stats) {
  const PolicyParams p = params;
  term_step<F>(t, t.grad_entropy, false,
               [&](Reader<F> read, Mask<F> counts) __attribute__((always_inline)) {
                 PolicyInput<F> in{};
                 in.entropy = read(t.entropy);
                 in.weight = read(t.weight);
                 return policy_entropy(p, in, counts, stats);
               });
}

// A loop by surrogate, without a choice inside; for the one of most objectives by its ratio too.
template <class F, size_t... kKinds>
RLK_HD void surrogate_step(const PolicyParams& p, const Tokens& t, PolicyStats<F>& stats,
                           std::index_sequence<kKinds...>) {
  const auto kind = static_cast<size_t>(p.surrogate);
  if (p.surrogate == SurrogateKind::kClip && p.level == Level::kToken && !p.from_rollout)
    return surrogate_step<SurrogateKind::kClip, true>(p, t, stats);
  ((kind == kKinds ? surrogate_step<static_cast<SurrogateKind>(kKinds), false>(p, t, stats)
                   : void()),
   ...);
}

// The count is a multiple of kStride. counts is that of the tokens; corrected has room for as many.
template <class F>
RLK_HD void all_steps(const PolicyParams& p, Tokens t, uint8_t* counts, float* corrected,
                      Partial& out) {
  PolicyStats<F> stats;
  if (p.token_rejection != 0) rejection_step<F>(p, t, counts);
  if (p.corrects()) {
    correction_step(p, t, corrected, stats);
    t.correction = Column{corrected};
  }
  surrogate_step(p, t, stats, std::make_index_sequence<size_t(SurrogateKind::kCount)>());
  if (t.ref_logprob) kl_step(p, t, stats);
  if (t.nll_weight) nll_step(p, t, stats);
  if (t.entropy) entropy_step(p, t, stats);
  for (int k = 0; k < kNumPolicySums; ++k) out.sum[k] = reduce_add(stats.sum[k]);
  for (int k = 0; k < kNumPolicyCounts; ++k) out.count[k] = Lanes<F>::total(stats.count[k]);
  out.least = reduce_min(stats.least);
  out.most = reduce_max(stats.most);
}

template <class F>
RLK_HD void add_vector(const PolicyParams& p, const Tokens& t, int64_t i, SequenceSums<F>& sums) {
  const Reader<F> read{i};
  const auto counts = Flags<F>::load(t.counts + i);
  PolicyInput<F> in{};
  in.logprob = where(counts, read(t.logprob));
  in.old_logprob = where(counts, read(t.old_logprob));
  in.advantage = where(counts, read.optional(t.advantage));
  in.rollout_logprob = where(counts, read.optional(t.rollout_logprob));
  in.ref_logprob = where(counts, read.optional(t.ref_logprob));
  sequence_token(p, in, counts, sums);
}

// Adds a run of one sequence's tokens, however many.
template <class F>
RLK_HD void add_tokens(const PolicyParams& params, const Tokens& t, double* sum, float& most) {
  const PolicyParams p = params;
  const int64_t whole = t.count - t.count % kWidth<F>;
  SequenceSums<F> sums;
  for (int64_t i = 0; i < whole; i += kWidth<F>) add_vector(p, t, i, sums);
  if (whole < t.count) {
    float values[5][kWidth<F>];
    uint8_t counts[kWidth<F>] = {};
    Tokens last = t;
    std::copy_n(t.counts + whole, t.count - whole, counts);
    last.counts = counts;
    const float** const columns[] = {&last.logprob, &last.old_logprob, &last.rollout_logprob,
                                     &last.ref_logprob, &last.advantage.data};
    for (int k = 0; k < 5; ++k) {
      if (!*columns[k] || (k == 4 && !last.advantage.by_token)) continue;
      std::copy_n(*columns[k] + whole, t.count - whole, values[k]);
      *columns[k] = values[k];
    }
    add_vector(p, last, 0, sums);
  }
  for (int k = 0; k < kNumSequenceSums; ++k) sum[k] += reduce_add(sums.sum[k]);
  most = std::max(most, reduce_max(sums.most));
}

// What a prefix of a sequence leaves to the next token.
struct Prefix {
  float least;
  double sum = 0;
  int64_t count = 0;

  explicit Prefix(Level level) : least(level == Level::kPrefixMinCapped ? 0.0f : INFINITY) {}

  void merge(const Prefix& next) {
    least = next.least < least || next.least != next.least ? next.least : least;
    sum += next.sum;
    count += next.count;
  }
};

// Walks a run of one sequence's tokens; out: the statistic of each, or null.
inline void walk(Level level, const float* live, const float* anchor, const uint8_t* counts,
                 int64_t count, Prefix& prefix, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (!counts[i]) continue;
    const float x = live[i] - anchor[i];
    if (level != Level::kPrefixMean) {
      if (out) out[i] = prefix.least == INFINITY ? x : prefix.least + x;
      prefix.least = x < prefix.least || x != x ? x : prefix.least;
    } else {
      prefix.sum += x;
      ++prefix.count;
      if (out) out[i] = static_cast<float>(prefix.sum / static_cast<double>(prefix.count));
    }
  }
}

// Lanes for __builtin_shuffle: a window on it moves the lanes of one vector and brings in
// another's.
template <int kStep>
struct Slide {
  int32_t lanes[2 * kStep];
  constexpr Slide() : lanes() {
    for (int i = 0; i < kStep; ++i) lanes[i] = kStep, lanes[kStep + i] = i;
  }
};
template <int kStep>
constexpr Slide<kStep> kSlide;

// x of the lanes `by` before; the first lanes are those of `fill`.
template <class F>
RLK_HD Ints<F> moved(Ints<F> x, Ints<F> fill, int by) {
  constexpr int kStep = kWidth<F>;
#if defined(__clang__)
  Ints<F> out = fill;
  for (int i = by; i < kStep; ++i) out[i] = x[i - by];
  return out;
#else
  return __builtin_shuffle(x, fill, load_as<Ints<F>>(kSlide<kStep>.lanes + kStep - by));
#endif
}

// Floats as integers of the same order, a NaN below all others; and back.
template <class F>
RLK_HD Ints<F> ordered(F x) {
  const auto bits = Bits<F>::of(x);
  const F number = Bits<F>::from(bits ^ (bits >> 31 & INT32_MAX));
  return Bits<F>::of(select(is_equal(x, x), number, Bits<F>::from(Ints<F>{} + INT32_MIN)));
}
template <class F>
RLK_HD F from_ordered(Ints<F> x) {
  return Bits<F>::from(x ^ (x >> 31 & INT32_MAX));
}
template <class I>
RLK_HD I lesser_of(I x, I y) {
  return x < y ? x : y;
}

// walk() for the minimum, by the vector: the same bits. Few vectors have a token below all before
// it: the others need no minimum by the lane.
template <class F>
RLK_HD void walk_least(const float* live, const float* anchor, const uint8_t* counts, int64_t count,
                       Prefix& prefix, float* out) {
  constexpr int kStep = kWidth<F>;
  const F none = F{} + INFINITY;
  F carry = F{} + prefix.least;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const auto counted = Flags<F>::load(counts + i);
    const F x = load_as<F>(live + i) - load_as<F>(anchor + i);
    // kept: not where either is NaN
    if (!Lanes<F>::any(counted & ~is_at_least(x, carry))) {
      if (out) store_as(out + i, carry + x);
      continue;
    }
    Ints<F> least = ordered(select(counted, x, none));
    for (int by = 1; by < kStep; by *= 2)
      least = lesser_of(least, moved<F>(least, ordered(none), by));
    const Ints<F> held = ordered(carry);
    const F before = from_ordered<F>(lesser_of(held, moved<F>(least, ordered(none), 1)));
    if (out) store_as(out + i, select(is_equal(before, none), x, before + x));
    carry = from_ordered<F>(lesser_of(held, Ints<F>{} + least[kStep - 1]));
  }
  prefix.least = carry[0];
  walk(Level::kPrefixMin, live + i, anchor + i, counts + i, count - i, prefix,
       out ? out + i : nullptr);
}

// Rows of one number.
template <class F>
RLK_HD void fill(float* out, int64_t count, float value) {
  int64_t i = 0;
  for (; i + kWidth<F> <= count; i += kWidth<F>) store_as(out + i, F{} + value);
  for (; i < count; ++i) out[i] = value;
}

// This kernel is made of selects: each instruction set has vectors of the size of its registers.
struct Version {
  void (*steps)(const PolicyParams&, const Tokens&, uint8_t*, float*, Partial&);
  void (*sequence)(const PolicyParams&, const Tokens&, double*, float&);
  void (*least)(const float*, const float*, const uint8_t*, int64_t, Prefix&, float*);
  void (*fill)(float*, int64_t, float);
};
#define RLK_VERSION(name, lanes, target)                                                     \
  target void steps_##name(const PolicyParams& p, const Tokens& t, uint8_t* counts,          \
                           float* correction, Partial& out) {                                \
    all_steps<lanes>(p, t, counts, correction, out);                                         \
  }                                                                                          \
  target void sequence_##name(const PolicyParams& p, const Tokens& t, double* s, float& m) { \
    add_tokens<lanes>(p, t, s, m);                                                           \
  }                                                                                          \
  target void least_##name(const float* live, const float* anchor, const uint8_t* counts,    \
                           int64_t count, Prefix& prefix, float* out) {                      \
    walk_least<lanes>(live, anchor, counts, count, prefix, out);                             \
  }                                                                                          \
  target void fill_##name(float* out, int64_t count, float value) {                          \
    fill<lanes>(out, count, value);                                                          \
  }                                                                                          \
  constexpr Version k_##name{steps_##name, sequence_##name, least_##name, fill_##name};
RLK_VERSION(narrow, f32x4, )
#if defined(RLK_MASK512)
RLK_VERSION(avx2, f32x8, __attribute__((target("arch=x86-64-v3"))))
RLK_VERSION(avx512, f32x16, __attribute__((target("arch=x86-64-v4"))))
const Version kVersion = cpu_isa() >= Isa::kAvx512 ? k_avx512
                         : cpu_isa() >= Isa::kAvx2 ? k_avx2
                                                   : k_narrow;
#else
const Version kVersion = k_narrow;
#endif

// What the prefixes of a run are for its tokens.
void prefixes_of(Level level, const float* live, const float* anchor, const uint8_t* counts,
                 int64_t count, Prefix& prefix, float* out) {
  if (level != Level::kPrefixMean)
    kVersion.least(live, anchor, counts, count, prefix, out);
  else
    walk(level, live, anchor, counts, count, prefix, out);
}

int64_t count_tokens(const uint8_t* mask, int64_t count) {
  int64_t total = 0, i = 0;
  while (i + 8 <= count) {
    // eight sums in bytes, none above 255
    uint64_t bytes = 0, eight;
    for (const int64_t end = std::min(i + 8 * 255, count - 7); i < end; i += 8) {
      std::memcpy(&eight, mask + i, 8);
      bytes += eight;
    }
    for (; bytes; bytes >>= 8) total += bytes & 255;
  }
  for (; i < count; ++i) total += mask[i];
  return total;
}

// Rows without offsets; everything, where logprob has no rows either.
Segments sequences_of(const Tensor& logprob, const std::optional<Tensor>& cu_seqlens) {
  if (cu_seqlens.has_value()) return {*cu_seqlens, logprob.numel()};
  if (logprob.dim() == 2) return {logprob.size(0), logprob.size(1), logprob.numel()};
  return {1, logprob.numel(), logprob.numel()};
}

// The inputs of a call; null: not given.
struct Inputs {
  const float *logprob, *old_logprob, *advantage, *rollout_logprob, *ref_logprob, *entropy,
      *nll_weight;
  const uint8_t* mask;  // bytes of 0 or 1
  bool per_token;       // advantage

  // Without what is computed for each token.
  Tokens tokens(int64_t begin, int64_t count) const {
    const auto at = [&](const float* p) { return p ? p + begin : nullptr; };
    Tokens t{};
    t.count = count;
    t.logprob = at(logprob);
    t.old_logprob = at(old_logprob);
    t.advantage = Column{at(per_token ? advantage : nullptr)};
    t.rollout_logprob = at(rollout_logprob);
    t.ref_logprob = at(ref_logprob);
    t.entropy = at(entropy);
    t.nll_weight = at(nll_weight);
    return t;
  }
  void counts(int64_t begin, int64_t count, uint8_t* out) const {
    if (mask)
      std::memcpy(out, mask + begin, count);
    else
      std::memset(out, 1, count);
  }
};

// The last chunk in vectors: tokens that do not count behind its own.
class Padding {
 public:
  Tokens of(const Tokens& t, uint8_t* counts) {
    const int64_t size = (t.count + kStride - 1) / kStride * kStride;
    if (t.count == size) return t;
    Tokens out = t;
    out.count = size;
    std::memset(counts + t.count, 0, size - t.count);
    values_.resize(9 * size);
    float* room = values_.data();
    for (const float** data :
         {&out.logprob, &out.old_logprob, &out.rollout_logprob, &out.ref_logprob, &out.entropy,
          &out.nll_weight, &out.advantage.data}) {
      if (!*data || (data == &out.advantage.data && !out.advantage.by_token)) continue;
      std::copy_n(*data, t.count, room);
      *data = room;
      room += size;
    }
    if (t.grad) out.grad = room, room += size;
    if (t.grad_entropy) out.grad_entropy = room;
    return out;
  }
  void copy_out(const Tokens& padded, const Tokens& t) const {
    if (padded.count == t.count) return;
    if (t.grad) std::copy_n(padded.grad, t.count, t.grad);
    if (t.grad_entropy) std::copy_n(padded.grad_entropy, t.count, t.grad_entropy);
  }

 private:
  std::vector<float> values_;
};

// Of every sequence (or segment), all of them on one thread each.
std::vector<SequenceStats> statistics(const PolicyParams& p, const Inputs& in,
                                      const Segments& sequences, bool sums) {
  std::vector<SequenceStats> out(sequences.count());
  // counting alone is 16 times as fast
  const int64_t grain = sequences.grain((sums ? 1 : 16) * kGrain);
  torch::stable::parallel_for(0, sequences.count(), grain, [&](int64_t first, int64_t last) {
    alignas(64) uint8_t counts[kChunk];
    alignas(64) float advantage[kLanes];
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = sequences.begin(i), length = sequences.length(i);
      const int64_t present = in.mask ? count_tokens(in.mask + begin, length) : length;
      double sum[kNumSequenceSums] = {};
      float most = -INFINITY;
      sum[kKeptSum] = sums ? 0 : static_cast<double>(present);
      for (int64_t j = begin; sums && j < begin + length; j += kChunk) {
        Tokens t = in.tokens(j, std::min(kChunk, begin + length - j));
        in.counts(j, t.count, counts);
        t.counts = counts;
        if (!in.per_token) {
          std::fill_n(advantage, kLanes, in.advantage[i]);
          t.advantage = {advantage, 0};
        }
        kVersion.sequence(p, t, sum, most);
      }
      out[i] = sequence_stats(p, present, sum, most);
    }
  });
  return out;
}

// The prefix of the sequence that goes on at the beginning of each chunk.
std::vector<Prefix> carried(const PolicyParams& p, const Inputs& in, const float* anchor,
                            const Segments& sequences, int64_t num_tokens) {
  const int64_t num_chunks = (num_tokens + kChunk - 1) / kChunk;
  std::vector<Prefix> out(num_chunks, Prefix(p.level));
  // out[c + 1]: first of the tokens of the last sequence in chunk c alone
  torch::stable::parallel_for(0, num_chunks - 1, kGrain / kChunk, [&](int64_t first, int64_t last) {
    alignas(64) uint8_t counts[kChunk];
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunk, end = begin + kChunk, i = sequences.last_bound(end - 1);
      if (i < 0 || i >= sequences.count() || sequences.begin(i + 1) <= end) continue;
      const int64_t from = std::max(begin, sequences.begin(i));
      in.counts(from, end - from, counts);
      prefixes_of(p.level, in.logprob + from, anchor + from, counts, end - from, out[chunk + 1],
                  nullptr);
    }
  });
  for (int64_t chunk = 1; chunk + 1 < num_chunks; ++chunk) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk, i = sequences.last_bound(end - 1);
    if (i < 0 || i >= sequences.count() || sequences.begin(i + 1) <= end) continue;
    if (sequences.begin(i) >= begin) continue;
    Prefix whole = out[chunk];
    whole.merge(out[chunk + 1]);
    out[chunk + 1] = whole;
  }
  return out;
}

const float* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor logprob, Tensor old_logprob, Tensor advantages, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> mask, std::optional<Tensor> rollout_logprob,
    std::optional<Tensor> ref_logprob, std::optional<Tensor> entropy,
    std::optional<Tensor> nll_weight, std::optional<Tensor> cu_segments, std::vector<int64_t> kinds,
    std::vector<double> numbers, bool want_grad, bool want_entropy_grad) {
  RLK_CHECK_CPU(logprob);
  RLK_CHECK_DTYPE(logprob, Float);
  RLK_CHECK_CONTIGUOUS(logprob);
  RLK_CHECK_CONTIGUOUS(old_logprob);
  RLK_CHECK_CONTIGUOUS(advantages);
  STD_TORCH_CHECK(kinds.size() == kNumKinds && numbers.size() == kNumNumbers,
                  "policy_loss_fwd: kinds and numbers of another version");
  const int64_t num_tokens = logprob.numel();
  STD_TORCH_CHECK(old_logprob.numel() == num_tokens, "old_logprob must have the size of logprob");
  const Segments sequences = sequences_of(logprob, cu_seqlens);
  const int64_t num_sequences = sequences.count();
  const PolicyParams params(kinds, numbers);
  const Inputs in{
      .logprob = logprob.const_data_ptr<float>(),
      .old_logprob = old_logprob.const_data_ptr<float>(),
      .advantage = advantages.const_data_ptr<float>(),
      .rollout_logprob = optional_data(rollout_logprob),
      .ref_logprob = optional_data(ref_logprob),
      .entropy = optional_data(entropy),
      .nll_weight = optional_data(nll_weight),
      .mask = mask.has_value() ? reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>())
                               : nullptr,
      .per_token = logprob.dim() == 2       ? advantages.dim() == 2
                   : cu_seqlens.has_value() ? advantages.numel() != num_sequences
                                            : true,
  };
  STD_TORCH_CHECK(advantages.numel() == (in.per_token ? num_tokens : num_sequences),
                  "advantages must have one element per sequence or per token");
  // not its pointer: that of no tokens is null
  STD_TORCH_CHECK(rollout_logprob.has_value() ||
                      !(params.from_rollout || params.corrects() || params.rejects()),
                  "these kinds need rollout_logprob");

  // Without a mask and sums, lengths are known from cu_seqlens.
  const bool own_statistic = params.by_statistic() && !cu_segments.has_value();
  const bool sums = own_statistic || params.couples_kl() || params.rejects() ||
                    params.limits_drift() ||
                    (params.corrects() && params.correction != Correction::kToken);
  std::vector<SequenceStats> stats, segment_stats;
  if (in.mask || sums) stats = statistics(params, in, sequences, sums);
  std::optional<Segments> segments;
  if (cu_segments.has_value()) {
    segments.emplace(*cu_segments, num_tokens);
    // the advantage is that of no segment: only the log-ratio is read
    Inputs tokens = in;
    if (!in.per_token) tokens.advantage = tokens.logprob, tokens.per_token = true;
    segment_stats = statistics(params, tokens, *segments, true);
  }
  const float* anchor = params.from_rollout ? in.rollout_logprob : in.old_logprob;
  std::vector<Prefix> prefixes;
  if (params.by_prefix() && num_tokens > 0)
    prefixes = carried(params, in, anchor, sequences, num_tokens);

  const auto length_of = [&](int64_t i) {
    return stats.empty()           ? sequences.length(i)
           : params.count_rejected ? stats[i].length
                                   : stats[i].kept;
  };
  int64_t divisor = 1, present = 0;
  if (params.denominator == Denominator::kAllSequences) divisor = num_sequences;
  if (params.denominator == Denominator::kTokens ||
      params.denominator == Denominator::kFilledSequences) {
    divisor = 0;
    for (int64_t i = 0; i < num_sequences; ++i) {
      const int64_t length = length_of(i);
      divisor += params.denominator == Denominator::kTokens ? length : length > 0;
    }
  }
  for (const SequenceStats& s : stats) present += s.length;
  const double shared = params.scale / std::max<int64_t>(1, divisor);

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
    const bool correct = params.corrects() && params.correction != Correction::kToken;
    // the sequence's numbers, spread over its tokens; the statistic by segment or prefix too
    alignas(64) float advantage[kChunk], weight[kChunk], statistic[kChunk], correction[kChunk],
        drifted[kChunk], kl_mean[kChunk], length[kChunk], corrected[kChunk];
    alignas(64) uint8_t counts[kChunk];
    Padding padding;
    const bool one_weight = !params.divide_by_length;
    if (one_weight) kVersion.fill(weight, kStride, policy_weight(shared, false, 0));
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, num_tokens);
      Tokens tokens = in.tokens(begin, end - begin);
      tokens.counts = counts;
      tokens.grad = grad_out ? grad_out + begin : nullptr;
      tokens.grad_entropy = grad_entropy_out ? grad_entropy_out + begin : nullptr;
      if (!in.per_token) tokens.advantage.data = advantage;
      tokens.weight = {weight, one_weight ? 0 : -1};
      if (params.level != Level::kToken) tokens.statistic.data = statistic;
      if (params.level == Level::kProduct) tokens.length.data = length;
      if (correct) tokens.correction.data = correction;
      if (params.limits_drift()) tokens.drifted.data = drifted;
      if (params.couples_kl()) tokens.kl_mean.data = kl_mean;
      in.counts(begin, end - begin, counts);
      for (int64_t i = sequences.last_bound(begin), token = begin; token < end; ++i) {
        // tokens before the first sequence or after the last do not count
        const bool inside = i >= 0 && i < num_sequences;
        const int64_t stop = i < num_sequences ? std::min(sequences.begin(i + 1), end) : end;
        if (stop <= token) continue;
        const int64_t from = token - begin, size = stop - token;
        const bool alone = token == begin && stop == end;
        token = stop;
        if (!inside || (params.rejects() && stats[i].kept == 0)) {
          std::memset(counts + from, 0, size);
          continue;
        }
        const auto spread = [&](Column& column, float* out, float value) {
          kVersion.fill(out + from, alone ? kStride : size, value);
          column.by_token = alone ? 0 : -1;
        };
        if (!in.per_token) spread(tokens.advantage, advantage, in.advantage[i]);
        if (!one_weight) spread(tokens.weight, weight, policy_weight(shared, true, length_of(i)));
        if (own_statistic) spread(tokens.statistic, statistic, stats[i].statistic);
        if (tokens.length) spread(tokens.length, length, static_cast<float>(stats[i].length));
        if (correct) spread(tokens.correction, correction, stats[i].correction);
        if (params.limits_drift()) spread(tokens.drifted, drifted, stats[i].drifted);
        if (params.couples_kl()) spread(tokens.kl_mean, kl_mean, stats[i].kl_mean);
        if (params.by_prefix()) {
          Prefix prefix(params.level);
          if (from == 0 && sequences.begin(i) < begin) prefix = prefixes[chunk];
          prefixes_of(params.level, in.logprob + begin + from, anchor + begin + from, counts + from,
                      size, prefix, statistic + from);
        }
      }
      for (int64_t i = segments ? segments->last_bound(begin) : 0, token = begin;
           segments && token < end; ++i) {
        const bool inside = i >= 0 && i < segments->count();
        const int64_t stop = i < segments->count() ? std::min(segments->begin(i + 1), end) : end;
        if (stop <= token) continue;
        kVersion.fill(statistic + (token - begin), stop - token,
                      inside ? segment_stats[i].statistic : 0.0f);
        token = stop;
      }
      const Tokens padded = padding.of(tokens, counts);
      kVersion.steps(params, padded, counts, corrected, partials[chunk]);
      padding.copy_out(padded, tokens);
    }
  });

  double sum[kNumPolicySums] = {};
  int64_t count[kNumPolicyCounts] = {};
  float least = INFINITY, most = -INFINITY;
  for (const Partial& partial : partials) {
    for (int k = 0; k < kNumPolicySums; ++k) sum[k] += partial.sum[k];
    for (int k = 0; k < kNumPolicyCounts; ++k) count[k] += partial.count[k];
    least = std::min(least, partial.least);
    most = std::max(most, partial.most);
  }
  const int64_t all = params.rejects() ? present : count[kTokens];
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum[kLossSum]);
  policy_metrics(params, sum, count, least, most, all, metrics.mutable_data_ptr<float>());
  return {loss, metrics, grad, grad_entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("policy_loss_fwd", TORCH_BOX(&forward)); }

}  // namespace rlkern
