// Log-prob, logsumexp and entropy straight from hidden states.
//
// The tokens lie in the lanes of the registers and the vocabulary runs down them: a tile of logits
// is folded into the tokens' running statistics while it is still in L1, the weight is read as it
// lies, and no logit goes further. The vocabulary is cut into chunks that depend on its
// size alone and are merged in order, so a token's bits depend neither on its neighbours nor on
// the number of threads. The backward recomputes a block of logits, turns it into the gradient
// with respect to them in the hidden states' dtype, and feeds both remaining products from it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "matmul.h"
#include "rlkern/math/softmax_stats.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// Packed hidden states of a block stay in the last-level cache.
constexpr int64_t kTokenBlock = 1536;
// Partial statistics: 16 bytes a token and chunk.
constexpr int64_t kMaxChunks = 32;
constexpr int64_t kMinChunkRows = 512;
// For the chunks' own top-k lists.
constexpr int64_t kTopKBytes = 32 * 1024 * 1024;
// A quarter of a 1 MiB L2 for the rows of the weight that every panel of tokens meets.
constexpr int64_t kWeightBlockBytes = 256 * 1024;
// Vocabulary rows whose logit gradients exist at a time in the backward.
constexpr int64_t kGradRows = 2048;

template <class V>
std::unique_ptr<V[]> scratch(int64_t n) {
  return std::unique_ptr<V[]>(new V[std::max<int64_t>(n, 1)]);
}

template <class F>
void parallel(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, f);
}

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;

  explicit Matrix(const Tensor& t)
      : data(t.const_data_ptr<T>()), rows(t.size(0)), columns(t.size(1)), stride(t.stride(0)) {}
  Matrix(const T* data, int64_t rows, int64_t columns)
      : data(data), rows(rows), columns(columns), stride(columns) {}
  const T* row(int64_t i) const { return data + i * stride; }
};

const float* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

// The schemas' targets, ids, vocab_mask and row_temperature, and the scalars.
struct Options {
  Tensor targets;
  std::optional<Tensor> ids, vocab_mask, row_temperature;
  double temperature, logit_scale, cap;
  int64_t ignore_index, vocab_size;
  bool round_logits;

  Softcap softcap() const { return {static_cast<float>(logit_scale), static_cast<float>(cap)}; }
  // wanted tokens of a row: its target and its ids
  int64_t width() const { return 1 + (ids ? ids->size(1) : 0); }
  // calls f(k, token) for each of them that is not to be ignored
  template <class F>
  void for_wanted(int64_t row, const F& f) const {
    const int64_t count = width() - 1, target = targets.const_data_ptr<int64_t>()[row];
    if (target != ignore_index) f(0, target);
    const int64_t* id = ids ? ids->const_data_ptr<int64_t>() + row * count : nullptr;
    for (int64_t k = 0; k < count; ++k)
      if (id[k] != ignore_index) f(k + 1, id[k]);
  }
};

// The weight, the bias and what the options say of the vocabulary, for the tile kernels.
template <class T>
struct HeadInputs {
  Matrix<T> weight;
  std::unique_ptr<float[]> bias;
  Head head;

  HeadInputs(const Tensor& weight_tensor, const std::optional<Tensor>& bias_tensor,
             const Options& options)
      : weight(weight_tensor) {
    weight.rows = options.vocab_size;
    if (bias_tensor) {
      bias = scratch<float>(weight.rows);
      std::copy_n(bias_tensor->const_data_ptr<T>(), weight.rows, bias.get());
    }
    head = {bias.get(), options.vocab_mask ? options.vocab_mask->const_data_ptr<bool>() : nullptr,
            options.round_logits, options.softcap()};
  }
};

// What every pass needs of the tokens that it visits: padded to whole panels.
struct Tokens {
  int64_t count, padded, width;
  int panel;
  std::unique_ptr<float[]> inv_temperature;
  // of each panel, ordered; slot = token * width + k
  std::vector<std::vector<Pick>> picks;

