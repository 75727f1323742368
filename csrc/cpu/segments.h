// Where the sequences of a batch begin: cu_seqlens of either integer type, or rows of one length.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "check.h"

namespace rlkern {

class Segments {
 public:
  Segments(int64_t rows, int64_t row, int64_t tokens) : count_(rows), tokens_(tokens), row_(row) {}
  Segments(const torch::stable::Tensor& cu_seqlens, int64_t tokens) : tokens_(tokens) {
    using torch::headeronly::ScalarType;
    RLK_CHECK_CPU(cu_seqlens);
    RLK_CHECK_DIM(cu_seqlens, 1);
    RLK_CHECK_CONTIGUOUS(cu_seqlens);
    const ScalarType type = cu_seqlens.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long,
                    "cu_seqlens must have dtype int32 or int64");
    STD_TORCH_CHECK(cu_seqlens.numel() > 0, "cu_seqlens must have at least one element");
    count_ = cu_seqlens.numel() - 1;
    if (type == ScalarType::Int)
      narrow_ = cu_seqlens.const_data_ptr<int32_t>();
    else
      wide_ = cu_seqlens.const_data_ptr<int64_t>();
  }
  int64_t count() const { return count_; }
  // in [0, T] whatever cu_seqlens holds
  int64_t begin(int64_t i) const {
    const int64_t at = narrow_ ? narrow_[i] : wide_ ? wide_[i] : i * row_;
    return std::clamp<int64_t>(at, 0, tokens_);
  }
  int64_t length(int64_t i) const { return std::max<int64_t>(0, begin(i + 1) - begin(i)); }
  // the last of the S + 1 bounds at or before the token; -1: none
  int64_t last_bound(int64_t token) const {
    if (!narrow_ && !wide_) return row_ ? token / row_ : -1;
    int64_t low = -1, high = count_ + 1;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (begin(middle) <= token ? low : high) = middle;
    }
    return low;
  }
  // Sequences that are together worth `tokens` tokens of work.
  int64_t grain(int64_t tokens) const {
    return std::max<int64_t>(1, tokens * count_ / std::max<int64_t>(1, tokens_));
  }

 private:
  int64_t count_, tokens_, row_ = 0;
  const int32_t* narrow_ = nullptr;
  const int64_t* wide_ = nullptr;
};

}  // namespace rlkern
