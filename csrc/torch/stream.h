// The stream and the device that torch has set, through the stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace rlkern {

// Makes a tensor's device the current one while it lives.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const torch::stable::Tensor& t) : guard(t.get_device()) {
    void* current = nullptr;
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device(), &current) == AOTI_TORCH_SUCCESS,
        "no CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }
};

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

}  // namespace rlkern