  Tokens(const std::vector<int64_t>& visited, const Options& options, int panel)
      : count(visited.size()),
        padded(round_up(count, panel)),
        width(options.width()),
        panel(panel),
        inv_temperature(scratch<float>(padded)),
        picks(padded / panel) {
    const float* rows = optional_data(options.row_temperature);
    const Softcap softcap = options.softcap();
    std::fill_n(inv_temperature.get(), padded, 1.0f);
    for (int64_t t = 0; t < count; ++t)
      inv_temperature[t] =
          softcap.inverse(rows ? rows[visited[t]] : static_cast<float>(options.temperature));
    parallel(picks.size(), [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        std::vector<Pick>& own = picks[p];
        for (int64_t t = p * panel; t < std::min(count, (p + 1) * panel); ++t)
          options.for_wanted(visited[t], [&](int64_t k, int64_t token) {
            if (token >= 0 && token < options.vocab_size)
              own.push_back({static_cast<int32_t>(token), static_cast<int32_t>(t - p * panel),
                             t * width + k});
          });
        std::sort(own.begin(), own.end(), [](const Pick& a, const Pick& b) {
          return a.row != b.row ? a.row < b.row : a.slot < b.slot;
        });
      }
    });
  }
  template <class Unit>
  TokenPanel<Unit> at(int64_t t, const Unit* hidden, int64_t units, float* kept = nullptr,
                      const int64_t* lanes = nullptr) const {
    const std::vector<Pick>& own = picks[t / panel];
    const Picks wanted = {own.data(), own.data() + own.size()};
    return {hidden, units, inv_temperature.get() + t, wanted, kept, lanes};
  }
};

// The weight's rows as units: in place where they already are, else through a scratch copy.
template <class Unit, class T>
class WeightRows {
 public:
  WeightRows(const Matrix<T>& weight, int tile_rows)
      : weight_(weight),
        tile_rows_(tile_rows),
        units_(units_of<Unit>(weight.columns)),
        block_(std::clamp<int64_t>(kWeightBlockBytes / (4 * std::max<int64_t>(units_, 1)),
                                   tile_rows, 128) /
               tile_rows * tile_rows) {
    const bool same =
        std::is_same_v<T, float> == std::is_same_v<Unit, float> && !std::is_same_v<T, fp16>;
    in_place_ = same && weight.columns % kPerUnit<Unit> == 0 &&
                weight.stride % kPerUnit<Unit> == 0 &&
                reinterpret_cast<uintptr_t>(weight.data) % sizeof(Unit) == 0;
  }

  // f over blocks of the rows [begin, end)
  template <class F>
  void for_blocks(int64_t begin, int64_t end, const F& f) const {
    std::unique_ptr<Unit[]> copy;
    for (int64_t row = begin; row < end; row += block_) {
      const int64_t rows = std::min(block_, end - row);
      if (in_place_ && rows % tile_rows_ == 0) {
        f(WeightBlock<Unit>{reinterpret_cast<const Unit*>(weight_.row(row)),
                            weight_.stride / kPerUnit<Unit>, row, rows});
        continue;
      }
      if (!copy) copy = scratch<Unit>(block_ * units_);
      copy_rows<Unit>(weight_.row(row), weight_.stride, rows, weight_.columns,
                      round_up(rows, tile_rows_), copy.get());
      f(WeightBlock<Unit>{copy.get(), units_, row, rows});
    }
  }
  int64_t block() const { return block_; }

 private:
  Matrix<T> weight_;
  int tile_rows_;
  int64_t units_, block_;
  bool in_place_;
};

// Tokens [begin, end) as panels of columns, for products that run over the hidden size.
template <class Unit, class T>
std::unique_ptr<Unit[]> pack_tokens(const Matrix<T>& hidden, int64_t begin, int64_t end,
                                    int panel) {
  const int64_t units = units_of<Unit>(hidden.columns);
  const int64_t panels = round_up(end - begin, panel) / panel;
  auto packed = scratch<Unit>(panels * panel * units);
  parallel(panels, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      const int64_t first = begin + p * panel;
      pack_rows_as_columns<Unit>(hidden.row(first), hidden.stride,
                                 std::min<int64_t>(panel, end - first), hidden.columns, panel,
                                 packed.get() + p * panel * units);
    }
  });
  return packed;
}

// Rows [begin, end) as panels over the hidden size, for products that run over those rows.
template <class Unit, class T>
void pack_rows(const TileKernels<Unit, T>& kernels, const Matrix<T>& matrix, int64_t begin,
               int64_t end, int64_t units, Unit* packed) {
  const int64_t panel = kernels.panel, panels = round_up(matrix.columns, panel) / panel;
  parallel(panels, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p)
      kernels.pack_columns(matrix.row(begin) + p * panel, matrix.stride, end - begin, units,
                           matrix.columns - p * panel, packed + p * panel * units);
  });
}

