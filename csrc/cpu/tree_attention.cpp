// Decode attention along a tree: a thread takes one tree's rows and one head of keys, reads each
// item of keys once for all rows that share it, and folds it into their running softmax. Every row
// folds the chunks of its own path from the first to the last, whoever shares them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.h"
#include "decoder.h"
#include "dispatch.h"
#include "isa.h"
#include "rlkern/math/softcap.h"
#include "units.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// Keys that are scored before their values are added: an item is cut at multiples of it.
constexpr int64_t kUnitKeys = 64;

// From products to what is exponentiated.
struct AttentionScore {
  float scale;
  Softcap softcap;

  template <class F>
  RLK_HD F of(F x) const {
    x *= scale;
    return softcap.on() ? softcap.apply(x) : x;
  }
};

// A row of TreePlan.items.
struct TreeItem {
  int32_t row_begin, row_count, slot_begin, slot_count, chunk, part_begin;
};

template <class T>
struct TreeAttention {
  const T* q;
  const T* k;
  const T* v;
  const int32_t* rows;
  const TreeItem* items;
  const int32_t* slots;
  T* out;
  float* lse;
  int64_t heads, kv_heads, group, width;
  AttentionScore score;

  const T* query(int64_t row, int64_t head) const { return q + (rows[row] * heads + head) * width; }
  T* out_of(int64_t row, int64_t head) const { return out + (rows[row] * heads + head) * width; }
  float* lse_of(int64_t row, int64_t head) const { return lse + rows[row] * heads + head; }
  const T* key(int64_t slot, int64_t head) const { return k + (slot * kv_heads + head) * width; }
  const T* value(int64_t slot, int64_t head) const { return v + (slot * kv_heads + head) * width; }
};

// Rows of one tree and heads of keys.
struct TreeTask {
  int64_t item_begin, item_end, row_begin, row_end, head_begin, head_end;
};

// At most kUnitKeys keys, and the rows that read them.
struct KeyUnit {
  int64_t row_begin, row_end;
  const int32_t* slots;
  int64_t count;
};

template <class T>
std::vector<KeyUnit> key_units(const TreeAttention<T>& a, const TreeTask& task) {
  std::vector<KeyUnit> units;
  for (int64_t i = task.item_begin; i < task.item_end; ++i) {
    const TreeItem& item = a.items[i];
    const int64_t begin = std::max<int64_t>(item.row_begin, task.row_begin);
    const int64_t end = std::min<int64_t>(item.row_begin + item.row_count, task.row_end);
    for (int64_t at = 0; begin < end && at < item.slot_count; at += kUnitKeys)
      units.push_back({begin, end, a.slots + item.slot_begin + at,
                       std::min<int64_t>(kUnitKeys, item.slot_count - at)});
  }
  return units;
}

// 16 registers of 128 bits
#define RLK_ISA isa_default
#define RLK_TARGET
#define RLK_FLOATS f32x4
#define RLK_KEYS 4
#define RLK_ROWS 2
#define RLK_HAS_BF16_DOT 0
#include "tree_attention_tile.h"

#if defined(__x86_64__)
// 16 registers of 256 bits
#define RLK_ISA isa_avx2
#define RLK_TARGET __attribute__((target("avx2,fma,f16c")))
#define RLK_FLOATS f32x8
#define RLK_KEYS 4
#define RLK_ROWS 2
#define RLK_HAS_BF16_DOT 0
#include "tree_attention_tile.h"

// 32 registers of 512 bits
#define RLK_ISA isa_avx512
#define RLK_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define RLK_FLOATS f32x16
#define RLK_KEYS 8
#define RLK_ROWS 4
#define RLK_HAS_BF16_DOT 0
#include "tree_attention_tile.h"

#define RLK_ISA isa_avx512_bf16
#define RLK_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx512bf16")))
#define RLK_FLOATS f32x16
#define RLK_KEYS 8
#define RLK_ROWS 4
#define RLK_HAS_BF16_DOT 1
#include "tree_attention_tile.h"
#endif

template <class T>
void attend(const TreeAttention<T>& a, const TreeTask& task) {
#if defined(__x86_64__)
  const Isa isa = cpu_isa();
  if constexpr (std::is_same_v<T, bf16>)
    if (isa == Isa::kAvx512Bf16) return isa_avx512_bf16::attend<Pair>(a, task);
  if (isa >= Isa::kAvx512) return isa_avx512::attend<float>(a, task);
  if (isa == Isa::kAvx2) return isa_avx2::attend<float>(a, task);
#endif
  isa_default::attend<float>(a, task);
}

