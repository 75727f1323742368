// An LM head on the CPU: its operands as the tile kernels take them, and the products of its
// backward.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "matmul.h"

namespace rlkern {

using torch::stable::Tensor;

// Packed hidden states of a block stay in the last-level cache.
constexpr int64_t kTokenBlock = 1536;
// The vocabulary is cut by its size alone into chunks, whose statistics are merged in order.
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

// Has the system back memory that is about to be written for the first time, by all threads and
// many pages a call: a fault for every page costs half as much again.
inline void populate(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096, kPiece = uintptr_t{4} << 20;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), kPage);
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  if (begin + kPiece > end) return;
  parallel((end - begin) / kPiece, [&](int64_t from, int64_t to) {
    // a hint: nothing depends on it
    (void)madvise(reinterpret_cast<void*>(begin + from * kPiece), (to - from) * kPiece,
                  MADV_POPULATE_WRITE);
  });
#endif
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

// The weight and the bias as the tile kernels take them; `mask` and all but the soft cap are as
// Head.
template <class T>
struct HeadInputs {
  Matrix<T> weight;
  std::unique_ptr<float[]> bias;
  Head head;

  HeadInputs(const Tensor& weight_tensor, const std::optional<Tensor>& bias_tensor,
             int64_t vocab_size, const bool* mask, bool round, Softcap softcap)
      : weight(weight_tensor) {
    weight.rows = vocab_size;
    if (bias_tensor) {
      bias = scratch<float>(weight.rows);
      std::copy_n(bias_tensor->const_data_ptr<T>(), weight.rows, bias.get());
    }
    head = {bias.get(), mask, round, softcap};
  }
};

// Rows of the vocabulary in a chunk.
inline int64_t chunk_rows_of(int64_t vocab, int64_t tile_rows) {
  return round_up(std::max(kMinChunkRows, (vocab + kMaxChunks - 1) / kMaxChunks), tile_rows);
}

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

// Runs the body with Unit = Pair where bfloat16 products exist and the data are bfloat16.
template <class T, class F>
void with_unit(const F& f) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (cpu_isa() == Isa::kAvx512Bf16) return f(Pair{});
  }
  f(float{});
}

// Sums of the rows of a block of logit gradients, in a fixed order.
template <class Unit>
void add_row_sums(const Unit* data, int64_t rows, int64_t columns, int64_t stride, float* sums) {
  using Element = std::conditional_t<std::is_same_v<Unit, Pair>, bf16, float>;
  parallel(rows, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const Element* row = reinterpret_cast<const Element*>(data) + r * stride;
      f32x16 sum{};
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) sum += load(row + c);
      sums[r] += reduce_add(sum + load_partial(row + c, columns - c, 0.0f));
    }
  });
}

template <class T>
struct HeadGrads {
  T *hidden, *weight, *bias;  // null: not needed
  float* weight_sum;          // the weight's gradient is added to it instead, where given
};

// The rows of a matrix that are listed, as they lie where that is all of them.
template <class T>
struct Gathered {
  std::unique_ptr<T[]> copy;
  Matrix<T> matrix;

  Gathered(const Matrix<T>& given, const std::vector<int64_t>& rows) : matrix(given) {
    const int64_t count = rows.size(), depth = given.columns;
    if (count == given.rows) return;
    copy = scratch<T>(count * depth);
    for (int64_t t = 0; t < count; ++t)
      std::copy_n(given.row(rows[t]), depth, copy.get() + t * depth);
    matrix = Matrix<T>(copy.get(), count, depth);
  }
};

// Where the gradient of a block of logits goes, in both orders: rows [v0, v1) of the vocabulary,
// `columns` tokens from t0 on.
template <class Unit>
struct GradBlock {
  int64_t v0, v1, t0, t1, columns, padded_rows;
  Unit *by_vocab, *by_token;

  // of vocabulary row `row` and the panel of tokens from `t` on
  Unit* vocab_at(int64_t row, int64_t t) const {
    return by_vocab + ((row - v0) * columns + t - t0) / kPerUnit<Unit>;
  }
  int64_t vocab_stride() const { return columns / kPerUnit<Unit>; }
  Unit* token_at(int64_t row, int64_t t, int64_t panel) const {
    return by_token + ((t - t0) / panel * padded_rows + row - v0) / kPerUnit<Unit> * panel;
  }
};