struct Outputs {
  float *logprob, *logsumexp, *entropy, *sum_sq_prob, *id_logprob, *topk_values;
  bool* is_top1;
  int64_t* topk_ids;
  int64_t topk;
  float* kept;  // null: logits are not kept
};

// Floats that a panel's kept logits take.
template <class Unit, class T>
int64_t kept_stride(const TileKernels<Unit, T>& kernels, int64_t vocab) {
  return round_up(vocab, kernels.rows) * kernels.panel;
}

template <class Unit, class T>
void forward_rows(const Matrix<T>& hidden, const HeadInputs<T>& inputs, const Options& options,
                  const Outputs& out) {
  const TileKernels<Unit, T> kernels = tile_kernels<Unit, T>();
  const int panel = kernels.panel;
  const Matrix<T>& weight = inputs.weight;
  const int64_t vocab = weight.rows, units = units_of<Unit>(hidden.columns);
  std::vector<int64_t> all(hidden.rows);
  std::iota(all.begin(), all.end(), 0);
  const Tokens tokens(all, options, panel);
  const int64_t chunk_rows =
      round_up(std::max(kMinChunkRows, (vocab + kMaxChunks - 1) / kMaxChunks), kernels.rows);
  const int64_t chunks = (vocab + chunk_rows - 1) / chunk_rows;
  const WeightRows<Unit, T> rows_of(weight, kernels.rows);
  const int64_t topk = out.topk, topk_bytes = 8 * topk * std::max<int64_t>(chunks, 1);
  const int64_t most =
      topk ? std::clamp<int64_t>(kTopKBytes / topk_bytes, panel, kTokenBlock) : kTokenBlock;
  const int64_t block = most / panel * panel;
  const int64_t width = std::min(block, tokens.padded);
  auto partial = scratch<float>(chunks * 4 * width);
  auto top_values = scratch<float>(chunks * width * topk);
  auto top_rows = scratch<int32_t>(chunks * width * topk);
  const int64_t stride = kept_stride(kernels, vocab);
  // logits of targets and ids
  auto picked = scratch<float>(tokens.count * tokens.width);
  std::fill_n(picked.get(), tokens.count * tokens.width, NAN);

  for (int64_t begin = 0; begin < tokens.count; begin += block) {
    const int64_t end = std::min(begin + block, tokens.count);
    const int64_t panels = round_up(end - begin, panel) / panel;
    const auto packed = pack_tokens<Unit>(hidden, begin, end, panel);
    const auto stats_of = [&](int64_t chunk, int64_t t) -> TokenStats {
      float* base = partial.get() + chunk * 4 * width + t;
      return {base, base + width, base + 2 * width, base + 3 * width};
    };
    const auto topk_of = [&](int64_t chunk, int64_t t) -> TopK {
      const int64_t at = (chunk * width + t) * topk;
      return {topk, top_values.get() + at, top_rows.get() + at};
    };
    parallel(chunks, [&](int64_t from, int64_t to) {
      for (int64_t chunk = from; chunk < to; ++chunk) {
        const TokenStats stats = stats_of(chunk, 0);
        std::fill_n(stats.max, width, -INFINITY);
        std::fill_n(stats.sum, 3 * width, 0.0f);
        std::fill_n(topk_of(chunk, 0).values, width * topk, -INFINITY);
        std::fill_n(topk_of(chunk, 0).rows, width * topk, -1);
        rows_of.for_blocks(
            chunk * chunk_rows, std::min(vocab, (chunk + 1) * chunk_rows),
            [&](const WeightBlock<Unit>& rows) {
              for (int64_t p = 0; p < panels; ++p)
                kernels.fold_logits(
                    rows, inputs.head,
                    tokens.at(begin + p * panel, packed.get() + p * panel * units, units,
                              out.kept ? out.kept + (begin / panel + p) * stride : nullptr),
                    stats_of(chunk, p * panel), picked.get(), topk_of(chunk, p * panel));
            });
      }
    });
    for (int64_t t = begin; t < end; ++t) {
      const float inv = tokens.inv_temperature[t];
      const float* own = picked.get() + t * tokens.width;
      SoftmaxStats stats;
      TopK best = {topk, top_values.get() + (t - begin) * topk,
                   top_rows.get() + (t - begin) * topk};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const TokenStats s = stats_of(chunk, t - begin);
        stats.merge({*s.max, *s.sum, *s.dot, *s.sq}, inv);
        const TopK found = topk_of(chunk, t - begin);
        for (int64_t k = 0; chunk > 0 && k < topk; ++k)
          best.offer(0, found.values[k], found.rows[k]);
      }
      out.logsumexp[t] = stats.logsumexp(inv);
      out.entropy[t] = stats.entropy();
      out.sum_sq_prob[t] = stats.sum_sq_prob();
      float* id_logprob = out.id_logprob + t * (tokens.width - 1);
      out.logprob[t] = 0.0f;
      std::fill_n(id_logprob, tokens.width - 1, 0.0f);
      options.for_wanted(t, [&](int64_t k, int64_t) {
        (k == 0 ? out.logprob[t] : id_logprob[k - 1]) = stats.logprob(own[k], inv);
      });
      // a target that is ignored or does not exist was not picked: NaN
      out.is_top1[t] = own[0] >= stats.max;
      for (int64_t k = 0; k < topk; ++k) {
        const bool exists = best.rows[k] >= 0;
        out.topk_values[t * topk + k] = exists ? stats.logprob(best.values[k], inv) : -INFINITY;
        out.topk_ids[t * topk + k] = best.rows[k];
      }
    }
  }
}

