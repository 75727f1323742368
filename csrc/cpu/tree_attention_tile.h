// Attention of a tile of rows over a few keys, folded into the rows' running softmax.
//
// Included once per instruction set, with RLK_ISA (a namespace), RLK_TARGET (the target attribute),
// RLK_FLOATS (a vector as wide as its registers), RLK_KEYS x 2 and RLK_ROWS x 4 (the register tiles
// of scores and of outputs) and RLK_HAS_BF16_DOT defined; hence no include guard.
//
// A lane of a vector is one row (a branch and a query head) or, where rows are few, one key in the
// scores, and one element of the head in the outputs. Either way each score is a sum in the order
// of the head's elements, each output in the order of the keys, and the weights are added up in the
// same tree: what a row gets does not depend on the rows beside it.

namespace RLK_ISA {

using V = RLK_FLOATS;
constexpr int kWidth = sizeof(V) / sizeof(float);
constexpr int kKeys = RLK_KEYS;
constexpr int kRows = RLK_ROWS;
constexpr int kVectors = 4;

RLK_TARGET static inline __attribute__((always_inline)) V dot(V acc, float a, const float* b) {
  return acc + a * load_as<V>(b);
}

#if RLK_HAS_BF16_DOT
RLK_TARGET static inline
    __attribute__((always_inline)) f32x16 dot(f32x16 acc, Pair a, const Pair* b) {
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a.bits),
                                  (__m512bh)_mm512_loadu_si512(b));
}
#endif

// scores = a . b for kOnes vectors a, one after another, and the lanes of kTiles panels b.
template <int kOnes, int kTiles, class Unit>
RLK_TARGET static __attribute__((noinline)) void score(const Unit* a, int64_t units, const Unit* b,
                                                       float* scores, int64_t stride,
                                                       int64_t tile_stride) {
  V acc[kOnes][kTiles];
#pragma GCC unroll 12
  for (int i = 0; i < kOnes; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) acc[i][t] = V{};
  for (int64_t u = 0; u < units; ++u, b += kWidth) {
#pragma GCC unroll 12
    for (int i = 0; i < kOnes; ++i)
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t)
        acc[i][t] = dot(acc[i][t], a[i * units + u], b + t * units * kWidth);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kOnes; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) store_as(scores + i * stride + t * tile_stride, acc[i][t]);
}

RLK_TARGET static inline __attribute__((always_inline)) void store_weight(V p, int64_t key,
                                                                          float* weights) {
  store_as(weights + key * kWidth, p);
}

#if RLK_HAS_BF16_DOT
RLK_TARGET static inline
    __attribute__((always_inline)) void store_weight(f32x16 p, int64_t key, Pair* weights) {
  Pair* const pair = weights + key / 2 * kWidth;
  const i32x16 bits = bf16_bits(p) & 0xFFFF;
  store_as(pair, key % 2 ? load_as<i32x16>(pair) | (bits << 16) : bits);
}
#endif

// Scores to weights exp(s - max), a lane a row; the running maxima and sums move on, and `decay` is
// what the outputs so far must be scaled by.
template <class Unit>
RLK_TARGET static __attribute__((noinline)) void weigh(const AttentionScore& head, int64_t count,
                                                       float* scores, float* max, float* sum,
                                                       float* decay, Unit* weights) {
  const V old = load_as<V>(max);
  V top = old, sums[kWidth] = {};
  for (int64_t key = 0; key < count; ++key) {
    const V s = head.of(load_as<V>(scores + key * kWidth));
    store_as(scores + key * kWidth, s);
    top = vmax(s, top);
  }
  const V anchor = at_least(top, -FLT_MAX);
  const V scale = exp_in_range(at_least(old - anchor, kExpUnderflow));
  for (int64_t key = 0; key < count; ++key) {
    const V s = load_as<V>(scores + key * kWidth) - anchor;
    const V p = exp_in_range(at_least(s, kExpUnderflow));
    sums[key % kWidth] += p;
    store_weight(p, key, weights);
  }
  for (int w = kWidth / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) sums[i] += sums[i + w];
  store_as(max, top);
  store_as(sum, load_as<V>(sum) * scale + sums[0]);
  store_as(decay, scale);
}

RLK_TARGET static inline __attribute__((always_inline)) void store_weights(V p, float* weights) {
  store_as(weights, p);
}
RLK_TARGET static inline __attribute__((always_inline)) void store_weights(V p, Pair* weights) {
  store(reinterpret_cast<bf16*>(weights), p);
}

