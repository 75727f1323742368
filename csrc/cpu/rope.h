// Tables of a rotation of heads (RoPE in halves), as rms_norm and write_kv take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "check.h"

namespace rlkern {

struct Rope {
  const float* cos = nullptr;  // (tokens, half); null: heads are not turned
  const float* sin = nullptr;
  int64_t half = 0;

  Rope(const std::optional<torch::stable::Tensor>& cos_table,
       const std::optional<torch::stable::Tensor>& sin_table, int64_t tokens, int64_t width) {
    STD_TORCH_CHECK(cos_table.has_value() == sin_table.has_value(),
                    "cos and sin must be given together");
    if (!cos_table.has_value()) return;
    half = cos_table->size(1);
    for (const torch::stable::Tensor* t : {&*cos_table, &*sin_table}) {
      RLK_CHECK_CPU(*t);
      RLK_CHECK_DTYPE(*t, Float);
      RLK_CHECK_DIM(*t, 2);
      RLK_CHECK_SIZE(*t, 0, tokens);
      RLK_CHECK_SIZE(*t, 1, half);
      RLK_CHECK_CONTIGUOUS(*t);
    }
    STD_TORCH_CHECK(2 * half <= width, "cos must have at most half as many columns as a head");
    cos = cos_table->const_data_ptr<float>();
    sin = sin_table->const_data_ptr<float>();
  }
};

}  // namespace rlkern