struct Upstream {
  const float *logprob, *logsumexp, *entropy, *id_logprob;

  // Of the k-th wanted token of a row: see Options::for_wanted.
  float at(int64_t row, int64_t k, int64_t width) const {
    if (k == 0) return logprob ? logprob[row] : 0.0f;
    return id_logprob ? id_logprob[row * (width - 1) + k - 1] : 0.0f;
  }

  // Tokens with any gradient at all: advantages of 0 and clipped ratios leave many without.
  std::vector<int64_t> live(const Options& options, int64_t count) const {
    std::vector<int64_t> rows;
    rows.reserve(count);
    for (int64_t t = 0; t < count; ++t) {
      bool any = (logsumexp && logsumexp[t] != 0.0f) || (entropy && entropy[t] != 0.0f);
      options.for_wanted(
          t, [&](int64_t k, int64_t) { any = any || at(t, k, options.width()) != 0.0f; });
      if (any) rows.push_back(t);
    }
    return rows;
  }
};

// Sums of the rows of a block of logit gradients, in a fixed order.
template <class Unit>
void add_row_sums(const Unit* data, int64_t rows, int64_t columns, float* sums) {
  using Element = std::conditional_t<std::is_same_v<Unit, Pair>, bf16, float>;
  const Element* row = reinterpret_cast<const Element*>(data);
  parallel(rows, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      f32x16 sum{};
      for (int64_t c = 0; c < columns; c += kLanes) sum += load(row + r * columns + c);
      sums[r] += reduce_add(sum);
    }
  });
}

template <class T>
struct Grads {
  T *hidden, *weight, *bias;  // null: not needed
  float* weight_sum;          // the weight's gradient is added to it instead, where given
};

