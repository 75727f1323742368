// From a tensor's dtype to the C++ type of its elements.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

// Runs the body with `using name = float | BFloat16 | Half`.
#define RLK_DISPATCH_FLOAT(tensor, name, ...)                                          \
  switch ((tensor).scalar_type()) {                                                    \
    case torch::headeronly::ScalarType::Float: {                                       \
      using name = float;                                                              \
      __VA_ARGS__;                                                                     \
      break;                                                                           \
    }                                                                                  \
    case torch::headeronly::ScalarType::BFloat16: {                                    \
      using name = c10::BFloat16;                                                      \
      __VA_ARGS__;                                                                     \
      break;                                                                           \
    }                                                                                  \
    case torch::headeronly::ScalarType::Half: {                                        \
      using name = c10::Half;                                                          \
      __VA_ARGS__;                                                                     \
      break;                                                                           \
    }                                                                                  \
    default:                                                                           \
      STD_TORCH_CHECK(false, #tensor " must have dtype float32, bfloat16 or float16"); \
  }
