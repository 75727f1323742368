"""ModelOpt's quantised tensors from ours and back, without rounding anything again.

    weight, scales = to_modelopt(q)       # FP8QTensor, MXFP8QTensor or NVFP4QTensor
    w = weight.dequantize(**scales)
    q = from_modelopt(weight, **scales)

Their tensors have codes alone; scales are arguments of `dequantize`, which a TensorQuantizer keeps
as buffers `_scale` and `_double_scale` (nvidia-modelopt 0.47):

    fp8_*    scale float32 as ours; block_sizes {-1: wide, -2: high} of blocks
    mxfp8    scale (N, K / 32) uint8, the exponents; block_sizes {-1: 32}
    nvfp4    scale (N, K / 16) float8_e4m3fn; double_scale () float32, a multiplier as ours;
             block_sizes {-1: 16}

Their package is imported when a tensor of theirs is made, and not before. Checkpoints in their
names need nothing of theirs: `save_quantized`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlkern import _check
from rlkern._peers import Peer
from rlkern.ops import _quantized
from rlkern.ops._dequantize import BLOCKS
from rlkern.ops._quantized import QuantizedTensor

_TO, _FROM = "to_modelopt", "from_modelopt"
_PEER = Peer("nvidia-modelopt", ">=0.47,<0.48")
_QTENSOR = "modelopt.torch.quantization.qtensor"
_CLASSES = {"nvfp4": "NVFP4QTensor", "mxfp8": "MXFP8QTensor"}


def to_modelopt(
    q: QuantizedTensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, dict[str, Any]]:
    """A quantised tensor of theirs that shares our codes, and what its `dequantize` is given.

    Args:
        q: of any format and layout.
        dtype: the one that the tensor pretends to have. Theirs rounds FP8 scales to the dtype that
            it dequantises to.

    Raises:
        RuntimeError: ModelOpt is not installed, or has other arguments than those tested.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{_TO}: expected q to be a QuantizedTensor, got {type(q).__name__}")
    high, wide = (b or max(1, n) for b, n in zip(BLOCKS[q.format], q.shape))
    grid = (-(-q.shape[0] // high), -(-q.shape[1] // wide))
    scale = _quantized.linear(q.scale, q.layout, *grid).contiguous()
    scales = {"scale": scale.view(torch.uint8) if q.format == "mxfp8" else scale}
    blocks = {-1: wide, -2: high} if high > 1 else {-1: wide}
    scales["block_sizes"] = None if q.format in ("fp8_tensor", "fp8_row") else blocks
    scales["double_scale"] = q.global_scale
    arguments = {"original_shape": torch.Size(q.shape), "original_dtype": dtype}
    arguments |= {"quantized_data": q.data}
    made = _PEER.find(_TO, f"{_QTENSOR}.{_CLASSES.get(q.format, 'FP8QTensor')}", arguments)
    return made(**arguments), scales


def from_modelopt(
    tensor: Any,
    *,
    scale: Tensor,
    double_scale: Tensor | None = None,
    block_sizes: Mapping[int, int] | None = None,
) -> QuantizedTensor:
    """The codes and scales, shared, of an FP8QTensor, MXFP8QTensor or NVFP4QTensor, or of a
    QTensorWrapper of one.

    Args:
        tensor: theirs; packed bytes are NVFP4, E4M3 codes with scales of bytes MXFP8.
        scale, double_scale, block_sizes: what its `dequantize` takes.

    Raises:
        TypeError: another kind of tensor.
        ValueError: other blocks than ours, or scales that do not fit them.
    """
    if hasattr(tensor, "get_qtensor"):
        tensor = tensor.get_qtensor()
    data = getattr(tensor, "_quantized_data", None)
    if not isinstance(data, Tensor):
        raise TypeError(f"{_FROM}: expected a QTensor, got {type(tensor).__name__}")
    if data.ndim != 2:
        _check.fail(_FROM, "tensor", "to be a matrix", tuple(data.shape))
    blocks = {d: n for d, n in (block_sizes or {}).items() if isinstance(d, int)}
    rows, columns = data.shape
    if data.dtype == torch.uint8:
        format, columns = "nvfp4", 2 * columns
        if double_scale is None:
            _check.fail(_FROM, "double_scale", "with NVFP4", None)
    elif data.dtype != torch.float8_e4m3fn:
        _check.fail(_FROM, "tensor", "with E4M3 or NVFP4 codes", data.dtype)
    elif scale.dtype == torch.uint8:
        format = "mxfp8"
    elif blocks:
        format = "fp8_block128" if -2 in blocks else "fp8_group128"
    else:
        format = "fp8_tensor" if scale.numel() == 1 else "fp8_row"
    high, wide = (b or max(1, n) for b, n in zip(BLOCKS[format], (rows, columns)))
    if blocks and (blocks.get(-1), blocks.get(-2, 1)) != (wide, high):
        _check.fail(_FROM, "block_sizes", f"of {high} x {wide} with {format}", dict(blocks))
    grid = (-(-rows // high), -(-columns // wide))
    if scale.numel() != grid[0] * grid[1]:
        _check.fail(_FROM, "scale", f"of {grid} blocks", tuple(scale.shape))
    scale = scale.reshape(() if format == "fp8_tensor" else grid)
    if format == "mxfp8":
        scale = scale.view(torch.float8_e8m0fnu)
    global_scale = double_scale.reshape(()) if format == "nvfp4" else None
    return QuantizedTensor(data, scale, global_scale, format, "modelopt", "linear", (rows, columns))