// The gradients of a head from those of its logits. `hidden` has the rows `live` of `total` tokens;
// the others have no gradient. fill(GradBlock) writes the gradient of a block of logits.
//
// The vocabulary is the outer loop: the weight and its gradient pass through the caches once, and
// what exists beside them depends on the tokens alone.
template <class Unit, class T, class Fill>
void head_gradients(const TileKernels<Unit, T>& kernels, const Matrix<T>& hidden,
                    const Matrix<T>& weight, const std::vector<int64_t>& live, int64_t total,
                    const HeadGrads<T>& grads, const Fill& fill) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  const int64_t panel = kernels.panel;
  const int64_t count = hidden.rows, padded = round_up(count, panel);
  const int64_t vocab = weight.rows, depth = hidden.columns;
  // as many tokens in each block as in any other
  const int64_t blocks = (count + kTokenBlock - 1) / kTokenBlock;
  const int64_t block = blocks ? round_up((count + blocks - 1) / blocks, panel) : panel;
  const int64_t width = std::min(block, padded);
  const int64_t hidden_panels = round_up(depth, panel) / panel, wide = hidden_panels * panel;
  const int64_t grad_rows = std::min(kGradRows, round_up(vocab, 2 * kernels.rows));

  const bool needs_weight = grads.weight || grads.weight_sum;
  auto by_vocab = scratch<Unit>(grad_rows * width / kPer);
  auto by_token = scratch<Unit>(grad_rows * width / kPer);
  auto weight_panels = grads.hidden ? scratch<Unit>(grad_rows / kPer * wide) : nullptr;
  auto token_panels = needs_weight ? scratch<Unit>(padded / kPer * wide) : nullptr;
  auto hidden_sum = grads.hidden ? scratch<float>(padded * wide) : nullptr;
  auto weight_sum = needs_weight ? scratch<float>(grad_rows * wide) : nullptr;
  auto bias_sum = scratch<float>(grads.bias ? grad_rows : 0);
  // an empty vocabulary adds nothing
  if (grads.hidden && vocab == 0) std::fill_n(hidden_sum.get(), padded * wide, 0.0f);
  if (grads.weight) populate(grads.weight, vocab * depth * sizeof(T));
  for (int64_t t0 = 0; needs_weight && t0 < count; t0 += block) {
    const int64_t t1 = std::min(count, t0 + block);
    pack_rows(kernels, hidden, t0, t1, units_of<Unit>(t1 - t0),
              token_panels.get() + t0 / kPer * wide);
  }

  for (int64_t v0 = 0; v0 < vocab; v0 += grad_rows) {
    const int64_t v1 = std::min(vocab, v0 + grad_rows), rows = v1 - v0;
    const int64_t padded_rows = round_up(rows, kernels.rows);
    if (grads.hidden) pack_rows(kernels, weight, v0, v1, padded_rows / kPer, weight_panels.get());
    if (needs_weight && count == 0) std::fill_n(weight_sum.get(), padded_rows * wide, 0.0f);
    if (grads.bias) std::fill_n(bias_sum.get(), rows, 0.0f);

    for (int64_t t0 = 0; t0 < count; t0 += block) {
      const int64_t t1 = std::min(count, t0 + block), units = units_of<Unit>(t1 - t0);
      const int64_t panels = round_up(t1 - t0, panel) / panel, columns = panels * panel;
      fill(GradBlock<Unit>{v0, v1, t0, t1, columns, padded_rows, by_vocab.get(), by_token.get()});
      if (grads.bias) add_row_sums(by_vocab.get(), rows, t1 - t0, columns, bias_sum.get());
      if (grads.hidden) {
        parallel(panels * hidden_panels, [&](int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t p = i / hidden_panels, h = i % hidden_panels, t = t0 + p * panel;
            kernels.product(by_token.get() + p * padded_rows / kPer * panel, 1, panel,
                            weight_panels.get() + h * padded_rows / kPer * panel,
                            padded_rows / kPer, std::min(panel, t1 - t), depth - h * panel,
                            hidden_sum.get() + t * wide + h * panel, wide, v0 > 0);
          }
        });
      }
      if (needs_weight) {
        // groups of rows small enough for L2 beside the panel
        const int64_t group = 8 * kernels.rows, groups = (padded_rows + group - 1) / group;
        const Unit* const packed = token_panels.get() + t0 / kPer * wide;
        parallel(hidden_panels * groups, [&](int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t h = i / groups, row = i % groups * group;
            kernels.product(by_vocab.get() + row * columns / kPer, columns / kPer, 1,
                            packed + h * units * panel, units, std::min(group, padded_rows - row),
                            depth - h * panel, weight_sum.get() + row * wide + h * panel, wide,
                            t0 > 0);
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
    if (count < total) std::fill_n(grads.hidden, total * depth, T(0.0f));
    parallel(count, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        kernels.convert_row(hidden_sum.get() + t * wide, grads.hidden + live[t] * depth, depth);
    });
  }
}

}  // namespace rlkern
