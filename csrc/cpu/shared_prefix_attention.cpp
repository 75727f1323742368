// Training attention over packed trees. Scores are kept transposed, keys by row and a panel of
// query rows by column: a lane is then one row's softmax, and a panel of weights is the packed
// operand of the next product. Every tile is cut at a fixed distance from the first row of its
// pack.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "matmul.h"
#include "rlkern/math/softcap.h"

namespace rlkern {

// Keys of a tile, and query rows whose gradients are added up before they go to the keys'.
constexpr int64_t kTileKeys = 128;
constexpr int64_t kBlockRows = 96;
// What rows of a packed operand are padded to: a multiple of every register tile's.
constexpr int64_t kPadding = 8;

// From products to what is exponentiated.
struct AttentionScore {
  float scale;
  Softcap softcap;
};

// The rows of a panel that see a key.
struct LaneSpan {
  float begin, end;
};

// The functions of one instruction set: see shared_prefix_attention_tile.h.
template <class Unit>
struct ScoreKernels {
  bool (*fold)(const AttentionScore&, const LaneSpan* seen, int64_t count, int vectors,
               float* products, float* max, float* sum, float* decay, Unit* weights);
  void (*scale_lanes)(const float* decay, int vectors, int64_t rows, float* out);
  void (*gradients)(const AttentionScore&, const LaneSpan* seen, int64_t count, int vectors,
                    const float* products, const float* weight_grads, const float* lse,
                    const float* delta, int64_t stride, Unit* weights, Unit* grads,
                    Unit* grads_by_row);
};

#define RLK_ISA isa_default
#define RLK_TARGET
#define RLK_HAS_BF16_DOT 0
#include "shared_prefix_attention_tile.h"

#if defined(__x86_64__)
#define RLK_ISA isa_avx2
#define RLK_TARGET __attribute__((target("avx2,fma,f16c")))
#define RLK_HAS_BF16_DOT 0
#include "shared_prefix_attention_tile.h"

#define RLK_ISA isa_avx512
#define RLK_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define RLK_HAS_BF16_DOT 0
#include "shared_prefix_attention_tile.h"

#define RLK_ISA isa_avx512_bf16
#define RLK_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx512bf16")))
#define RLK_HAS_BF16_DOT 1
#include "shared_prefix_attention_tile.h"
#endif

namespace {

using torch::stable::Tensor;

template <class Unit>
ScoreKernels<Unit> score_kernels() {
  if constexpr (std::is_same_v<Unit, float>) {
    switch (cpu_isa()) {
#if defined(__x86_64__)
      case Isa::kAvx512Bf16:
      case Isa::kAvx512:
        return isa_avx512::score_kernels<float>();
      case Isa::kAvx2:
        return isa_avx2::score_kernels<float>();
#endif
      default:
        return isa_default::score_kernels<float>();
    }
  }
#if defined(__x86_64__)
  else {
    return isa_avx512_bf16::score_kernels<Pair>();
  }
#endif
}

// Rows [begin, end) of the packed tensors, which see each other alone.
struct Pack {
  int64_t begin, end;

  int64_t rows() const { return end - begin; }
};

// Sizes and the tree: what forward and backward have in common.
struct Tree {
  int64_t heads, kv_heads, width;
  const int32_t* ends;
  std::vector<Pack> packs;  // those that have rows
  AttentionScore score;

  int64_t group() const { return heads / kv_heads; }
  int64_t padded_width() const { return round_up(width, kPadding); }
};

// Keys of a tile that some row of a panel sees, from a multiple of kPadding on; `whole`: all rows
// see all of them.
struct KeySpan {
  int64_t begin, end;
  bool whole;
};

// Rows and keys of a pack, counted from its first row.
class Sight {
 public:
  Sight(const Tree& tree, const Pack& pack) : ends_(tree.ends + pack.begin), first_(pack.begin) {
    for (int64_t at = 0; at < pack.rows(); at += kTileKeys)
      furthest_.push_back(
          *std::max_element(ends_ + at, ends_ + std::min(pack.rows(), at + kTileKeys)) - first_);
  }

