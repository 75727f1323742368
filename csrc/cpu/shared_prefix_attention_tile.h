// What attention does with a tile of scores while it is in L1: keys by row, a panel of query rows
// by column.
//
// Included once per instruction set after matmul.h, with RLK_ISA (its namespace, which holds the
// register tile's constants), RLK_TARGET and RLK_HAS_BF16_DOT defined; hence no include guard.
//
// A lane is one query row. No lane sees another, and each sums in the order of the keys.

namespace RLK_ISA {

// Products of a key with a vector of rows, as scores; not masked yet.
RLK_TARGET static inline __attribute__((always_inline)) V score_of(const AttentionScore& head,
                                                                   const float* product) {
  const V s = load_as<V>(product) * head.scale;
  return head.softcap.on() ? head.softcap.apply(s) : s;
}

// -inf in the lanes that do not see the key.
RLK_TARGET static inline __attribute__((always_inline)) V hide(const LaneSpan* seen, V lane, V s) {
  if (!seen) return s;
  const V late = lane < seen->begin ? V{} - INFINITY : s;
  return lane < seen->end ? late : V{} - INFINITY;
}

RLK_TARGET static inline __attribute__((always_inline)) V lanes_from(int first) {
  V lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<float>(first + i);
  return lane;
}

RLK_TARGET static inline __attribute__((always_inline)) void store_weights(const V* p,
                                                                           float* weights) {
  store_as(weights, *p);
}
RLK_TARGET static inline __attribute__((always_inline)) void store_by_key(const V* p,
                                                                          int64_t stride,
                                                                          float* out) {
  for (int r = 0; r < kRows; ++r) store_as(out + r * stride, p[r]);
}

#if RLK_HAS_BF16_DOT
RLK_TARGET static inline __attribute__((always_inline)) u16x16 nearest(f32x16 x) {
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
}
RLK_TARGET static inline __attribute__((always_inline)) void store_weights(const f32x16* p,
                                                                           Pair* weights) {
  const i32x16 pair = __builtin_convertvector(nearest(p[0]), i32x16) |
                      (__builtin_convertvector(nearest(p[1]), i32x16) << 16);
  store_as(weights, pair);
}
RLK_TARGET static inline __attribute__((always_inline)) void store_by_key(const f32x16* p,
                                                                          int64_t stride,
                                                                          Pair* out) {
  for (int r = 0; r < kRows; ++r) store_as(out + r * stride, nearest(p[r]));
}
#endif

// Products [count][kPanel] to weights exp(s - max), in units along the keys; the rows' maxima and
// sums move on, and `decay` is what their outputs so far must be scaled by. True where one is
// not 1.
template <class Unit>
RLK_TARGET static bool fold_scores(const AttentionScore& head, const LaneSpan* seen, int64_t count,
                                   int vectors, float* products, float* max, float* sum,
                                   float* decay, Unit* weights) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  // The largest product has the largest score, unless the score is not a rising line.
  const bool line = !head.softcap.on() && head.scale > 0.0f;
  const float factor = line ? head.scale : 1.0f;
  bool moved = false;
  for (int v = 0; v < vectors; ++v) {
    const int t = v * kWidth;
    const V lane = lanes_from(t), old = load_as<V>(max + t);
    V top = V{} - INFINITY;
    if (line && !seen)
      for (int64_t key = 0; key < count; ++key)
        top = vmax(load_as<V>(products + key * kPanel + t), top);
    else
      for (int64_t key = 0; key < count; ++key) {
        float* const at = products + key * kPanel + t;
        const V s = line ? load_as<V>(at) : score_of(head, at);
        store_as(at, hide(seen ? seen + key : nullptr, lane, s));
        top = vmax(load_as<V>(at), top);
      }
    top = vmax(top * factor, old);
    // while nothing is seen any finite anchor gives weights of 0
    const V anchor = at_least(top, -FLT_MAX);
    const V scale = exp_in_range(at_least(old - anchor, kExpUnderflow));
    V total = load_as<V>(sum + t) * scale;
    for (int64_t key = 0; key < count; key += kPer) {
      V p[kPer];
      for (int64_t i = 0; i < kPer; ++i) {
        p[i] = V{};
        if (key + i >= count) continue;
        const V s = load_as<V>(products + (key + i) * kPanel + t) * factor - anchor;
        p[i] = exp_in_range(at_least(s, kExpUnderflow));
        total += p[i];
      }
      store_weights(p, weights + key / kPer * kPanel + t);
    }
    store_as(max + t, top);
    store_as(sum + t, total);
    store_as(decay + t, scale);
    moved |= reduce_min(scale) != 1.0f;
  }
  return moved;
}

// out[row of `rows`][lane] *= decay[lane]
RLK_TARGET static void scale_lanes(const float* decay, int vectors, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; ++r, out += kPanel)
    for (int t = 0; t < vectors * kWidth; t += kWidth)
      store_as(out + t, load_as<V>(out + t) * load_as<V>(decay + t));
}

// Of `count` keys: the weights p = exp(s - lse), by key in units along the rows, and the gradients
// p (dp - delta) of the products, by key and in units along the keys. Keys from `count` on, up to
// the next multiple of kRows, are written as 0.
template <class Unit>
RLK_TARGET static void score_gradients(const AttentionScore& head, const LaneSpan* seen,
                                       int64_t count, int vectors, const float* products,
                                       const float* weight_grads, const float* lse,
                                       const float* delta, int64_t stride, Unit* weights,
                                       Unit* grads, Unit* grads_by_row) {
  constexpr int64_t kPer = kPerUnit<Unit>;
  for (int v = 0; v < vectors; ++v) {
    const int t = v * kWidth;
    const V lane = lanes_from(t), norm = load_as<V>(lse + t), mean = load_as<V>(delta + t);
    for (int64_t first = 0; first < count; first += kRows) {
      V p[kRows], d[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t key = first + r;
        p[r] = d[r] = V{};
        if (key >= count) continue;
        const V y = score_of(head, products + key * kPanel + t);
        const V s = hide(seen ? seen + key : nullptr, lane, y);
        p[r] = exp_in_range(at_least(s - norm, kExpUnderflow));
        d[r] = p[r] * (load_as<V>(weight_grads + key * kPanel + t) - mean);
        if (head.softcap.on()) d[r] *= head.softcap.slope(y);
      }
      store_by_key(p, stride, weights + first * stride + t / kPer);
      store_units(d, kRows, grads + first * stride + t / kPer, stride,
                  grads_by_row + first / kPer * kPanel + t);
    }
  }
}

template <class Unit>
constexpr ScoreKernels<Unit> score_kernels() {
  return {&fold_scores<Unit>, &scale_lanes, &score_gradients<Unit>};
}

}  // namespace RLK_ISA

#undef RLK_ISA
#undef RLK_TARGET
#undef RLK_HAS_BF16_DOT
