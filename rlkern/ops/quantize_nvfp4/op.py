"""Schema, fake and owners of `quantize_nvfp4`; no gradient goes through it."""

import torch

from rlkern import _library
from rlkern.ops.quantize_nvfp4 import reference


def _fake(w, amax, recipe, square, rule):
    rows, columns = w.shape
    codes = w.new_empty((rows, columns // 2), dtype=torch.uint8)
    scales = w.new_empty((rows, columns // 16), dtype=torch.uint8)
    return codes, scales, w.new_empty((), dtype=torch.float32)


_library.define(
    "quantize_nvfp4(Tensor w, Tensor? amax, int recipe, bool square, int rule) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
)
_library.fill("quantize_nvfp4", reference.forward, "rlkern.ops.quantize_nvfp4.triton:forward")