// The same of one row, a lane a key.
template <class Unit>
RLK_TARGET static __attribute__((noinline)) void weigh_row(const AttentionScore& head,
                                                           int64_t count, float* scores, float* max,
                                                           float* sum, float* decay,
                                                           Unit* weights) {
  typename Narrow<V>::Ints key;
  for (int i = 0; i < kWidth; ++i) key[i] = i;
  V top = V{} - INFINITY, sums{};
  for (int64_t at = 0; at < count; at += kWidth) {
    V s = head.of(load_as<V>(scores + at));
    s = key < static_cast<int32_t>(count - at) ? s : V{} - INFINITY;
    store_as(scores + at, s);
    top = vmax(s, top);
  }
  const float best = vmax(reduce_max(top), *max);
  const V anchor = at_least(V{} + best, -FLT_MAX);
  const V scale = exp_in_range(at_least(*max - anchor, kExpUnderflow));
  for (int64_t at = 0; at < count; at += kWidth) {
    const V s = load_as<V>(scores + at) - anchor;
    const V p = exp_in_range(at_least(s, kExpUnderflow));
    const V here = only(key < static_cast<int32_t>(count - at), p);
    sums += here;
    store_weights(here, weights + at / kPerUnit<Unit>);
  }
  const V total = (V{} + *sum) * scale + reduce_add(sums);
  *max = best;
  *sum = total[0];
  *decay = scale[0];
}

// The values of a step of the sum: copied, one after another, or where they lie in the cache.
template <class Unit>
struct CopiedValues {
  const Unit* data;
  int64_t stride;
  const Unit* at(int64_t step) const { return data + step * stride; }
};
template <class Unit>
struct CachedValues {
  const Unit* const* rows;
  const Unit* at(int64_t step) const { return rows[step]; }
};

// out[row] = decay[row] out[row] + sum over the keys of weights v[key], for R rows: weights of a
// key lie side by side (kOfKey), or those of a row do.
template <bool kOfKey, int R, int N, class Unit, class Values>
RLK_TARGET static inline __attribute__((always_inline)) void add_values(
    const Unit* weights, const float* decay, const Values& v, int64_t first, int64_t steps,
    int64_t stride, float* out) {
  V acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = load_as<V>(out + r * stride + n * kWidth) * decay[r];
  constexpr int64_t kRowStride = kOfKey ? 1 : kUnitKeys / kPerUnit<Unit>;
  for (int64_t k = 0; k < steps; ++k, weights += kOfKey ? kWidth : 1) {
    const Unit* const value = v.at(k) + first;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        acc[r][n] = dot(acc[r][n], weights[r * kRowStride], value + n * kWidth);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_as(out + r * stride + n * kWidth, acc[r][n]);
}

template <bool kOfKey, int R, class Unit, class Values>
RLK_TARGET static __attribute__((noinline)) void add_rows(const Unit* weights, const float* decay,
                                                          const Values& v, int64_t steps,
                                                          int64_t stride, float* out) {
  int64_t d = 0;
  for (; d + 4 * kWidth <= stride; d += 4 * kWidth)
    add_values<kOfKey, R, 4>(weights, decay, v, d, steps, stride, out + d);
  for (; d + 2 * kWidth <= stride; d += 2 * kWidth)
    add_values<kOfKey, R, 2>(weights, decay, v, d, steps, stride, out + d);
  for (; d < stride; d += kWidth)
    add_values<kOfKey, R, 1>(weights, decay, v, d, steps, stride, out + d);
}

template <bool kOfKey, class Unit, class Values>
RLK_TARGET static void output(const Unit* weights, const float* decay, int64_t rows,
                              const Values& v, int64_t steps, int64_t stride, float* out) {
  constexpr int64_t kRowStride = kOfKey ? 1 : kUnitKeys / kPerUnit<Unit>;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    add_rows<kOfKey, kRows>(weights + r * kRowStride, decay + r, v, steps, stride,
                            out + r * stride);
  for (; r < rows; ++r)
    add_rows<kOfKey, 1>(weights + r * kRowStride, decay + r, v, steps, stride, out + r * stride);
}

// A key, padded with zeros to whole units.
template <class T>
RLK_TARGET static inline __attribute__((always_inline)) void copy_key(const T* k, int64_t width,
                                                                      float* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(k + d));
  for (; d < width; ++d) out[d] = static_cast<float>(k[d]);
}
RLK_TARGET static inline __attribute__((always_inline)) void copy_key(const bf16* k, int64_t width,
                                                                      Pair* out) {
  if (width % 2) out[width / 2].bits = 0;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store_as(out + d / 2, load_as<u16x16>(k + d));
  std::memcpy(static_cast<void*>(out + d / 2), k + d, sizeof(bf16) * (width - d));
}

