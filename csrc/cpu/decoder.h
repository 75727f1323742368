// Kernels that the decoder's layer is made of, as C++ functions: see the files of their names.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace rlkern {

torch::stable::Tensor decoder_linear(torch::stable::Tensor x, torch::stable::Tensor weight,
                                     std::optional<torch::stable::Tensor> bias);

torch::stable::Tensor rms_norm(torch::stable::Tensor x, std::optional<torch::stable::Tensor> weight,
                               double eps, std::optional<torch::stable::Tensor> cos,
                               std::optional<torch::stable::Tensor> sin);

void write_kv(torch::stable::Tensor key, torch::stable::Tensor value, torch::stable::Tensor slots,
              torch::stable::Tensor k_cache, torch::stable::Tensor v_cache,
              std::optional<torch::stable::Tensor> cos, std::optional<torch::stable::Tensor> sin);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> tree_attention(
    torch::stable::Tensor q, torch::stable::Tensor k_cache, torch::stable::Tensor v_cache,
    torch::stable::Tensor rows, torch::stable::Tensor items, torch::stable::Tensor slots,
    torch::stable::Tensor trees, torch::stable::Tensor parts, torch::stable::Tensor part_offsets,
    int64_t chunk, int64_t max_rows, double scale, double softcap);

}  // namespace rlkern
