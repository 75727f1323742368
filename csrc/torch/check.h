// Second fence for raw torch.ops callers: the public Python functions have checked already.
// Macros, because STD_TORCH_CHECK reports the line that it stands on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define RLK_CHECK_CPU(t) STD_TORCH_CHECK((t).is_cpu(), #t " must be on the CPU")
#define RLK_CHECK_CUDA(t) STD_TORCH_CHECK((t).is_cuda(), #t " must be on a CUDA device")
#define RLK_CHECK_DIM(t, n) \
  STD_TORCH_CHECK((t).dim() == (n), #t " must have ", (n), " dimensions, got ", (t).dim())
#define RLK_CHECK_SIZE(t, d, n)                                                                  \
  STD_TORCH_CHECK((t).size(d) == (n), #t " must have size ", (n), " in dimension ", d, ", got ", \
                  (t).size(d))
#define RLK_CHECK_CONTIGUOUS(t) STD_TORCH_CHECK((t).is_contiguous(), #t " must be contiguous")
#define RLK_CHECK_DTYPE(t, type)                                            \
  STD_TORCH_CHECK((t).scalar_type() == torch::headeronly::ScalarType::type, \
                  #t " must have dtype " #type)