  // What rows [row_begin, row_end) see of the tile that begins at `tile`.
  KeySpan keys(int64_t tile, int64_t row_begin, int64_t row_end) const {
    KeySpan span{tile, tile, true};
    if (furthest_[tile / kTileKeys] <= row_begin) return span;
    const int64_t end = std::min(tile + kTileKeys, row_end);
    while (span.begin < end && end_of(span.begin) <= row_begin) ++span.begin;
    for (int64_t key = span.begin; key < end; ++key)
      if (end_of(key) > row_begin) span.end = key + 1;
    if (span.end <= span.begin) return {tile, tile, true};
    for (int64_t key = span.begin; key < span.end; ++key)
      span.whole &= key <= row_begin && end_of(key) >= row_end;
    const int64_t aligned = tile + (span.begin - tile) / kPadding * kPadding;
    span.whole &= aligned == span.begin;
    span.begin = aligned;
    return span;
  }

  // The lanes of a panel from `row` on that see each key of a span.
  void lanes(const KeySpan& span, int64_t row, LaneSpan* seen) const {
    for (int64_t key = span.begin; key < span.end; ++key)
      *seen++ = {static_cast<float>(key - row), static_cast<float>(end_of(key) - row)};
  }

 private:
  int64_t end_of(int64_t key) const { return ends_[key] - first_; }

  const int32_t* ends_;
  int64_t first_;
  std::vector<int64_t> furthest_;
};

// Rows in units along the rows: out[u][d] holds d of rows u kPer, ... Rows past the last are 0.
template <class Unit, class T>
void pack_along_rows(const T* src, int64_t stride, int64_t rows, int64_t width, int64_t out_stride,
                     Unit* out) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  const std::vector<T> zeros(width, T(0.0f));
  for (int64_t row = 0; row < rows; row += kPer, out += out_stride) {
    const T* const even = src + row * stride;
    const T* const odd = row + kPer <= rows ? even + (kPer - 1) * stride : zeros.data();
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) set_units(out + d, even + d, odd + d);
    for (; d < width; ++d) set_unit(out + d, even[d], odd[d]);
    for (; d < out_stride; ++d) out[d] = Unit{};
  }
}

// All tasks, each by the thread that is free next: no result depends on whose it is.
template <class F>
void in_turn(int64_t tasks, const F& run) {
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) run(i);
  });
}

template <class T>
struct Forward {
  Tree tree;
  const T *q, *k, *v;
  T* out;
  float* lse;
};

template <class T>
struct Backward {
  Tree tree;
  const T *q, *k, *v, *out, *grad_out;
  const float *lse, *grad_lse;  // grad_lse may be null
  T *grad_q, *grad_k, *grad_v;
};

// One head's keys and values of a pack.
template <class Unit>
struct Keys {
  std::vector<Unit> keys;    // [rows][units]
  std::vector<Unit> values;  // [units of rows][width]
};

