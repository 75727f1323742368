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

// What every pass needs of the tokens that it visits: padded to whole panels.
struct Tokens {
  int64_t count, padded;
  std::unique_ptr<float[]> inv_temperature;
  std::unique_ptr<int32_t[]> target;
  Softcap softcap;

  Tokens(const std::vector<int64_t>& visited, const int64_t* wanted,
         const std::optional<Tensor>& row_temperature, double temperature, Softcap cap,
         int64_t vocab, int64_t ignore_index, int panel)
      : count(visited.size()),
        padded(round_up(count, panel)),
        inv_temperature(scratch<float>(padded)),
        target(scratch<int32_t>(padded)),
        softcap(cap) {
    const float* rows = row_temperature ? row_temperature->const_data_ptr<float>() : nullptr;
    std::fill_n(inv_temperature.get(), padded, 1.0f);
    std::fill_n(target.get(), padded, -1);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = visited[t], id = wanted[row];
      inv_temperature[t] = softcap.inverse(rows ? rows[row] : static_cast<float>(temperature));
      if (id >= 0 && id < vocab && id != ignore_index) target[t] = static_cast<int32_t>(id);
    }
  }
  TokenInputs at(int64_t t) const { return {inv_temperature.get() + t, target.get() + t, softcap}; }
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

  // f(pointer, stride, first row, rows) over blocks of [begin, end)
  template <class F>
  void for_blocks(int64_t begin, int64_t end, const F& f) const {
    std::unique_ptr<Unit[]> copy;
    for (int64_t row = begin; row < end; row += block_) {
      const int64_t rows = std::min(block_, end - row);
      if (in_place_ && rows % tile_rows_ == 0) {
        f(reinterpret_cast<const Unit*>(weight_.row(row)), weight_.stride / kPerUnit<Unit>, row,
          rows);
        continue;
      }
      if (!copy) copy = scratch<Unit>(block_ * units_);
      copy_rows<Unit>(weight_.row(row), weight_.stride, rows, weight_.columns,
                      round_up(rows, tile_rows_), copy.get());
      f(copy.get(), units_, row, rows);
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

template <class Unit, class T>
void forward_rows(const Matrix<T>& hidden, const Matrix<T>& weight, const Tensor& targets,
                  const std::optional<Tensor>& row_temperature, double temperature, Softcap softcap,
                  int64_t ignore_index, float* logprob, float* logsumexp, float* entropy) {
  const TileKernels<Unit, T> kernels = tile_kernels<Unit, T>();
  const int panel = kernels.panel;
  const int64_t vocab = weight.rows, units = units_of<Unit>(hidden.columns);
  const int64_t* wanted = targets.const_data_ptr<int64_t>();
  std::vector<int64_t> all(hidden.rows);
  std::iota(all.begin(), all.end(), 0);
  const Tokens tokens(all, wanted, row_temperature, temperature, softcap, vocab, ignore_index,
                      panel);
  const int64_t chunk_rows =
      round_up(std::max(kMinChunkRows, (vocab + kMaxChunks - 1) / kMaxChunks), kernels.rows);
  const int64_t chunks = (vocab + chunk_rows - 1) / chunk_rows;
  const WeightRows<Unit, T> rows_of(weight, kernels.rows);
  const int64_t block = kTokenBlock / panel * panel;
  const int64_t width = std::min(block, tokens.padded);
  auto partial = scratch<float>(chunks * 4 * width);

  for (int64_t begin = 0; begin < tokens.count; begin += block) {
    const int64_t end = std::min(begin + block, tokens.count);
    const int64_t panels = round_up(end - begin, panel) / panel;
    const auto packed = pack_tokens<Unit>(hidden, begin, end, panel);
    const auto stats_of = [&](int64_t chunk, int64_t t) -> TokenStats {
      float* base = partial.get() + chunk * 4 * width + t;
      return {base, base + width, base + 2 * width, base + 3 * width};
    };
    parallel(chunks, [&](int64_t from, int64_t to) {
      for (int64_t chunk = from; chunk < to; ++chunk) {
        const TokenStats stats = stats_of(chunk, 0);
        std::fill_n(stats.max, width, -INFINITY);
        std::fill_n(stats.sum, width, 0.0f);
        std::fill_n(stats.dot, width, 0.0f);
        std::fill_n(stats.target_logit, width, NAN);
        rows_of.for_blocks(chunk * chunk_rows, std::min(vocab, (chunk + 1) * chunk_rows),
                           [&](const Unit* w, int64_t stride, int64_t first, int64_t rows) {
                             for (int64_t p = 0; p < panels; ++p)
                               kernels.fold_logits(
                                   w, stride, rows, first, packed.get() + p * panel * units, units,
                                   tokens.at(begin + p * panel), stats_of(chunk, p * panel));
                           });
      }
    });
    for (int64_t t = begin; t < end; ++t) {
      const float inv = tokens.inv_temperature[t];
      SoftmaxStats stats;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const TokenStats s = stats_of(chunk, t - begin);
        stats.merge({*s.max, *s.sum, *s.dot}, inv);
      }
      logsumexp[t] = stats.logsumexp(inv);
      const int32_t target = tokens.target[t];
      logprob[t] = wanted[t] == ignore_index ? 0.0f : NAN;
      if (target >= 0)
        logprob[t] = stats.logprob(*stats_of(target / chunk_rows, t - begin).target_logit, inv);
      if (entropy) entropy[t] = stats.entropy();
    }
  }
}

const float* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

struct Upstream {
  const float *logprob, *logsumexp, *entropy;

  // Tokens with any gradient at all: advantages of 0 and clipped ratios leave many without.
  std::vector<int64_t> live(const int64_t* wanted, int64_t ignore_index, int64_t count) const {
    std::vector<int64_t> rows;
    rows.reserve(count);
    for (int64_t t = 0; t < count; ++t) {
      const bool any = (logprob && wanted[t] != ignore_index && logprob[t] != 0.0f) ||
                       (logsumexp && logsumexp[t] != 0.0f) || (entropy && entropy[t] != 0.0f);
      if (any) rows.push_back(t);
    }
    return rows;
  }
};

template <class Unit, class T>
void backward_rows(Upstream upstream, const Matrix<T>& given, const Matrix<T>& weight,
                   const Tensor& targets, const float* logsumexp, const float* entropy,
                   const std::optional<Tensor>& row_temperature, double temperature,
                   Softcap softcap, int64_t ignore_index, T* grad_hidden, T* grad_weight) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  const TileKernels<Unit, T> kernels = tile_kernels<Unit, T>();
  const int panel = kernels.panel;
  const int64_t vocab = weight.rows, depth = given.columns, units = units_of<Unit>(depth);
  const int64_t* wanted = targets.const_data_ptr<int64_t>();
  const std::vector<int64_t> live = upstream.live(wanted, ignore_index, given.rows);
  const Tokens tokens(live, wanted, row_temperature, temperature, softcap, vocab, ignore_index,
                      panel);
  const int64_t padded = tokens.padded;
  // rows without a gradient drop out of all three products
  const bool gathers = tokens.count < given.rows;
  auto gathered = gathers ? scratch<T>(tokens.count * depth) : nullptr;
  if (gathers)
    for (int64_t t = 0; t < tokens.count; ++t)
      std::copy_n(given.row(live[t]), depth, gathered.get() + t * depth);
  const Matrix<T> hidden = gathers ? Matrix<T>(gathered.get(), tokens.count, depth) : given;

  auto token_grads = scratch<float>(4 * padded);
  float* fields[4];
  for (int i = 0; i < 4; ++i) fields[i] = token_grads.get() + i * padded;
  std::fill_n(fields[0], 4 * padded, 0.0f);
  for (int64_t t = 0; t < tokens.count; ++t) {
    const int64_t row = live[t];
    const bool ignored = wanted[row] == ignore_index;
    const SoftmaxGrad g(upstream.logprob && !ignored ? upstream.logprob[row] : 0.0f,
                        upstream.entropy ? upstream.entropy[row] : 0.0f,
                        upstream.logsumexp ? upstream.logsumexp[row] : 0.0f,
                        upstream.entropy ? entropy[row] : 0.0f);
    fields[0][t] = g.target;
    fields[1][t] = g.constant;
    fields[2][t] = g.entropy;
    fields[3][t] = logsumexp[row];
  }

  const int64_t block = kTokenBlock / panel * panel;
  const int64_t width = std::min(block, padded);
  const int64_t hidden_panels = round_up(depth, panel) / panel, wide = hidden_panels * panel;
  const int64_t grad_rows = std::min(kGradRows, round_up(vocab, 2 * kernels.rows));
  const bool one_block = tokens.count <= block;
  const WeightRows<Unit, T> rows_of(weight, kernels.rows);

  auto by_vocab = scratch<Unit>(grad_rows * width / kPer);
  auto by_token = scratch<Unit>(grad_rows * width / kPer);
  auto weight_panels = grad_hidden ? scratch<Unit>(grad_rows / kPer * wide) : nullptr;
  auto token_panels = grad_weight ? scratch<Unit>(width / kPer * wide) : nullptr;
  auto hidden_sum = grad_hidden ? scratch<float>(padded * wide) : nullptr;
  auto weight_sum = grad_weight ? scratch<float>(grad_rows * wide) : nullptr;
  // an empty vocabulary adds nothing
  if (grad_hidden && vocab == 0) std::fill_n(hidden_sum.get(), padded * wide, 0.0f);
  std::unique_ptr<Unit[]> packed;

  for (int64_t v0 = 0; v0 < vocab; v0 += grad_rows) {
    const int64_t v1 = std::min(vocab, v0 + grad_rows), rows = v1 - v0;
    const int64_t padded_rows = round_up(rows, kernels.rows);
    if (grad_hidden) pack_rows(kernels, weight, v0, v1, padded_rows / kPer, weight_panels.get());
    if (grad_weight && tokens.count == 0) std::fill_n(weight_sum.get(), padded_rows * wide, 0.0f);

    for (int64_t t0 = 0; t0 < tokens.count; t0 += block) {
      const int64_t t1 = std::min(tokens.count, t0 + block);
      const int64_t panels = round_up(t1 - t0, panel) / panel, columns = panels * panel;
      if (!one_block || v0 == 0) {
        packed = pack_tokens<Unit>(hidden, t0, t1, panel);
        if (grad_weight) pack_rows(kernels, hidden, t0, t1, columns / kPer, token_panels.get());
      }
      // the gradient of this block of logits, in both orders
      parallel(panels, [&](int64_t from, int64_t to) {
        rows_of.for_blocks(v0, v1, [&](const Unit* w, int64_t stride, int64_t first, int64_t n) {
          for (int64_t p = from; p < to; ++p) {
            const int64_t t = t0 + p * panel, row = first - v0;
            kernels.logit_gradient(
                w, stride, n, first, packed.get() + p * panel * units, units, tokens.at(t),
                {fields[0] + t, fields[1] + t, fields[2] + t, fields[3] + t},
                by_vocab.get() + (row * columns + p * panel) / kPer, columns / kPer,
                by_token.get() + (p * padded_rows + row) / kPer * panel);
          }
        });
      });
      if (grad_hidden) {
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
      if (grad_weight) {
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
    if (grad_weight) {
      parallel(rows, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r)
          kernels.convert_row(weight_sum.get() + r * wide, grad_weight + (v0 + r) * depth, depth);
      });
    }
  }
  if (grad_hidden) {
    if (gathers) std::fill_n(grad_hidden, given.rows * depth, T(0.0f));
    parallel(tokens.count, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        kernels.convert_row(hidden_sum.get() + t * wide, grad_hidden + live[t] * depth, depth);
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

void check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  RLK_CHECK_CPU(hidden);
  RLK_CHECK_CPU(weight);
  RLK_CHECK_DIM(hidden, 2);
  RLK_CHECK_DIM(weight, 2);
  RLK_CHECK_DTYPE(targets, Long);
  RLK_CHECK_CONTIGUOUS(targets);
  RLK_CHECK_SIZE(targets, 0, hidden.size(0));
  RLK_CHECK_SIZE(weight, 1, hidden.size(1));
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(),
                  "hidden and weight must have the same dtype");
  STD_TORCH_CHECK(hidden.size(1) == 0 || hidden.stride(1) == 1, "hidden must have contiguous rows");
  STD_TORCH_CHECK(weight.size(1) == 0 || weight.stride(1) == 1, "weight must have contiguous rows");
  STD_TORCH_CHECK(weight.size(0) < (int64_t{1} << 31), "weight must have fewer than 2^31 rows");
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, Tensor weight, Tensor targets,
                                           std::optional<Tensor> row_temperature,
                                           double temperature, double logit_scale, double cap,
                                           int64_t ignore_index, bool want_entropy) {
  check_inputs(hidden, weight, targets);
  const Softcap softcap = {static_cast<float>(logit_scale), static_cast<float>(cap)};
  const int64_t count = hidden.size(0);
  const auto kFloat = torch::headeronly::ScalarType::Float;
  Tensor logprob = torch::stable::new_empty(hidden, {count}, kFloat);
  Tensor logsumexp = torch::stable::new_empty(hidden, {count}, kFloat);
  Tensor entropy = torch::stable::new_empty(hidden, {want_entropy ? count : 0}, kFloat);
  RLK_DISPATCH_FLOAT(hidden, T, {
    with_unit<T>([&](auto unit) {
      forward_rows<decltype(unit)>(
          Matrix<T>(hidden), Matrix<T>(weight), targets, row_temperature, temperature, softcap,
          ignore_index, logprob.mutable_data_ptr<float>(), logsumexp.mutable_data_ptr<float>(),
          want_entropy ? entropy.mutable_data_ptr<float>() : nullptr);
    });
  });
  return {logprob, logsumexp, entropy};
}

std::tuple<Tensor, Tensor> backward(std::optional<Tensor> grad_logprob,
                                    std::optional<Tensor> grad_logsumexp,
                                    std::optional<Tensor> grad_entropy, Tensor hidden,
                                    Tensor weight, Tensor targets, Tensor logsumexp, Tensor entropy,
                                    std::optional<Tensor> row_temperature, double temperature,
                                    double logit_scale, double cap, int64_t ignore_index,
                                    bool need_hidden, bool need_weight) {
  check_inputs(hidden, weight, targets);
  const Softcap softcap = {static_cast<float>(logit_scale), static_cast<float>(cap)};
  Tensor grad_hidden =
      torch::stable::new_empty(hidden, {need_hidden ? hidden.size(0) : 0, hidden.size(1)});
  Tensor grad_weight =
      torch::stable::new_empty(hidden, {need_weight ? weight.size(0) : 0, weight.size(1)});
  const Upstream upstream = {optional_data(grad_logprob), optional_data(grad_logsumexp),
                             optional_data(grad_entropy)};
  RLK_DISPATCH_FLOAT(hidden, T, {
    with_unit<T>([&](auto unit) {
      backward_rows<decltype(unit)>(upstream, Matrix<T>(hidden), Matrix<T>(weight), targets,
                                    logsumexp.const_data_ptr<float>(),
                                    entropy.const_data_ptr<float>(), row_temperature, temperature,
                                    softcap, ignore_index,
                                    need_hidden ? grad_hidden.mutable_data_ptr<T>() : nullptr,
                                    need_weight ? grad_weight.mutable_data_ptr<T>() : nullptr);
    });
  });
  return {grad_hidden, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("linear_logprob_fwd", TORCH_BOX(&forward));
  m.impl("linear_logprob_bwd", TORCH_BOX(&backward));
}

}  // namespace rlkern
