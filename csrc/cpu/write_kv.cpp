// Keys and values of new tokens into the slots of a paged cache; keys are rotated on the way where
// cos and sin are given.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>

#include "check.h"
#include "decoder.h"
#include "dispatch.h"
#include "rope.h"
#include "vec.h"

namespace rlkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A thread is worth starting for about this many elements.
constexpr int64_t kGrain = 32768;

template <class T>
struct Writer {
  const T* key;
  const T* value;
  T* k_cache;
  T* v_cache;
  const float* cos;  // null: keys stay as they are
  const float* sin;
  int64_t heads, width, half;

  RLK_HD void rotate(const T* k, const float* c, const float* s, T* out) const {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const f32x16 low = load(k + i), high = load(k + half + i);
      const f32x16 cosine = load(c + i), sine = load(s + i);
      store(out + i, low * cosine - high * sine);
      store(out + half + i, high * cosine + low * sine);
    }
    for (; i < half; ++i) {
      const float low = static_cast<float>(k[i]), high = static_cast<float>(k[half + i]);
      out[i] = static_cast<T>(low * c[i] - high * s[i]);
      out[half + i] = static_cast<T>(high * c[i] + low * s[i]);
    }
    std::memcpy(out + 2 * half, k + 2 * half, sizeof(T) * (width - 2 * half));
  }

  RLK_HD void token(int64_t t, int64_t slot) const {
    const int64_t size = heads * width;
    std::memcpy(v_cache + slot * size, value + t * size, sizeof(T) * size);
    if (!cos) {
      std::memcpy(k_cache + slot * size, key + t * size, sizeof(T) * size);
      return;
    }
    for (int64_t h = 0; h < heads; ++h)
      rotate(key + t * size + h * width, cos + t * half, sin + t * half,
             k_cache + slot * size + h * width);
  }
};

template <class T, class I>
RLK_HD void write_tokens(const Writer<T>& writer, const I* slots, int64_t num_slots, int64_t begin,
                         int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    if (slots[t] >= 0 && slots[t] < num_slots) writer.token(t, slots[t]);
}

#define RLK_CLONES(T, I)                                                                   \
  RLK_MULTIVERSION void clones(const Writer<T>& writer, const I* slots, int64_t num_slots, \
                               int64_t begin, int64_t end) {                               \
    write_tokens(writer, slots, num_slots, begin, end);                                    \
  }
RLK_CLONES(float, int32_t)
RLK_CLONES(float, int64_t)
RLK_CLONES(bf16, int32_t)
RLK_CLONES(bf16, int64_t)
RLK_CLONES(fp16, int32_t)
RLK_CLONES(fp16, int64_t)

template <class T, class I>
void run(const Writer<T>& writer, const I* slots, int64_t tokens, int64_t num_slots) {
  const int64_t size = std::max<int64_t>(1, writer.heads * writer.width);
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(1, kGrain / size),
      [&](int64_t begin, int64_t end) { clones(writer, slots, num_slots, begin, end); });
}

}  // namespace

void write_kv(Tensor key, Tensor value, Tensor slots, Tensor k_cache, Tensor v_cache,
              std::optional<Tensor> cos, std::optional<Tensor> sin) {
  RLK_CHECK_CPU(key);
  RLK_CHECK_DIM(key, 3);
  const int64_t tokens = key.size(0), heads = key.size(1), width = key.size(2);
  RLK_CHECK_DIM(value, 3);
  RLK_CHECK_SIZE(value, 0, tokens);
  RLK_CHECK_DIM(k_cache, 4);
  RLK_CHECK_DIM(v_cache, 4);
  for (const Tensor* t : {&key, &value, &k_cache, &v_cache, &slots}) {
    RLK_CHECK_CPU(*t);
    RLK_CHECK_CONTIGUOUS(*t);
    if (t == &slots) continue;
    RLK_CHECK_SIZE(*t, t->dim() - 2, heads);
    RLK_CHECK_SIZE(*t, t->dim() - 1, width);
    STD_TORCH_CHECK(t->scalar_type() == key.scalar_type(), "all dtypes must be that of key");
  }
  RLK_CHECK_SIZE(v_cache, 0, k_cache.size(0));
  RLK_CHECK_SIZE(v_cache, 1, k_cache.size(1));
  RLK_CHECK_DIM(slots, 1);
  RLK_CHECK_SIZE(slots, 0, tokens);
  const Rope rope(cos, sin, tokens, width);
  const int64_t num_slots = k_cache.size(0) * k_cache.size(1);
  RLK_DISPATCH_FLOAT(key, T, {
    const Writer<T> writer{key.const_data_ptr<T>(),
                           value.const_data_ptr<T>(),
                           k_cache.mutable_data_ptr<T>(),
                           v_cache.mutable_data_ptr<T>(),
                           rope.cos,
                           rope.sin,
                           heads,
                           width,
                           rope.half};
    if (slots.scalar_type() == ScalarType::Int) {
      run(writer, slots.const_data_ptr<int32_t>(), tokens, num_slots);
    } else {
      RLK_CHECK_DTYPE(slots, Long);
      run(writer, slots.const_data_ptr<int64_t>(), tokens, num_slots);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) { m.impl("write_kv", TORCH_BOX(&write_kv)); }

}  // namespace rlkern