template <class Unit, class T>
void attend(const Forward<T>& a) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  const Tree& tree = a.tree;
  const TileKernels<Unit, T> tile = tile_kernels<Unit, T>();
  const ScoreKernels<Unit> score = score_kernels<Unit>();
  const int64_t units = units_of<Unit>(tree.width), wide = tree.padded_width();
  const int64_t q_stride = tree.heads * tree.width, k_stride = tree.kv_heads * tree.width;
  const int64_t heads = tree.kv_heads, packs = static_cast<int64_t>(tree.packs.size());
  std::vector<Keys<Unit>> cache(packs * heads);
  in_turn(packs * heads, [&](int64_t i) {
    const Pack& pack = tree.packs[i / heads];
    const int64_t at = pack.begin * k_stride + i % heads * tree.width;
    const int64_t padded = round_up(pack.rows(), kPadding);
    cache[i].keys.resize(padded * units);
    cache[i].values.resize(units_of<Unit>(pack.rows()) * wide);
    copy_rows(a.k + at, k_stride, pack.rows(), tree.width, padded, cache[i].keys.data());
    pack_along_rows(a.v + at, k_stride, pack.rows(), tree.width, wide, cache[i].values.data());
  });
  struct Task {
    int64_t pack, row;
  };
  std::vector<Sight> sights;
  std::vector<Task> tasks;
  for (int64_t p = 0; p < packs; ++p) {
    sights.emplace_back(tree, tree.packs[p]);
    for (int64_t row = 0; row < tree.packs[p].rows(); row += tile.panel) tasks.push_back({p, row});
  }
  // panels with the most keys first
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& x, const Task& y) { return x.row > y.row; });
  in_turn(static_cast<int64_t>(tasks.size()) * heads, [&](int64_t i) {
    const Task& task = tasks[i / heads];
    const int64_t head = i % heads;
    const Pack& pack = tree.packs[task.pack];
    const Sight& sight = sights[task.pack];
    const Keys<Unit>& own = cache[task.pack * heads + head];
    const int64_t rows = std::min<int64_t>(tile.panel, pack.rows() - task.row);
    const int vectors = vectors_of(rows, tile.width, tile.panel);
    std::vector<Unit> queries(units * tile.panel), weights(kTileKeys / kPer * tile.panel);
    std::vector<float> products(kTileKeys * tile.panel), sums(wide * tile.panel), line(tree.width);
    std::vector<float> max(tile.panel), sum(tile.panel), decay(tile.panel);
    std::vector<LaneSpan> seen(kTileKeys);
    for (int64_t h = head * tree.group(); h < (head + 1) * tree.group(); ++h) {
      const int64_t at = (pack.begin + task.row) * q_stride + h * tree.width;
      pack_rows_as_columns<Unit>(a.q + at, q_stride, rows, tree.width, tile.panel, queries.data());
      std::fill(max.begin(), max.end(), -INFINITY);
      std::fill(sum.begin(), sum.end(), 0.0f);
      bool any = false;
      for (int64_t key = 0; key < task.row + rows; key += kTileKeys) {
        const KeySpan span = sight.keys(key, task.row, task.row + rows);
        const int64_t count = span.end - span.begin;
        if (count == 0) continue;
        if (!span.whole) sight.lanes(span, task.row, seen.data());
        tile.product(own.keys.data() + span.begin * units, units, 1, queries.data(), units,
                     round_up(count, tile.rows), rows, products.data(), tile.panel, false);
        const bool moved =
            score.fold(tree.score, span.whole ? nullptr : seen.data(), count, vectors,
                       products.data(), max.data(), sum.data(), decay.data(), weights.data());
        if (any && moved) score.scale_lanes(decay.data(), vectors, wide, sums.data());
        tile.product(own.values.data() + span.begin / kPer * wide, 1, wide, weights.data(),
                     units_of<Unit>(count), wide, rows, sums.data(), tile.panel, any);
        any = true;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float inverse = sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f;
        for (int64_t d = 0; d < tree.width; ++d)
          line[d] = inverse > 0.0f ? sums[d * tile.panel + r] * inverse : 0.0f;
        tile.convert_row(line.data(), a.out + at + r * q_stride, tree.width);
        a.lse[(pack.begin + task.row + r) * tree.heads + h] =
            sum[r] > 0.0f ? max[r] + std::log(sum[r]) : -INFINITY;
      }
    }
  });
}

