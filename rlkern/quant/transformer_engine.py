"""Transformer Engine's quantised tensors from ours and back, without rounding anything again.

    weight = to_transformer_engine(q)           # Float8BlockwiseQTensor or NVFP4Tensor
    q = from_transformer_engine(weight)

How theirs hold codes and scales, rowwise (TransformerEngine at 01634950, 2026):

    fp8_block128  _rowwise_scale_inv (ceil(N / 128), ceil(K / 128) rounded up to 4) float32
    fp8_group128  _rowwise_scale_inv (ceil(K / 128), N rounded up to 4) float32
    nvfp4         _rowwise_scale_inv (N rounded up to 128, K / 16 rounded up to 4) bytes of E4M3, as
                  they are or in the 128x4 swizzle; _amax_rowwise (1,), a value is code * scale *
                  amax / 2688

Their package is imported when a tensor of theirs is made, and not before.
"""

from typing import Any

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops import _quantized
from rlkern.ops._quantized import QuantizedTensor

_TO, _FROM = "to_transformer_engine", "from_transformer_engine"
FORMATS = ("fp8_block128", "fp8_group128", "nvfp4")
_LARGEST = 2688.0


def to_transformer_engine(
    q: QuantizedTensor, dtype: torch.dtype = torch.bfloat16, quantizer: Any = None
) -> Any:
    """A Float8BlockwiseQTensor or NVFP4Tensor with rowwise data that shares our codes.

    Args:
        q: fp8_block128, fp8_group128 or nvfp4 with N a multiple of 16. Their NVFP4 keeps an amax:
            recipes whose global scale is A / 2688 fit always, others where it happens to be one.
        dtype: the one that the tensor pretends to have.
        quantizer: theirs, for updates in place; by default a Float8BlockQuantizer that agrees with
            q, and none for NVFP4.

    Raises:
        ValueError: another format, or a global scale that is no amax / 2688 in float32.
        RuntimeError: Transformer Engine is not installed.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{_TO}: expected q to be a QuantizedTensor, got {type(q).__name__}")
    _check.one_of(_TO, "q.format", q.format, FORMATS)
    rows, columns = q.shape
    common = {"shape": q.shape, "dtype": dtype, "columnwise_data": None}
    common |= {"columnwise_scale_inv": None, "requires_grad": False}
    if q.format == "nvfp4":
        if rows % 16:
            _check.fail(_TO, "q", "of shape (N, K), N a multiple of 16", q.shape)
        amax = _amax_of(q.global_scale)
        _, tensors, engine = _modules()
        swizzled = q.layout == "swizzle_128x4"
        high, wide = _up(rows, 128), _up(columns // 16, 4)
        scale = q.scale.view(torch.uint8)
        return tensors.NVFP4Tensor(
            rowwise_data=q.data,
            rowwise_scale_inv=scale.view(high, wide) if swizzled else _padded(scale, high, wide),
            amax_rowwise=amax,
            amax_columnwise=None,
            fp4_dtype=engine.DType.kFloat4E2M1,
            quantizer=quantizer,
            with_gemm_swizzled_scales=swizzled,
            **common,
        )
    blocks, _, engine = _modules()
    square = q.format == "fp8_block128"
    across = -(-columns // 128)
    scale = q.scale
    if square:
        scale = _padded(scale, scale.shape[0], _up(across, 4))
    else:
        scale = _quantized.linear(scale, q.layout, rows, across)
        scale = _padded(scale.T, across, _up(rows, 4))
    kind = engine.DType.kFloat8E4M3
    if quantizer is None:
        powers = bool(((q.scale.view(torch.int32) & 0x7FFFFF) == 0).all())
        quantizer = blocks.Float8BlockQuantizer(
            kind,
            rowwise=True,
            columnwise=False,
            force_pow_2_scales=powers,
            block_scaling_dim=2 if square else 1,
        )
    return blocks.Float8BlockwiseQTensor(
        rowwise_data=q.data.view(torch.uint8),
        rowwise_scale_inv=scale,
        fp8_dtype=kind,
        quantizer=quantizer,
        is_2D_scaled=square,
        **common,
    )


def from_transformer_engine(tensor: Any) -> QuantizedTensor:
    """The rowwise codes, shared, and scales of a Float8BlockwiseQTensor or NVFP4Tensor.

    Raises:
        TypeError: another kind of tensor.
        ValueError: no rowwise data, E5M2 codes, or a global scale for each row.
    """
    data, scale = (getattr(tensor, f"_rowwise_{what}", None) for what in ("data", "scale_inv"))
    if hasattr(tensor, "_amax_rowwise"):
        format = "nvfp4"
    elif hasattr(tensor, "_is_2D_scaled"):
        format = "fp8_block128" if tensor._is_2D_scaled else "fp8_group128"
    else:
        kind = type(tensor).__name__
        raise TypeError(f"{_FROM}: expected a Float8BlockwiseQTensor or NVFP4Tensor, got {kind}")
    if data is None or scale is None:
        _check.fail(_FROM, "tensor", "with rowwise data", "columnwise data alone")
    data = data.reshape(-1, data.shape[-1])
    rows, columns = data.shape[0], data.shape[1] * (2 if format == "nvfp4" else 1)
    shape = (rows, columns)
    if format == "nvfp4":
        amax = tensor._amax_rowwise
        if amax is None or amax.numel() != 1:
            got = None if amax is None else tuple(amax.shape)
            _check.fail(_FROM, "tensor", "with one amax", got)
        # rounded once: torch on CUDA divides by a number through its reciprocal
        amax = amax.reshape(())
        global_scale = amax / torch.full_like(amax, _LARGEST)
        scale = scale.view(torch.uint8)
        if getattr(tensor, "_with_gemm_swizzled_scales", False):
            scale = _quantized.unswizzle_128x4(scale.reshape(-1), rows, columns // 16)
        scale = scale[:rows, : columns // 16].contiguous().view(torch.float8_e4m3fn)
        return QuantizedTensor(data, scale, global_scale, format, "te", "linear", shape)
    if "E4M3" not in str(tensor._fp8_dtype):
        _check.fail(_FROM, "tensor", "with E4M3 codes", tensor._fp8_dtype)
    across = -(-columns // 128)
    if format == "fp8_block128":
        scale = scale[: -(-rows // 128), :across].contiguous()
    else:
        scale = scale[:across, :rows].T.contiguous()
    codes = data.view(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scale, None, format, "te", "linear", shape)


def _modules() -> tuple[Any, Any, Any]:
    try:
        import transformer_engine_torch
        from transformer_engine.pytorch.tensor import float8_blockwise_tensor, nvfp4_tensor
    except ImportError as error:
        raise RuntimeError(
            f"{_TO}: needs Transformer Engine (pip install transformer-engine[pytorch]): {error}"
        ) from error
    return float8_blockwise_tensor, nvfp4_tensor, transformer_engine_torch


def _amax_of(global_scale: Tensor) -> Tensor:
    """(1,) float32 that 2688 divides into the global scale."""
    near = (global_scale.double() * _LARGEST).float()
    for amax in (near, *(torch.nextafter(near, near * f) for f in (0.5, 2.0))):
        if torch.equal(amax / torch.full_like(amax, _LARGEST), global_scale):
            return amax.reshape(1)
    raise ValueError(f"{_TO}: no float32 over 2688 is {global_scale.item()!r}")


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(scale: Tensor, rows: int, columns: int) -> Tensor:
    out = scale.new_zeros((rows, columns))
    out[: scale.shape[0], : scale.shape[1]] = scale
    return out