template <class Unit, class T>
void backward_rows(const Upstream& upstream, const Matrix<T>& given, const HeadInputs<T>& inputs,
                   const Options& options, const float* logsumexp, const float* entropy,
                   float* kept, const Grads<T>& grads) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  const TileKernels<Unit, T> kernels = tile_kernels<Unit, T>();
  const int panel = kernels.panel;
  const Matrix<T>& weight = inputs.weight;
  const int64_t vocab = weight.rows, depth = given.columns, units = units_of<Unit>(depth);
  const std::vector<int64_t> live = upstream.live(options, given.rows);
  const Tokens tokens(live, options, panel);
  const int64_t padded = tokens.padded;
  // rows without a gradient drop out of all three products
  const bool gathers = tokens.count < given.rows;
  auto gathered = gathers ? scratch<T>(tokens.count * depth) : nullptr;
  if (gathers)
    for (int64_t t = 0; t < tokens.count; ++t)
      std::copy_n(given.row(live[t]), depth, gathered.get() + t * depth);
  const Matrix<T> hidden = gathers ? Matrix<T>(gathered.get(), tokens.count, depth) : given;

  auto token_grads = scratch<float>(3 * padded);
  float* fields[3];
  for (int i = 0; i < 3; ++i) fields[i] = token_grads.get() + i * padded;
  std::fill_n(fields[0], 3 * padded, 0.0f);
  auto pick_grad = scratch<float>(tokens.count * tokens.width);
  for (int64_t t = 0; t < tokens.count; ++t) {
    const int64_t row = live[t];
    float at_tokens = 0.0f;
    options.for_wanted(row, [&](int64_t k, int64_t) {
      const float g = upstream.at(row, k, tokens.width);
      pick_grad[t * tokens.width + k] = g;
      at_tokens += g;
    });
    const SoftmaxGrad g(at_tokens, upstream.entropy ? upstream.entropy[row] : 0.0f,
                        upstream.logsumexp ? upstream.logsumexp[row] : 0.0f,
                        upstream.entropy ? entropy[row] : 0.0f);
    fields[0][t] = g.constant;
    fields[1][t] = g.entropy;
    fields[2][t] = logsumexp[row];
  }

  const int64_t block = kTokenBlock / panel * panel;
  const int64_t width = std::min(block, padded);
  const int64_t hidden_panels = round_up(depth, panel) / panel, wide = hidden_panels * panel;
  const int64_t grad_rows = std::min(kGradRows, round_up(vocab, 2 * kernels.rows));
  const bool one_block = tokens.count <= block;
  const WeightRows<Unit, T> rows_of(weight, kernels.rows);

  const bool needs_weight = grads.weight || grads.weight_sum;
  auto by_vocab = scratch<Unit>(grad_rows * width / kPer);
  auto by_token = scratch<Unit>(grad_rows * width / kPer);
  auto weight_panels = grads.hidden ? scratch<Unit>(grad_rows / kPer * wide) : nullptr;
  auto token_panels = needs_weight ? scratch<Unit>(width / kPer * wide) : nullptr;
  auto hidden_sum = grads.hidden ? scratch<float>(padded * wide) : nullptr;
  auto weight_sum = needs_weight ? scratch<float>(grad_rows * wide) : nullptr;
  auto bias_sum = scratch<float>(grads.bias ? grad_rows : 0);
  // an empty vocabulary adds nothing
  if (grads.hidden && vocab == 0) std::fill_n(hidden_sum.get(), padded * wide, 0.0f);
  std::unique_ptr<Unit[]> packed;
  const int64_t stride = kept_stride(kernels, vocab);
  // where the tokens lie among the kept logits
  const bool scattered = kept && gathers;
  auto lanes = scratch<int64_t>(scattered ? padded : 0);
  for (int64_t t = 0; scattered && t < padded; ++t)
    lanes[t] = t < tokens.count ? live[t] / panel * stride + live[t] % panel : -1;

  for (int64_t v0 = 0; v0 < vocab; v0 += grad_rows) {
    const int64_t v1 = std::min(vocab, v0 + grad_rows), rows = v1 - v0;
    const int64_t padded_rows = round_up(rows, kernels.rows);
    if (grads.hidden) pack_rows(kernels, weight, v0, v1, padded_rows / kPer, weight_panels.get());
    if (needs_weight && tokens.count == 0) std::fill_n(weight_sum.get(), padded_rows * wide, 0.0f);
    if (grads.bias) std::fill_n(bias_sum.get(), rows, 0.0f);

    for (int64_t t0 = 0; t0 < tokens.count; t0 += block) {
      const int64_t t1 = std::min(tokens.count, t0 + block);
      const int64_t panels = round_up(t1 - t0, panel) / panel, columns = panels * panel;
      if (!one_block || v0 == 0) {
        if (!kept) packed = pack_tokens<Unit>(hidden, t0, t1, panel);
        if (needs_weight) pack_rows(kernels, hidden, t0, t1, columns / kPer, token_panels.get());
      }
      // the gradient of this block of logits, in both orders
      parallel(panels, [&](int64_t from, int64_t to) {
        rows_of.for_blocks(v0, v1, [&](const WeightBlock<Unit>& rows_in) {
          for (int64_t p = from; p < to; ++p) {
            const int64_t t = t0 + p * panel, row = rows_in.first - v0;
            kernels.logit_gradient(
                rows_in, inputs.head,
                kept ? tokens.at<Unit>(t, nullptr, 0, kept + (scattered ? 0 : t / panel * stride),
                                       scattered ? lanes.get() + t : nullptr)
                     : tokens.at(t, packed.get() + p * panel * units, units),
                {fields[0] + t, fields[1] + t, fields[2] + t}, pick_grad.get(),
                by_vocab.get() + (row * columns + p * panel) / kPer, columns / kPer,
                by_token.get() + (p * padded_rows + row) / kPer * panel);
          }
        });
      });
      if (grads.bias) add_row_sums(by_vocab.get(), rows, columns, bias_sum.get());
      if (grads.hidden) {
        parallel(panels * hidden_panels, [&](int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t p = i / hidden_panels, h = i % hidden_panels;
            kernels.product(by_token.get() + p * padded_rows / kPer * panel, 1, panel,
                            weight_panels.get() + h * padded_rows / kPer * panel,
                            padded_rows / kPer, panel,
                            hidden_sum.get() + (t0 + p * panel) * wide + h * panel, wide, v0 > 0);
          }
        });
      }
      if (needs_weight) {
        // groups of rows small enough for L1 beside the panel
        const int64_t group = 8 * kernels.rows, groups = (padded_rows + group - 1) / group;
        parallel(hidden_panels * groups, [&](int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t h = i / groups, row = i % groups * group;
            kernels.product(by_vocab.get() + row * columns / kPer, columns / kPer, 1,
                            token_panels.get() + h * columns / kPer * panel, columns / kPer,
                            std::min(group, padded_rows - row),
                            weight_sum.get() + row * wide + h * panel, wide, t0 > 0);
          }
        });
      }
    }
    if (needs_weight) {
      parallel(rows, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r) {
          const float* sum = weight_sum.get() + r * wide;
          if (grads.weight_sum)
            kernels.add_row(sum, grads.weight_sum + (v0 + r) * depth, depth);
          else
            kernels.convert_row(sum, grads.weight + (v0 + r) * depth, depth);
        }
      });
    }
    if (grads.bias) kernels.convert_row(bias_sum.get(), grads.bias + v0, rows);
  }
  if (grads.hidden) {
    if (gathers) std::fill_n(grads.hidden, given.rows * depth, T(0.0f));
    parallel(tokens.count, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        kernels.convert_row(hidden_sum.get() + t * wide, grads.hidden + live[t] * depth, depth);
    });
  }
}