// Gradients of one head of keys and of the query heads that read it, over one pack.
template <class Unit, class T>
void head_gradients(const Backward<T>& a, const Pack& pack, int64_t head) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  const Tree& tree = a.tree;
  const TileKernels<Unit, T> tile = tile_kernels<Unit, T>();
  const ScoreKernels<Unit> score = score_kernels<Unit>();
  const Sight sight(tree, pack);
  const int64_t panel = tile.panel, panels = kBlockRows / panel, block = panels * panel;
  const int64_t width = tree.width, units = units_of<Unit>(width), wide = tree.padded_width();
  const int64_t q_stride = tree.heads * width, k_stride = tree.kv_heads * width;
  const int64_t column_panels = (width + panel - 1) / panel, columns = round_up(width, kLanes);
  const int64_t length = pack.rows(), padded = round_up(length, kPadding);
  const int64_t key_at = pack.begin * k_stride + head * width;

  std::vector<Unit> keys(padded * units), values(padded * units);
  std::vector<Unit> keys_along(units_of<Unit>(length) * wide);
  copy_rows(a.k + key_at, k_stride, length, width, padded, keys.data());
  copy_rows(a.v + key_at, k_stride, length, width, padded, values.data());
  pack_along_rows(a.k + key_at, k_stride, length, width, wide, keys_along.data());
  std::vector<float> grad_k(padded * columns), grad_v(padded * columns);

  // of a block of query rows: as operands by lane, and by column
  std::vector<Unit> queries(panels * units * panel), grads_out(panels * units * panel);
  const int64_t block_units = block / kPer;
  std::vector<Unit> query_columns(column_panels * block_units * panel);
  std::vector<Unit> grad_columns(column_panels * block_units * panel);
  std::vector<float> lse(block), delta(block), grad_q(panels * wide * panel), line(width);
  // of a tile of keys
  std::vector<float> products(kTileKeys * panel), weight_grads(kTileKeys * panel);
  std::vector<Unit> weights(kTileKeys * block_units), score_grads(kTileKeys * block_units);
  std::vector<Unit> grads_by_row(kTileKeys / kPer * panel);
  std::vector<LaneSpan> seen(kTileKeys);

  for (int64_t h = head * tree.group(); h < (head + 1) * tree.group(); ++h)
    for (int64_t row = 0; row < length; row += block) {
      const int64_t rows = std::min(block, length - row), live = (rows + panel - 1) / panel;
      const int64_t first = pack.begin + row, at = first * q_stride + h * width;
      for (int64_t p = 0; p < live; ++p) {
        const int64_t from = at + p * panel * q_stride, count = std::min(panel, rows - p * panel);
        pack_rows_as_columns<Unit>(a.q + from, q_stride, count, width, panel,
                                   queries.data() + p * units * panel);
        pack_rows_as_columns<Unit>(a.grad_out + from, q_stride, count, width, panel,
                                   grads_out.data() + p * units * panel);
      }
      for (int64_t c = 0; c < column_panels; ++c) {
        const int64_t from = at + c * panel, to = c * block_units * panel;
        tile.pack_columns(a.q + from, q_stride, rows, block_units, width - c * panel,
                          query_columns.data() + to);
        tile.pack_columns(a.grad_out + from, q_stride, rows, block_units, width - c * panel,
                          grad_columns.data() + to);
      }
      for (int64_t r = 0; r < block; ++r) {
        // rows past the last, and those that see nothing, have weights of 0
        lse[r] = INFINITY;
        delta[r] = 0.0f;
        if (r >= rows) continue;
        const int64_t of_row = (first + r) * tree.heads + h;
        if (a.lse[of_row] > -INFINITY) lse[r] = a.lse[of_row];
        for (int64_t d = 0; d < width; ++d)
          delta[r] += static_cast<float>(a.grad_out[of_row * width + d]) *
                      static_cast<float>(a.out[of_row * width + d]);
        if (a.grad_lse) delta[r] -= a.grad_lse[of_row];
      }
      std::fill(grad_q.begin(), grad_q.end(), 0.0f);
      for (int64_t key = 0; key < row + rows; key += kTileKeys) {
        const KeySpan span = sight.keys(key, row, row + rows);
        const int64_t count = span.end - span.begin, key_rows = round_up(count, tile.rows);
        if (count == 0) continue;
        for (int64_t p = 0; p < live; ++p) {
          const int64_t live_rows = std::min(panel, rows - p * panel);
          if (!span.whole) sight.lanes(span, row + p * panel, seen.data());
          tile.product(keys.data() + span.begin * units, units, 1,
                       queries.data() + p * units * panel, units, key_rows, panel, products.data(),
                       panel, false);
          tile.product(values.data() + span.begin * units, units, 1,
                       grads_out.data() + p * units * panel, units, key_rows, panel,
                       weight_grads.data(), panel, false);
          score.gradients(tree.score, span.whole ? nullptr : seen.data(), count,
                          static_cast<int>(panel / tile.width), products.data(),
                          weight_grads.data(), lse.data() + p * panel, delta.data() + p * panel,
                          block_units, weights.data() + p * panel / kPer,
                          score_grads.data() + p * panel / kPer, grads_by_row.data());
          tile.product(keys_along.data() + span.begin / kPer * wide, 1, wide, grads_by_row.data(),
                       units_of<Unit>(count), wide, live_rows, grad_q.data() + p * wide * panel,
                       panel, true);
        }
        const int64_t depth = units_of<Unit>(std::min(rows, live * panel));
        for (int64_t c = 0; c < column_panels; ++c) {
          const int64_t to = span.begin * columns + c * panel, from = c * block_units * panel;
          tile.product(weights.data(), block_units, 1, grad_columns.data() + from, depth, key_rows,
                       width - c * panel, grad_v.data() + to, columns, true);
          tile.product(score_grads.data(), block_units, 1, query_columns.data() + from, depth,
                       key_rows, width - c * panel, grad_k.data() + to, columns, true);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float* const sums = grad_q.data() + r / panel * wide * panel + r % panel;
        for (int64_t d = 0; d < width; ++d) line[d] = tree.score.scale * sums[d * panel];
        tile.convert_row(line.data(), a.grad_q + at + r * q_stride, width);
      }
    }
  for (int64_t r = 0; r < length; ++r) {
    for (int64_t d = 0; d < width; ++d) line[d] = tree.score.scale * grad_k[r * columns + d];
    tile.convert_row(line.data(), a.grad_k + key_at + r * k_stride, width);
    tile.convert_row(grad_v.data() + r * columns, a.grad_v + key_at + r * k_stride, width);
  }
}

