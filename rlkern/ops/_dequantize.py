"""Quantised matrices back as floats."""

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops import _quantized
from rlkern.ops._quantized import QuantizedTensor
from rlkern.ops.quantize_nvfp4.reference import e2m1_values

_OP = "dequantize"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows and columns of a block; 0: as many as there are
BLOCKS = {
    "fp8_tensor": (0, 0),
    "fp8_row": (1, 0),
    "fp8_block128": (128, 128),
    "fp8_group128": (1, 128),
    "mxfp8": (1, 32),
    "nvfp4": (1, 16),
}


def unpack_e2m1(data: Tensor) -> Tensor:
    """(N, K / 2) bytes as (N, K) float32, the low four bits first."""
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    return e2m1_values(codes)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale * global_scale, from left to right in float32, then rounded to dtype.

    code * scale is exact for nvfp4, and for scales that are powers of two.

    Args:
        q: from quantize_fp8 or quantize_nvfp4, in any layout.
        dtype: float32, bfloat16 or float16.

    Returns:
        (N, K). A block whose scale is NaN is NaN.

    Raises:
        TypeError: not a QuantizedTensor, or another dtype.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{_OP}: expected q to be a QuantizedTensor, got {type(q).__name__}")
    if dtype not in _DTYPES:
        _check.fail(_OP, "dtype", "float32, bfloat16 or float16", dtype)
    rows, columns = q.shape
    high, wide = (b or max(1, n) for b, n in zip(BLOCKS[q.format], q.shape))
    codes = unpack_e2m1(q.data) if q.format == "nvfp4" else q.data.float()
    if codes.numel() == 0:
        return codes.to(dtype)
    grid = (-(-rows // high), -(-columns // wide))
    scale = _quantized.linear(q.scale, q.layout, *grid).float().reshape(grid)
    scale = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    values = codes * scale
    if q.global_scale is not None:
        values = values * q.global_scale
    return values.to(dtype)