// Runs the body with Unit = Pair where bfloat16 products exist and the data are bfloat16.
template <class T, class F>
void with_unit(const F& f) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (cpu_isa() == Isa::kAvx512Bf16) return f(Pair{});
  }
  f(float{});
}

void check_inputs(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                  const Options& options) {
  RLK_CHECK_CPU(hidden);
  RLK_CHECK_CPU(weight);
  RLK_CHECK_DIM(hidden, 2);
  RLK_CHECK_DIM(weight, 2);
  const Tensor& targets = options.targets;
  RLK_CHECK_DTYPE(targets, Long);
  RLK_CHECK_CONTIGUOUS(targets);
  RLK_CHECK_SIZE(targets, 0, hidden.size(0));
  RLK_CHECK_SIZE(weight, 1, hidden.size(1));
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(),
                  "hidden and weight must have the same dtype");
  STD_TORCH_CHECK(hidden.size(1) == 0 || hidden.stride(1) == 1, "hidden must have contiguous rows");
  STD_TORCH_CHECK(weight.size(1) == 0 || weight.stride(1) == 1, "weight must have contiguous rows");
  STD_TORCH_CHECK(weight.size(0) < (int64_t{1} << 31), "weight must have fewer than 2^31 rows");
  STD_TORCH_CHECK(options.vocab_size >= 0 && options.vocab_size <= weight.size(0),
                  "vocab_size must lie in [0, V]");
  if (bias) {
    RLK_CHECK_CONTIGUOUS(*bias);
    RLK_CHECK_SIZE(*bias, 0, weight.size(0));
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type(),
                    "bias and weight must have the same dtype");
  }
  if (options.ids) {
    RLK_CHECK_DTYPE(*options.ids, Long);
    RLK_CHECK_DIM(*options.ids, 2);
    RLK_CHECK_CONTIGUOUS(*options.ids);
    RLK_CHECK_SIZE(*options.ids, 0, hidden.size(0));
  }
  if (options.vocab_mask) {
    RLK_CHECK_DTYPE(*options.vocab_mask, Bool);
    RLK_CHECK_CONTIGUOUS(*options.vocab_mask);
    RLK_CHECK_SIZE(*options.vocab_mask, 0, weight.size(0));
  }
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Kept = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// batch_invariant and chunk_size change nothing here: a row's bits depend on no other row, and no
// logits beyond a tile's exist but those that are kept.
Kept run_forward(Tensor hidden, Tensor weight, std::optional<Tensor> bias, const Options& options,
                 int64_t topk, bool keep) {
  check_inputs(hidden, weight, bias, options);
  const int64_t count = hidden.size(0);
  using torch::headeronly::ScalarType;
  const auto stat = [&] { return torch::stable::new_empty(hidden, {count}, ScalarType::Float); };
  Tensor logprob = stat(), logsumexp = stat(), entropy = stat(), sum_sq_prob = stat();
  Tensor is_top1 = torch::stable::new_empty(hidden, {count}, ScalarType::Bool);
  Tensor id_logprob =
      torch::stable::new_empty(hidden, {count, options.width() - 1}, ScalarType::Float);
  Tensor topk_values = torch::stable::new_empty(hidden, {count, topk}, ScalarType::Float);
  Tensor topk_ids = torch::stable::new_empty(hidden, {count, topk}, ScalarType::Long);
  Tensor kept;
  RLK_DISPATCH_FLOAT(hidden, T, {
    with_unit<T>([&](auto unit) {
      using Unit = decltype(unit);
      const auto kernels = tile_kernels<Unit, T>();
      const int64_t panels = round_up(count, kernels.panel) / kernels.panel;
      const int64_t floats = keep ? panels * kept_stride(kernels, options.vocab_size) : 0;
      kept = torch::stable::new_empty(hidden, {floats}, ScalarType::Float);
      const Outputs out = {logprob.mutable_data_ptr<float>(),
                           logsumexp.mutable_data_ptr<float>(),
                           entropy.mutable_data_ptr<float>(),
                           sum_sq_prob.mutable_data_ptr<float>(),
                           id_logprob.mutable_data_ptr<float>(),
                           topk_values.mutable_data_ptr<float>(),
                           is_top1.mutable_data_ptr<bool>(),
                           topk_ids.mutable_data_ptr<int64_t>(),
                           topk,
                           keep ? kept.mutable_data_ptr<float>() : nullptr};
      forward_rows<Unit>(Matrix<T>(hidden), HeadInputs<T>(weight, bias, options), options, out);
    });
  });
  return {logprob,    logsumexp,   entropy,  sum_sq_prob, is_top1,
          id_logprob, topk_values, topk_ids, kept};
}