// The values of one step of the sum, and zeros up to `stride`.
template <class T, class Unit>
RLK_TARGET static inline __attribute__((always_inline)) void copy_values(
    const T* even, const T* odd, int64_t width, int64_t stride, Unit* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) set_units(out + d, even + d, odd + d);
  for (; d < width; ++d) set_unit(out + d, even[d], odd[d]);
  if (d < stride) std::memset(static_cast<void*>(out + d), 0, sizeof(Unit) * (stride - d));
}

// Lanes of a where bit kStep of their number is clear, of b moved by kStep where it is set; and
// what is left of both, the other way round.
template <int kStep, int... kLane>
RLK_TARGET static inline __attribute__((always_inline)) void swap_lanes(
    V& a, V& b, std::integer_sequence<int, kLane...>) {
  using Ints = typename Narrow<V>::Ints;
  const V low =
      __builtin_shuffle(a, b, Ints{((kLane & kStep) ? kLane - kStep + kWidth : kLane)...});
  b = __builtin_shuffle(a, b, Ints{((kLane & kStep) ? kLane + kWidth : kLane + kStep)...});
  a = low;
}

template <int kStep>
RLK_TARGET static inline __attribute__((always_inline)) void swap_rows(V (&x)[kWidth]) {
  if constexpr (kStep < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (!(i & kStep))
        swap_lanes<kStep>(x[i], x[i + kStep], std::make_integer_sequence<int, kWidth>{});
    swap_rows<2 * kStep>(x);
  }
}

// kWidth keys into the lanes of a panel. Reads whole vectors.
template <class Unit>
RLK_TARGET static __attribute__((noinline)) void pack_keys(const Unit* const* keys, int64_t units,
                                                           Unit* panel) {
  for (int64_t u = 0; u < units; u += kWidth) {
    V x[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) x[i] = load_as<V>(keys[i] + u);
    swap_rows<1>(x);
    const int64_t count = std::min<int64_t>(kWidth, units - u);
    if (count == kWidth) {
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store_as(panel + (u + i) * kWidth, x[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) store_as(panel + (u + i) * kWidth, x[i]);
    }
  }
}

// A query into its lane of a panel.
template <class Unit, class T>
RLK_TARGET static inline __attribute__((always_inline)) void pack_query(const T* q, int64_t width,
                                                                        Unit* lane) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  for (int64_t d = 0; d < width; d += kPer, lane += kWidth)
    set_unit(lane, q[d], d + kPer <= width ? q[d + kPer - 1] : T(0.0f));
}

template <class T>
static inline __attribute__((always_inline)) void prefetch(const T* p, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(p + d, 0, 2);
}

// Whether keys lie in the cache as the operands of a product do, in whole vectors.
template <class Unit, class T>
static bool is_direct(int64_t units) {
  return sizeof(Unit) == kPerUnit<Unit> * sizeof(T) && units % kWidth == 0;
}

// The running softmax of rows that follow each other, of one head.
struct Rows {
  float *max, *sum, *out;
  int64_t count, stride;
};

// Buffers of a task.
template <class Unit>
struct Scratch {
  std::vector<Unit> queries, keys, panel, values, weights;
  std::vector<float> scores;

  Scratch(int64_t units, int64_t stride)
      : keys(kUnitKeys * units + kWidth),  // pack_keys reads whole vectors
        panel(kUnitKeys * units),
        values(kUnitKeys / kPerUnit<Unit> * stride),
        weights(kUnitKeys / kPerUnit<Unit> * kWidth),
        scores(2 * kUnitKeys * kWidth) {}
};

