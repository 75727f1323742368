"""Entries of compressed-tensors' state dicts from our codes and scales, and back, without rounding
anything again.

    state, scheme = to_compressed_tensors(q)     # {"weight": ...}, QuantizationScheme
    q = from_compressed_tensors(state, scheme)

What a layer's state dict has (compressed-tensors 0.20):

    fp8_*    weight; weight_scale float32, of a tensor (1,)                  float-quantized
    mxfp8    weight; weight_scale uint8, the exponents                       mxfp8-quantized
    nvfp4    weight_packed; weight_scale; weight_global_scale (1,) float32,
             a divisor: 1 / ours                                             nvfp4-pack-quantized

Their package is imported when a scheme of theirs is made, and not before.
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

_TO, _FROM = "to_compressed_tensors", "from_compressed_tensors"
_PEER = Peer("compressed-tensors", ">=0.20,<0.21")


def to_compressed_tensors(q: QuantizedTensor) -> tuple[dict[str, Tensor], Any]:
    """A layer's compressed state dict, which shares our codes, and its QuantizationScheme.

    Args:
        q: of any format. A global scale of NVFP4 must be 1 / S of some float32 S: recipes
            compressed_tensors and vllm always are, of others about half.

    Raises:
        ValueError: a global scale that is no float32's reciprocal.
        RuntimeError: compressed-tensors is not installed, or has other arguments than those tested.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{_TO}: expected q to be a QuantizedTensor, got {type(q).__name__}")
    state = entries(_TO, q)
    weights = weight_args(q.format)
    if q.format == "mxfp8":
        weights["scale_dtype"] = torch.uint8
    folder = "compressed_tensors.quantization"
    args = _PEER.find(_TO, f"{folder}.QuantizationArgs", weights)(**weights)
    made = {"targets": ["Linear"], "weights": args, "format": compression(q.format)}
    return state, _PEER.find(_TO, f"{folder}.QuantizationScheme", made)(**made)


def from_compressed_tensors(state: Mapping[str, Tensor], scheme: Any) -> QuantizedTensor:
    """The codes and scales, shared, of a layer's compressed state dict.

    Args:
        state: by the names above; others are not looked at.
        scheme: theirs, or its `weights`: QuantizationArgs, or the mapping that config.json has.

    Raises:
        ValueError: a missing entry, or a kind of weights that has no format here: integers, zero
            points, other blocks.
    """
    weights = scheme.get("weights", scheme) if isinstance(scheme, Mapping) else scheme
    weights = getattr(weights, "weights", weights)
    get = weights.get if isinstance(weights, Mapping) else lambda n: getattr(weights, n, None)
    format = _format_of(get)
    packed = format == "nvfp4"
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    names = names if packed else ("weight", "weight_scale")
    missing = [name for name in names if name not in state]
    if missing:
        _check.fail(_FROM, "state", f"with {', '.join(names)}", f"no {', '.join(missing)}")
    data, scale = state[names[0]], state[names[1]]
    rows, columns = data.shape[0], data.shape[1] * (2 if packed else 1)
    high, wide = (b or max(1, n) for b, n in zip(BLOCKS[format], (rows, columns)))
    grid = (-(-rows // high), -(-columns // wide))
    if scale.numel() != grid[0] * grid[1]:
        _check.fail(_FROM, "state", f"with weight_scale of {grid} blocks", tuple(scale.shape))
    scale = scale.reshape(() if format == "fp8_tensor" else grid)
    global_scale = None
    if packed:
        divisor = state["weight_global_scale"].reshape(())
        global_scale = torch.ones_like(divisor) / divisor
    elif format == "mxfp8":
        scale = scale.view(torch.float8_e8m0fnu)
    shape = (rows, columns)
    return QuantizedTensor(data, scale, global_scale, format, "compressed_tensors", "linear", shape)


def entries(op: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """The state dict alone, which needs nothing of theirs."""
    high, wide = (b or max(1, n) for b, n in zip(BLOCKS[q.format], q.shape))
    grid = (-(-q.shape[0] // high), -(-q.shape[1] // wide))
    scale = _quantized.linear(q.scale, q.layout, *grid).contiguous()
    if q.format == "nvfp4":
        named = {"weight_packed": q.data, "weight_scale": scale}
        return named | {"weight_global_scale": _divisor(op, q.global_scale)}
    if q.format == "mxfp8":
        scale = scale.view(torch.uint8)
    return {"weight": q.data, "weight_scale": scale.reshape(1) if scale.ndim == 0 else scale}


def weight_args(format: str) -> dict[str, Any]:
    """Arguments of their QuantizationArgs, as config.json spells them."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    if format == "nvfp4":
        return common | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    if format == "fp8_block128":
        return common | {"strategy": "block", "block_structure": [128, 128]}
    if format in ("fp8_group128", "mxfp8"):
        return common | {"strategy": "group", "group_size": BLOCKS[format][1]}
    return common | {"strategy": "channel" if format == "fp8_row" else "tensor"}


def compression(format: str) -> str:
    """The name of how a layer's weight is stored."""
    named = {"nvfp4": "nvfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}
    return named.get(format, "float-quantized")


def _format_of(get: Any) -> str:
    for format in BLOCKS:
        if all(_plain(get(name)) == value for name, value in weight_args(format).items()):
            return format
    kept = {name: _plain(get(name)) for name in ("num_bits", "type", "symmetric", "strategy")}
    kept |= {name: get(name) for name in ("group_size", "block_structure", "dynamic")}
    _check.fail(_FROM, "scheme", f"of the weights of {', '.join(BLOCKS)}", kept)


def _plain(value: Any) -> Any:
    """An enum's value."""
    return getattr(value, "value", value)


def _divisor(op: str, g: Tensor) -> Tensor:
    """(1,) float32 S with 1 / S = g, rounded once."""
    found = (1.0 / g.double()).float()
    for candidate in (found, *(torch.nextafter(found, found * f) for f in (0.5, 2.0))):
        if torch.equal(torch.ones_like(g) / candidate, g):
            return candidate.reshape(1)
    raise ValueError(f"{op}: no float32 has the reciprocal {g.item()!r}")