template <class Unit, class T>
void gradients(const Backward<T>& a) {
  const Tree& tree = a.tree;
  // the longest packs first
  std::vector<Pack> packs = tree.packs;
  std::stable_sort(packs.begin(), packs.end(),
                   [](const Pack& x, const Pack& y) { return x.rows() > y.rows(); });
  in_turn(static_cast<int64_t>(packs.size()) * tree.kv_heads,
          [&](int64_t i) { head_gradients<Unit>(a, packs[i / tree.kv_heads], i % tree.kv_heads); });
}

// Pairs of bfloat16 where the CPU multiplies them.
template <class T>
bool in_pairs() {
  return std::is_same_v<T, bf16> && cpu_isa() == Isa::kAvx512Bf16;
}

// The sizes of q, k, v and the packs, checked.
Tree checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& subtree_end,
             const Tensor& cu_seqlens, double scale, double softcap) {
  for (const Tensor* t : {&q, &k, &v}) {
    RLK_CHECK_CPU(*t);
    RLK_CHECK_DIM(*t, 3);
    RLK_CHECK_CONTIGUOUS(*t);
    RLK_CHECK_SIZE(*t, 0, q.size(0));
    RLK_CHECK_SIZE(*t, 2, q.size(2));
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  }
  Tree tree{q.size(1), k.size(1), q.size(2), nullptr, {}, {static_cast<float>(scale), {}}};
  tree.score.softcap.cap = static_cast<float>(softcap);
  STD_TORCH_CHECK(v.size(1) == k.size(1), "k and v must have the same heads");
  STD_TORCH_CHECK(tree.kv_heads > 0 && tree.heads % tree.kv_heads == 0,
                  "the heads of q must be a multiple of those of k");
  for (const Tensor* t : {&subtree_end, &cu_seqlens}) {
    RLK_CHECK_CPU(*t);
    RLK_CHECK_DIM(*t, 1);
    RLK_CHECK_DTYPE(*t, Int);
    RLK_CHECK_CONTIGUOUS(*t);
  }
  RLK_CHECK_SIZE(subtree_end, 0, q.size(0));
  if (q.size(0) > 0) tree.ends = subtree_end.const_data_ptr<int32_t>();
  for (int64_t s = 0; s + 1 < cu_seqlens.numel(); ++s) {
    const int32_t* const bounds = cu_seqlens.const_data_ptr<int32_t>() + s;
    STD_TORCH_CHECK(0 <= bounds[0] && bounds[0] <= bounds[1] && bounds[1] <= q.size(0),
                    "cu_seqlens must rise from 0 to the number of rows");
    if (bounds[0] < bounds[1]) tree.packs.push_back({bounds[0], bounds[1]});
  }
  return tree;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end,
                                   Tensor cu_seqlens, double scale, double softcap) {
  Tree tree = checked(q, k, v, subtree_end, cu_seqlens, scale, softcap);
  Tensor out = torch::stable::new_empty(q, {q.size(0), tree.heads, tree.width});
  Tensor lse =
      torch::stable::new_empty(q, {q.size(0), tree.heads}, torch::headeronly::ScalarType::Float);
  // rows outside of all packs keep these
  out = torch::stable::zero_(out);
  lse = torch::stable::fill_(lse, -INFINITY);
  if (q.numel() == 0) return {out, lse};
  RLK_DISPATCH_FLOAT(q, T, {
    const Forward<T> a{std::move(tree),           q.const_data_ptr<T>(),
                       k.const_data_ptr<T>(),     v.const_data_ptr<T>(),
                       out.mutable_data_ptr<T>(), lse.mutable_data_ptr<float>()};
    if constexpr (std::is_same_v<T, bf16>) {
      in_pairs<T>() ? attend<Pair>(a) : attend<float>(a);
    } else {
      attend<float>(a);
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                            Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                            Tensor subtree_end, Tensor cu_seqlens, double scale,
                                            double softcap) {
  Tree tree = checked(q, k, v, subtree_end, cu_seqlens, scale, softcap);
  for (const Tensor* t : {&grad_out, &out}) {
    RLK_CHECK_CPU(*t);
    RLK_CHECK_DIM(*t, 3);
    RLK_CHECK_CONTIGUOUS(*t);
    for (int d = 0; d < 3; ++d) RLK_CHECK_SIZE(*t, d, q.size(d));
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), "out and its gradient have q's dtype");
  }
  std::vector<const Tensor*> by_row{&lse};
  if (grad_lse) by_row.push_back(&*grad_lse);
  for (const Tensor* t : by_row) {
    RLK_CHECK_CPU(*t);
    RLK_CHECK_DIM(*t, 2);
    RLK_CHECK_DTYPE(*t, Float);
    RLK_CHECK_CONTIGUOUS(*t);
    for (int d = 0; d < 2; ++d) RLK_CHECK_SIZE(*t, d, q.size(d));
  }
  std::vector<Tensor> grads;
  for (const Tensor* t : {&q, &k, &v}) {
    Tensor grad = torch::stable::new_empty(*t, {t->size(0), t->size(1), t->size(2)});
    grads.push_back(torch::stable::zero_(grad));
  }
  if (q.numel() > 0) {
    RLK_DISPATCH_FLOAT(q, T, {
      const Backward<T> a{std::move(tree),
                          q.const_data_ptr<T>(),
                          k.const_data_ptr<T>(),
                          v.const_data_ptr<T>(),
                          out.const_data_ptr<T>(),
                          grad_out.const_data_ptr<T>(),
                          lse.const_data_ptr<float>(),
                          grad_lse ? grad_lse->const_data_ptr<float>() : nullptr,
                          grads[0].mutable_data_ptr<T>(),
                          grads[1].mutable_data_ptr<T>(),
                          grads[2].mutable_data_ptr<T>()};
      if constexpr (std::is_same_v<T, bf16>) {
        in_pairs<T>() ? gradients<Pair>(a) : gradients<float>(a);
      } else {
        gradients<float>(a);
      }
    });
  }
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("shared_prefix_attention_fwd", TORCH_BOX(&forward));
  m.impl("shared_prefix_attention_bwd", TORCH_BOX(&backward));
}

}  // namespace rlkern