// Many rows: queries are panels of kWidth of them.
template <class Unit>
RLK_TARGET static void fold(const AttentionScore& score_of, int64_t units, int64_t count,
                            const Unit* queries, Scratch<Unit>& s, const Rows& rows) {
  const int64_t tiles = (rows.count + kWidth - 1) / kWidth;
  const int64_t steps = (count + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
  for (int64_t t = 0; t < tiles; t += 2) {
    const Unit* const q = queries + t * units * kWidth;
    const int64_t together = std::min<int64_t>(2, tiles - t);
    for (int64_t key = 0; key < count; key += kKeys) {
      const Unit* const k = s.keys.data() + key * units;
      float* const out = s.scores.data() + key * kWidth;
      together == 2 ? score<kKeys, 2>(k, units, q, out, kWidth, kUnitKeys * kWidth)
                    : score<kKeys, 1>(k, units, q, out, kWidth, 0);
    }
    for (int64_t j = 0; j < together; ++j) {
      const int64_t row = (t + j) * kWidth, live = std::min<int64_t>(kWidth, rows.count - row);
      float max[kWidth], sum[kWidth], decay[kWidth];
      std::fill(std::copy_n(rows.max + row, live, max), max + kWidth, -INFINITY);
      std::fill(std::copy_n(rows.sum + row, live, sum), sum + kWidth, 0.0f);
      weigh(score_of, count, s.scores.data() + j * kUnitKeys * kWidth, max, sum, decay,
            s.weights.data());
      std::copy_n(max, live, rows.max + row);
      std::copy_n(sum, live, rows.sum + row);
      output<true>(s.weights.data(), decay, live, CopiedValues<Unit>{s.values.data(), rows.stride},
                   steps, rows.stride, rows.out + row * rows.stride);
    }
  }
}

// Few rows: keys are panels, queries lie one after another.
template <class Unit, class Values>
RLK_TARGET static void fold_few(const AttentionScore& score_of, int64_t units, int64_t count,
                                const Unit* queries, const Unit* const* keys, const Values& values,
                                Scratch<Unit>& s, const Rows& rows) {
  const int64_t tiles = (count + kWidth - 1) / kWidth;
  for (int64_t t = 0; t < tiles; ++t)
    pack_keys(keys + t * kWidth, units, s.panel.data() + t * kWidth * units);
  for (int64_t r = 0; r < rows.count;) {
    const int64_t ones = r + kRows <= rows.count ? kRows : 1;
    const Unit* const q = queries + r * units;
    for (int64_t t = 0; t < tiles;) {
      const Unit* const k = s.panel.data() + t * kWidth * units;
      float* const out = s.scores.data() + r * kUnitKeys + t * kWidth;
      const int64_t left = tiles - t, together = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (ones == kRows)
        together == 4   ? score<kRows, 4>(q, units, k, out, kUnitKeys, kWidth)
        : together == 2 ? score<kRows, 2>(q, units, k, out, kUnitKeys, kWidth)
                        : score<kRows, 1>(q, units, k, out, kUnitKeys, kWidth);
      else
        together == 4   ? score<1, 4>(q, units, k, out, kUnitKeys, kWidth)
        : together == 2 ? score<1, 2>(q, units, k, out, kUnitKeys, kWidth)
                        : score<1, 1>(q, units, k, out, kUnitKeys, kWidth);
      t += together;
    }
    r += ones;
  }
  constexpr int64_t kPer = kPerUnit<Unit>;
  float decay[kWidth];
  for (int64_t r = 0; r < rows.count; ++r)
    weigh_row(score_of, count, s.scores.data() + r * kUnitKeys, rows.max + r, rows.sum + r,
              decay + r, s.weights.data() + r * (kUnitKeys / kPer));
  output<false>(s.weights.data(), decay, rows.count, values, (count + kPer - 1) / kPer, rows.stride,
                rows.out);
}

// All items of the task. Heads of keys lie side by side in a page: they take turns at each unit.
template <class Unit, class T>
RLK_TARGET static void attend(const TreeAttention<T>& a, const TreeTask& task) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  const int64_t units = units_of<Unit>(a.width), stride = round_up(a.width, kWidth);
  const int64_t lanes = (task.row_end - task.row_begin) * a.group;
  const int64_t num_heads = task.head_end - task.head_begin;
  // of every row: its running maximum, sum and output
  std::vector<float> maxima(num_heads * lanes, -INFINITY), sums(num_heads * lanes, 0.0f);
  std::vector<float> outputs(num_heads * lanes * stride, 0.0f);
  Scratch<Unit> scratch(units, stride);
  std::vector<Unit>& keys = scratch.keys;
  const std::vector<T> zeros(a.width, T(0.0f));
  const bool direct = is_direct<Unit, T>(units);
  int64_t packed_begin = -1, packed_end = -1;
  const std::vector<KeyUnit> work = key_units(a, task);
  for (size_t i = 0; i < work.size(); ++i) {
    const auto [begin, end, slots, count] = work[i];
    const KeyUnit next = i + 1 < work.size() ? work[i + 1] : KeyUnit{};
    const int64_t rows = (end - begin) * a.group, first = (begin - task.row_begin) * a.group;
    const bool few = rows <= kWidth / 2;
    // of one head
    const int64_t queries = (few ? rows : round_up(rows, kWidth)) * units;
    if (begin != packed_begin || end != packed_end) {
      scratch.queries.assign(num_heads * queries, Unit{});
      for (int64_t h = 0; h < num_heads; ++h)
        for (int64_t r = 0; r < rows; ++r) {
          const T* const q =
              a.query(begin + r / a.group, (task.head_begin + h) * a.group + r % a.group);
          Unit* const out = scratch.queries.data() + h * queries;
          if (few)
            copy_key(q, a.width, out + r * units);
          else
            pack_query(q, a.width, out + r / kWidth * units * kWidth + r % kWidth);
        }
      packed_begin = begin;
      packed_end = end;
    }
    const int64_t padded = round_up(count, kKeys), steps = (count + kPer - 1) / kPer;
    std::memset(static_cast<void*>(keys.data() + count * units), 0,
                sizeof(Unit) * (padded - count) * units);
    for (int64_t h = 0; h < num_heads; ++h) {
      const int64_t head = task.head_begin + h;
      // the heads of a token lie side by side: a head fetches all of them, of its share of tokens
      for (int64_t k = next.count * h / num_heads; k < next.count * (h + 1) / num_heads; ++k) {
        prefetch(a.key(next.slots[k], task.head_begin), num_heads * a.width);
        prefetch(a.value(next.slots[k], task.head_begin), num_heads * a.width);
      }
      const Unit* each[kUnitKeys]{};
      for (int64_t k = 0; k < count; ++k) {
        const T* const key = a.key(slots[k], head);
        each[k] = keys.data() + k * units;
        if (few && direct)
          each[k] = reinterpret_cast<const Unit*>(key);
        else
          copy_key(key, a.width, keys.data() + k * units);
      }
      std::fill(each + count, each + round_up(count, kWidth), each[0]);  // any that can be read
      const int64_t lane = h * lanes + first;
      const Rows of{&maxima[lane], &sums[lane], &outputs[lane * stride], rows, stride};
      const Unit* const q = scratch.queries.data() + h * queries;
      if constexpr (std::is_same_v<Unit, T>)
        if (few && direct) {
          const Unit* values[kUnitKeys];
          for (int64_t k = 0; k < count; ++k) values[k] = a.value(slots[k], head);
          fold_few(a.score, units, count, q, each, CachedValues<Unit>{values}, scratch, of);
          continue;
        }
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t odd = s * kPer + kPer - 1;
        copy_values(a.value(slots[s * kPer], head),
                    odd < count ? a.value(slots[odd], head) : zeros.data(), a.width, stride,
                    scratch.values.data() + s * stride);
      }
      if (few)
        fold_few(a.score, units, count, q, each, CopiedValues<Unit>{scratch.values.data(), stride},
                 scratch, of);
      else
        fold(a.score, units, count, q, scratch, of);
    }
  }
  for (int64_t h = 0; h < num_heads; ++h)
    for (int64_t r = 0; r < lanes; ++r) {
      const int64_t row = task.row_begin + r / a.group;
      const int64_t head = (task.head_begin + h) * a.group + r % a.group, lane = h * lanes + r;
      T* const out = a.out_of(row, head);
      const float inverse = 1.0f / sums[lane];
      for (int64_t d = 0; d < a.width; ++d)
        out[d] = static_cast<T>(outputs[lane * stride + d] * inverse);
      *a.lse_of(row, head) = maxima[lane] + std::log(sums[lane]);
    }
}

}  // namespace RLK_ISA

#undef RLK_ISA
#undef RLK_TARGET
#undef RLK_FLOATS
#undef RLK_KEYS
#undef RLK_ROWS
#undef RLK_HAS_BF16_DOT