template <class T>
void run(const TreeAttention<T>& a, const int32_t* trees, int64_t num_trees) {
  std::vector<TreeTask> tasks;
  // Two tasks a thread at least, where there are heads and rows for it: what a row gets does not
  // depend on its task.
  const int64_t wanted = 2 * torch::stable::get_num_threads();
  const int64_t trees_here = std::max<int64_t>(1, num_trees);
  const int64_t head_cuts = std::min(a.kv_heads, (wanted + trees_here - 1) / trees_here);
  const int64_t row_cuts = (wanted + trees_here * head_cuts - 1) / (trees_here * head_cuts);
  const int64_t heads = (a.kv_heads + head_cuts - 1) / head_cuts;
  for (int64_t t = 0; t < num_trees; ++t) {
    int64_t begin = INT64_MAX, end = 0;
    for (int64_t i = trees[t]; i < trees[t + 1]; ++i) {
      begin = std::min<int64_t>(begin, a.items[i].row_begin);
      end = std::max<int64_t>(end, a.items[i].row_begin + a.items[i].row_count);
    }
    if (begin >= end) continue;
    const int64_t rows = (end - begin + row_cuts - 1) / row_cuts;
    for (int64_t head = 0; head < a.kv_heads; head += heads)
      for (int64_t row = begin; row < end; row += rows)
        tasks.push_back({trees[t], trees[t + 1], row, std::min(end, row + rows), head,
                         std::min(a.kv_heads, head + heads)});
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1,
                              [&](int64_t first, int64_t last) {
                                for (int64_t i = first; i < last; ++i) attend(a, tasks[i]);
                              });
}

void check_ints(const Tensor& t) {
  RLK_CHECK_CPU(t);
  RLK_CHECK_DTYPE(t, Int);
  RLK_CHECK_CONTIGUOUS(t);
}

}  // namespace

std::tuple<Tensor, Tensor> tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor rows,
                                          Tensor items, Tensor slots, Tensor trees, Tensor parts,
                                          Tensor part_offsets, int64_t chunk, int64_t max_rows,
                                          double scale, double softcap) {
  RLK_CHECK_CPU(q);
  RLK_CHECK_DIM(q, 3);
  RLK_CHECK_CONTIGUOUS(q);
  const int64_t batch = q.size(0), heads = q.size(1), width = q.size(2);
  RLK_CHECK_DIM(k_cache, 4);
  RLK_CHECK_DIM(v_cache, 4);
  const int64_t kv_heads = k_cache.size(2);
  for (const Tensor* t : {&k_cache, &v_cache}) {
    RLK_CHECK_CPU(*t);
    RLK_CHECK_CONTIGUOUS(*t);
    for (int d = 0; d < 3; ++d) RLK_CHECK_SIZE(*t, d, k_cache.size(d));
    RLK_CHECK_SIZE(*t, 3, width);
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), "caches must have the dtype of q");
  }
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0,
                  "the heads of q must be a multiple of the caches'");
  for (const Tensor* t : {&rows, &items, &slots, &trees, &parts, &part_offsets}) check_ints(*t);
  RLK_CHECK_DIM(rows, 1);
  RLK_CHECK_SIZE(rows, 0, batch);
  RLK_CHECK_DIM(items, 2);
  RLK_CHECK_SIZE(items, 1, 6);
  STD_TORCH_CHECK(chunk > 0 && max_rows >= 0 && trees.numel() > 0, "not a plan");
  Tensor out = torch::stable::new_empty(q, {batch, heads, width});
  Tensor lse = torch::stable::new_empty(q, {batch, heads}, torch::headeronly::ScalarType::Float);
  // rows without keys keep these
  out = torch::stable::zero_(out);
  lse = torch::stable::fill_(lse, -INFINITY);
  RLK_DISPATCH_FLOAT(q, T, {
    const TreeAttention<T> a{
        q.const_data_ptr<T>(),
        k_cache.const_data_ptr<T>(),
        v_cache.const_data_ptr<T>(),
        rows.const_data_ptr<int32_t>(),
        reinterpret_cast<const TreeItem*>(items.const_data_ptr<int32_t>()),
        slots.const_data_ptr<int32_t>(),
        out.mutable_data_ptr<T>(),
        lse.mutable_data_ptr<float>(),
        heads,
        kv_heads,
        heads / kv_heads,
        width,
        {static_cast<float>(scale), Softcap{1.0f, static_cast<float>(softcap)}}};
    run(a, trees.const_data_ptr<int32_t>(), trees.numel() - 1);
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("tree_attention", TORCH_BOX(&tree_attention)); }

}  // namespace rlkern
