"""Checkpoints of quantised models under the names that inference engines look for.

compressed-tensors  weight, weight_scale                                          of FP8
                    weight_packed, weight_scale, weight_global_scale = 1 / ours   of NVFP4
modelopt            weight, weight_scale (rows, 1, columns, 1)                    of FP8
                    weight, weight_scale, weight_scale_2 = ours                   of NVFP4
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlkern import _check
from rlkern.quant import compressed_tensors
from rlkern.quant.linear import QuantizedLinear, Recipe
from rlkern.quant.model import quantized_layers

_OP = "save_quantized"
FORMATS = ("compressed-tensors", "modelopt")
STORED_AS_MIXTRAL = ("mixtral",)
"""Model types whose checkpoints have other names than their modules in transformers."""


def save_quantized(
    model: nn.Module, folder: str | Path, format: str = "compressed-tensors"
) -> None:
    """Writes model.safetensors and a config.json that says how the weights are quantised.

    Args:
        model: a Hugging Face model from `quantize_model`. NVFP4 takes the recipe whose name the
            format has, "nvfp4-compressed-tensors" or "nvfp4-modelopt": both store what the other
            would have to round again.
        folder: made where it is missing; the tokenizer is the caller's to add.
        format: "compressed-tensors" (FP8 128x128 with dynamic 1x128 activations or none, FP8 row
            and tensor, NVFP4 weights) or "modelopt" (FP8 128x128 weights, NVFP4 weights).

    Raises:
        ValueError: a model without quantised layers, or a format that has no name for its recipe.
    """
    from safetensors.torch import save_file

    _check.one_of(_OP, "format", format, FORMATS)
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"{_OP}: expected a model with quantised layers, got none")
    recipe = next(iter(layers.values())).recipe
    if recipe.format == "nvfp4":
        wanted = format.replace("-", "_")
        if recipe.order != wanted:
            _check.fail(_OP, "recipe", f"'nvfp4-{format}' for {format}", repr(recipe.order or "te"))
    elif format == "modelopt" and (recipe.format != "fp8_block128" or recipe.activations):
        _check.fail(_OP, "recipe", "'fp8-weights' or 'nvfp4-modelopt' for modelopt", recipe)
    tensors = _tensors(model, layers, format)
    kept = [n for n, m in model.named_modules() if _is_kept(m) and n not in layers]
    if model.config.model_type in STORED_AS_MIXTRAL:
        tensors = {_mixtral(name): tensor for name, tensor in tensors.items()}
        kept = [_mixtral(name) for name in kept]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    how = _compressed_tensors(recipe, kept) if format == "compressed-tensors" else None
    config["quantization_config"] = how or _modelopt(recipe, kept)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if format == "modelopt":
        text = {"producer": {"name": "modelopt"}, "quantization": _modelopt_inner(recipe, kept)}
        (folder / "hf_quant_config.json").write_text(json.dumps(text, indent=1) + "\n")


def _is_kept(module: nn.Module) -> bool:
    """A linear layer, or a router: one in all but its class."""
    own = dict(module.named_parameters(recurse=False)).get("weight")
    return own is not None and own.ndim == 2 and not isinstance(module, nn.Embedding)


def _mixtral(name: str) -> str:
    """What Mixtral's checkpoints call a tensor or layer of its experts and their router."""
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = re.sub(rf"(\.mlp\.experts\.\d+)\.{ours}\b", rf"\1.{theirs}", name)
    return re.sub(r"\.mlp\.(experts|gate)\b", r".block_sparse_moe.\1", name)


def _tensors(
    model: nn.Module, layers: dict[str, QuantizedLinear], format: str
) -> dict[str, Tensor]:
    owned = {f"{n}.{part}" for n in layers for part in ("data", "scale", "global_scale", "bias")}
    tied = getattr(model, "_tied_weights_keys", None) or {}
    out = {}
    for name, value in model.state_dict().items():
        if name in owned or (name in tied and model.config.tie_word_embeddings):
            continue
        out[name] = value.detach().cpu().contiguous()
    for name, layer in layers.items():
        if format == "modelopt":
            named = {"weight": layer.data, "weight_scale": layer.scale}
            if layer.recipe.format == "nvfp4":
                named |= {"weight_scale_2": layer.global_scale}
            else:
                named["weight_scale"] = layer.scale[:, None, :, None]
        else:
            named = compressed_tensors.entries(_OP, layer.weight)
        if layer.bias is not None:
            named["bias"] = layer.bias
        out |= {f"{name}.{key}": t.detach().cpu().contiguous() for key, t in named.items()}
    return out


def _compressed_tensors(recipe: Recipe, kept: list[str]) -> dict[str, Any]:
    tokens = None
    if recipe.activations:
        tokens = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
        tokens |= {"strategy": "group", "group_size": 128}
    weights = compressed_tensors.weight_args(recipe.format)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens}
    return {
        "quant_method": "compressed-tensors",
        "format": compressed_tensors.compression(recipe.format),
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {"group_0": group},
    }


def _modelopt_inner(recipe: Recipe, kept: list[str]) -> dict[str, Any]:
    if recipe.format == "nvfp4":
        # "NVFP4" would have vLLM look for scales of activations, which nobody has written
        return {"quant_algo": "W4A16_NVFP4", "group_size": 16, "exclude_modules": kept}
    return {"quant_algo": "FP8_PB_WO", "exclude_modules": kept}


def _modelopt(recipe: Recipe, kept: list[str]) -> dict[str, Any]:
    inner = _modelopt_inner(recipe, kept)
    return {"quant_method": "modelopt", "ignore": inner.pop("exclude_modules"), **inner}
