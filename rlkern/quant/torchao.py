"""torchao's quantised tensors from ours and back, without rounding anything again.

    weight = to_torchao(q)                # Float8Tensor, MXTensor or NVFP4Tensor
    q = from_torchao(weight)

How theirs hold codes and scales (torchao 0.18):

    fp8_*    Float8Tensor: qdata (N, K); scale (N / high, K / wide) float32; block_size [high, wide]
    mxfp8    MXTensor: qdata (N, K); scale (N, K / 32) float8_e8m0fnu, or swizzled as 128x4
    nvfp4    NVFP4Tensor: qdata (N, K / 2); scale (N, K / 16) float8_e4m3fn, or swizzled;
             per_tensor_scale (), a multiplier as ours

Their package is imported when a tensor of theirs is made, and not before.
"""

from typing import Any

import torch
from torch import Tensor

from rlkern import _check
from rlkern._peers import Peer
from rlkern.ops import _quantized
from rlkern.ops._dequantize import BLOCKS
from rlkern.ops._quantized import QuantizedTensor

_TO, _FROM = "to_torchao", "from_torchao"
_PEER = Peer("torchao", ">=0.18,<0.19")
_FP8 = ("fp8_block128", "fp8_group128", "fp8_row", "fp8_tensor")


def to_torchao(q: QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Float8Tensor, MXTensor or NVFP4Tensor that shares our codes, and linear scales.

    Args:
        q: of any format and layout. Their blocks divide a matrix: ragged ones are refused.
        dtype: the one that the tensor pretends to have.

    Raises:
        ValueError: blocks that do not divide q's shape.
        RuntimeError: torchao is not installed, or has other arguments than those tested.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{_TO}: expected q to be a QuantizedTensor, got {type(q).__name__}")
    rows, columns = q.shape
    block = [b or n for b, n in zip(BLOCKS[q.format], q.shape)]
    if not all(b and n % b == 0 for b, n in zip(block, q.shape)):
        _check.fail(_TO, "q", f"of blocks of {block} that divide its shape", q.shape)
    grid = (rows // block[0], columns // block[1])
    if q.format in _FP8:
        scale = _quantized.linear(q.scale, q.layout, *grid).reshape(grid).contiguous()
        made = {"qdata": q.data, "scale": scale, "block_size": block, "dtype": dtype}
        return _PEER.find(_TO, "torchao.quantization.Float8Tensor", made)(**made)
    swizzled = q.layout == "swizzle_128x4"
    tiles = (-(-grid[0] // 128) * 32, -(-grid[1] // 4) * 16)
    made = {"qdata": q.data, "scale": q.scale.view(tiles if swizzled else grid)}
    made |= {"block_size": block[1], "orig_dtype": dtype, "is_swizzled_scales": swizzled}
    folder = "torchao.prototype.mx_formats"
    if q.format == "nvfp4":
        made["per_tensor_scale"] = q.global_scale
        return _PEER.find(_TO, f"{folder}.nvfp4_tensor.NVFP4Tensor", made)(**made)
    made |= {"elem_dtype": q.data.dtype, "kernel_preference": None, "act_quant_kwargs": None}
    kernels = _PEER.find(_TO, "torchao.quantization.quantize_.common.KernelPreference", ["value"])
    made["kernel_preference"] = kernels("emulated")
    return _PEER.find(_TO, f"{folder}.mx_tensor.MXTensor", made)(**made)


def from_torchao(tensor: Any) -> QuantizedTensor:
    """The codes and linear scales, shared, of a Float8Tensor, MXTensor or NVFP4Tensor.

    Where blocks are those of two formats, as of a matrix of 128 columns, it is the one whose blocks
    have a number in its name.

    Raises:
        TypeError: another kind of tensor.
        ValueError: other codes than E4M3 or NVFP4's, other blocks than ours, not a matrix whose
            rows are contiguous.
    """
    data, scale, block = (getattr(tensor, n, None) for n in ("qdata", "scale", "block_size"))
    if not isinstance(data, Tensor) or not isinstance(scale, Tensor) or block is None:
        kind = type(tensor).__name__
        raise TypeError(f"{_FROM}: expected a Float8Tensor, MXTensor or NVFP4Tensor, got {kind}")
    if data.ndim != 2 or not data.is_contiguous():
        got = f"{tuple(data.shape)} with strides {data.stride()}"
        _check.fail(_FROM, "tensor", "to be a matrix, row by row", got)
    rows, columns = data.shape
    swizzled = getattr(tensor, "is_swizzled_scales", False)
    layout = "swizzle_128x4" if swizzled else "linear"
    if hasattr(tensor, "per_tensor_scale"):
        if block != 16:
            _check.fail(_FROM, "tensor", "of blocks of 16", block)
        scale = scale.reshape(-1) if swizzled else scale.reshape(rows, -1)
        g = tensor.per_tensor_scale
        g = scale.new_ones((), dtype=torch.float32) if g is None else g.reshape(())
        return QuantizedTensor(data, scale, g, "nvfp4", "torchao", layout, (rows, columns * 2))
    if data.dtype != torch.float8_e4m3fn:
        _check.fail(_FROM, "tensor", "with E4M3 codes", data.dtype)
    shape = (rows, columns)
    if hasattr(tensor, "elem_dtype"):
        if block != 32:
            _check.fail(_FROM, "tensor", "of blocks of 32", block)
        scale = scale.reshape(-1) if swizzled else scale.reshape(rows, -1)
        return QuantizedTensor(data, scale, None, "mxfp8", "torchao", layout, shape)
    for format in _FP8:
        if list(block) == [b or n for b, n in zip(BLOCKS[format], shape)]:
            scale = scale.reshape(()) if format == "fp8_tensor" else scale
            return QuantizedTensor(data, scale, None, format, "torchao", "linear", shape)
    _check.fail(_FROM, "tensor", f"of the blocks of {', '.join(_FP8)}", block)