// The arguments of both forwards, as the schemas have them.
#define RLK_FORWARD_ARGUMENTS                                                                    \
  Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets,                      \
      std::optional<Tensor> ids, std::optional<Tensor> vocab_mask,                               \
      std::optional<Tensor> row_temperature, double temperature, double logit_scale,             \
      double softcap, int64_t ignore_index, int64_t vocab_size, bool round_logits, int64_t topk, \
      bool batch_invariant, int64_t chunk_size
#define RLK_OPTIONS                                                                             \
  Options {                                                                                     \
    targets, ids, vocab_mask, row_temperature, temperature, logit_scale, softcap, ignore_index, \
        vocab_size, round_logits                                                                \
  }

Stats fwd(RLK_FORWARD_ARGUMENTS) {
  auto [logprob, logsumexp, entropy, sum_sq_prob, is_top1, id_logprob, topk_values, topk_ids,
        kept] = run_forward(hidden, weight, bias, RLK_OPTIONS, topk, false);
  return {logprob, logsumexp, entropy, sum_sq_prob, is_top1, id_logprob, topk_values, topk_ids};
}

// The last result is the logits, in an order that only bwd_kept knows.
Kept fwd_keep(RLK_FORWARD_ARGUMENTS) {
  return run_forward(hidden, weight, bias, RLK_OPTIONS, topk, true);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Two matmuls where the forward kept the logits. The weight's gradient is added to weight_sum where
// that is given.
Gradients run_backward(const Upstream& upstream, Tensor hidden, Tensor weight,
                       std::optional<Tensor> bias, const Options& options, Tensor logsumexp,
                       Tensor entropy, std::optional<Tensor> kept, std::optional<Tensor> weight_sum,
                       bool need_hidden, bool need_weight, bool need_bias) {
  check_inputs(hidden, weight, bias, options);
  const int64_t vocab = weight.size(0), depth = hidden.size(1);
  if (weight_sum) {
    RLK_CHECK_DTYPE(*weight_sum, Float);
    RLK_CHECK_CONTIGUOUS(*weight_sum);
    RLK_CHECK_SIZE(*weight_sum, 0, vocab);
    RLK_CHECK_SIZE(*weight_sum, 1, depth);
    need_weight = false;
  }
  Tensor grad_hidden = torch::stable::new_empty(hidden, {need_hidden ? hidden.size(0) : 0, depth});
  Tensor grad_weight = torch::stable::new_empty(hidden, {need_weight ? vocab : 0, depth});
  Tensor grad_bias = torch::stable::new_empty(hidden, {need_bias ? vocab : 0});
  RLK_DISPATCH_FLOAT(hidden, T, {
    const Grads<T> grads = {need_hidden ? grad_hidden.mutable_data_ptr<T>() : nullptr,
                            need_weight ? grad_weight.mutable_data_ptr<T>() : nullptr,
                            need_bias ? grad_bias.mutable_data_ptr<T>() : nullptr,
                            weight_sum ? weight_sum->mutable_data_ptr<float>() : nullptr};
    with_unit<T>([&](auto unit) {
      using Unit = decltype(unit);
      if (kept) {
        const auto kernels = tile_kernels<Unit, T>();
        const int64_t panels = round_up(hidden.size(0), kernels.panel) / kernels.panel;
        RLK_CHECK_SIZE(*kept, 0, panels * kept_stride(kernels, options.vocab_size));
      }
      backward_rows<Unit>(upstream, Matrix<T>(hidden), HeadInputs<T>(weight, bias, options),
                          options, logsumexp.const_data_ptr<float>(),
                          entropy.const_data_ptr<float>(),
                          kept ? kept->mutable_data_ptr<float>() : nullptr, grads);
    });
    // padding of the vocabulary
    if (need_weight)
      std::fill_n(grads.weight + options.vocab_size * depth, (vocab - options.vocab_size) * depth,
                  T(0.0f));
    if (need_bias)
      std::fill_n(grads.bias + options.vocab_size, vocab - options.vocab_size, T(0.0f));
  });
  return {grad_hidden, grad_weight, grad_bias};
}

#define RLK_BACKWARD_ARGUMENTS                                                                   \
  std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_logsumexp,                      \
      std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_id_logprob, Tensor hidden,  \
      Tensor weight, std::optional<Tensor> bias, Tensor targets, std::optional<Tensor> ids,      \
      std::optional<Tensor> vocab_mask, std::optional<Tensor> row_temperature, Tensor logsumexp, \
      Tensor entropy, double temperature, double logit_scale, double softcap,                    \
      int64_t ignore_index, int64_t vocab_size, bool round_logits, bool batch_invariant,         \
      int64_t chunk_size
#define RLK_UPSTREAM                                                                         \
  Upstream {                                                                                 \
    optional_data(grad_logprob), optional_data(grad_logsumexp), optional_data(grad_entropy), \
        optional_data(grad_id_logprob)                                                       \
  }

Gradients bwd(RLK_BACKWARD_ARGUMENTS, bool need_hidden, bool need_weight, bool need_bias) {
  return run_backward(RLK_UPSTREAM, hidden, weight, bias, RLK_OPTIONS, logsumexp, entropy,
                      std::nullopt, std::nullopt, need_hidden, need_weight, need_bias);
}

Gradients bwd_kept(RLK_BACKWARD_ARGUMENTS, std::optional<Tensor> kept,
                   std::optional<Tensor> weight_sum, bool need_hidden, bool need_weight,
                   bool need_bias) {
  return run_backward(RLK_UPSTREAM, hidden, weight, bias, RLK_OPTIONS, logsumexp, entropy, kept,
                      weight_sum, need_hidden, need_weight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("linear_logprob_fwd", TORCH_BOX(&fwd));
  m.impl("linear_logprob_bwd", TORCH_BOX(&bwd));
  m.impl("linear_logprob_fwd_keep", TORCH_BOX(&fwd_keep));
  m.impl("linear_logprob_bwd_kept", TORCH_BOX(&bwd_kept));
}

}  // namespace rlkern
