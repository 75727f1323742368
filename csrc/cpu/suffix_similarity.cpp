// How alike the last tokens of two branches are: one 64-bit word holds a column of the table that a
// plain dynamic programme would fill.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "check.h"

namespace rlkern {
namespace {

using torch::stable::Tensor;

// As MODES of reference.py has them.
enum Mode { kEdit, kSuffix, kRouge };
constexpr int64_t kMost = 64;
constexpr int64_t kGrain = 64;

// Where each token of a row stands, as a bit a position. Twice as many slots as two rows have
// tokens, so that a search ends.
class Positions {
 public:
  Positions(const int64_t* tokens, int64_t n) {
    std::memset(bits_, 0, sizeof bits_);
    for (int64_t i = 0; i < n; ++i) {
      const int slot = slot_of(tokens[i]);
      tokens_[slot] = tokens[i];
      bits_[slot] |= uint64_t{1} << i;
    }
  }
  uint64_t of(int64_t token) const { return bits_[slot_of(token)]; }

 private:
  static constexpr int kSlots = 256;
  int slot_of(int64_t token) const {
    int slot = static_cast<uint64_t>(token) * 0x9E3779B97F4A7C15u >> 56;
    while (bits_[slot] && tokens_[slot] != token) slot = (slot + 1) % kSlots;
    return slot;
  }

  int64_t tokens_[kSlots];
  uint64_t bits_[kSlots];
};

// Myers, J. ACM 46 (1999): the differences between neighbours of a column are +1, 0 or -1.
int64_t edit_distance(const int64_t* a, int64_t n, const Positions& b, int64_t m) {
  if (m == 0) return n;
  uint64_t plus = ~uint64_t{0}, minus = 0;
  const uint64_t bottom = uint64_t{1} << (m - 1);
  int64_t distance = m;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t match = b.of(a[i]);
    const uint64_t vertical = match | minus;
    const uint64_t horizontal = (((match & plus) + plus) ^ plus) | match;
    uint64_t up = minus | ~(horizontal | plus), down = plus & horizontal;
    distance += (up & bottom) != 0;
    distance -= (down & bottom) != 0;
    up = up << 1 | 1;
    plus = down << 1 | ~(vertical | up);
    minus = up & vertical;
  }
  return distance;
}

// Hyyro, AWOCA 2004: a zero for every step of the longest common subsequence.
int64_t common_subsequence(const int64_t* a, int64_t n, const Positions& b, int64_t m) {
  uint64_t row = ~uint64_t{0};
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t match = row & b.of(a[i]);
    row = (row + match) | (row - match);
  }
  const uint64_t live = m == kMost ? ~uint64_t{0} : (uint64_t{1} << m) - 1;
  return __builtin_popcountll(~row & live);
}

// The longest suffix of a that stands anywhere in b: bits of where its first token lies.
int64_t suffix_within(const int64_t* a, int64_t n, const Positions& b) {
  uint64_t live = ~uint64_t{0};
  for (int64_t i = n - 1; i >= 0; --i) {
    live &= b.of(a[i]);
    if (!live) return n - 1 - i;
    live >>= 1;
  }
  return n;
}

float similarity(const int64_t* a, int64_t n, const int64_t* b, int64_t m, Mode mode) {
  if (n == 0 && m == 0) return mode == kEdit ? 0.0f : 1.0f;
  const Positions of_b(b, m);
  if (mode == kRouge)
    return static_cast<float>(2 * common_subsequence(a, n, of_b, m)) / static_cast<float>(n + m);
  const int64_t longer = std::max(n, m);
  const int64_t count = mode == kEdit
                            ? edit_distance(a, n, of_b, m)
                            : std::max(suffix_within(a, n, of_b), suffix_within(b, m, {a, n}));
  return static_cast<float>(count) / static_cast<float>(longer);
}

Tensor suffix_similarity(Tensor tokens_a, Tensor tokens_b, Tensor lengths_a, Tensor lengths_b,
                         int64_t mode) {
  RLK_CHECK_CPU(tokens_a);
  RLK_CHECK_DTYPE(tokens_a, Long);
  RLK_CHECK_DIM(tokens_a, 2);
  RLK_CHECK_CONTIGUOUS(tokens_a);
  const int64_t pairs = tokens_a.size(0), width = tokens_a.size(1);
  STD_TORCH_CHECK(width <= kMost, "at most 64 tokens fit a word, got ", width);
  STD_TORCH_CHECK(mode >= kEdit && mode <= kRouge, "unknown mode ", mode);
  RLK_CHECK_DTYPE(tokens_b, Long);
  RLK_CHECK_DIM(tokens_b, 2);
  RLK_CHECK_SIZE(tokens_b, 0, pairs);
  RLK_CHECK_SIZE(tokens_b, 1, width);
  RLK_CHECK_CONTIGUOUS(tokens_b);
  RLK_CHECK_DTYPE(lengths_a, Long);
  RLK_CHECK_SIZE(lengths_a, 0, pairs);
  RLK_CHECK_CONTIGUOUS(lengths_a);
  RLK_CHECK_DTYPE(lengths_b, Long);
  RLK_CHECK_SIZE(lengths_b, 0, pairs);
  RLK_CHECK_CONTIGUOUS(lengths_b);
  Tensor out = torch::stable::new_empty(tokens_a, {pairs}, torch::headeronly::ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  const int64_t* a = tokens_a.const_data_ptr<int64_t>();
  const int64_t* b = tokens_b.const_data_ptr<int64_t>();
  const int64_t* lengths[] = {lengths_a.const_data_ptr<int64_t>(),
                              lengths_b.const_data_ptr<int64_t>()};
  torch::stable::parallel_for(0, pairs, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = std::clamp<int64_t>(lengths[0][i], 0, width);
      const int64_t m = std::clamp<int64_t>(lengths[1][i], 0, width);
      const int64_t stop = (i + 1) * width;
      to[i] = similarity(a + stop - n, n, b + stop - m, m, static_cast<Mode>(mode));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("suffix_similarity", TORCH_BOX(&suffix_similarity));
}

}  // namespace rlkern
