"""Which layers of a model are quantised, and which of them share a global scale."""

from collections.abc import Iterator
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from rlkern.quant.experts import (
    MasterExperts,
    QuantizedExperts,
    check_stacked,
    is_stacked,
    slices_of,
)
from rlkern.quant.linear import MasterLinear, QuantizedLinear, Recipe, find_recipe

_OP = "quantize_model"
SKIP = ("lm_head", "*embed*", "*norm*", "*router*", "gate")
"""Patterns of a part of a module's name: the head, embeddings, norms and routers stay."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers under one parent that engines fuse into one, with one global scale for all."""


def quantize_model(
    model: nn.Module,
    recipe: str | Recipe = "fp8",
    *,
    skip: tuple[str, ...] = SKIP,
    trains: bool = False,
) -> nn.Module:
    """Replaces the linear layers of a model by quantised ones, in place.

    Experts that are parameters of three dimensions (transformers' Qwen3-MoE, Mixtral and others)
    are quantised one by one, in a `QuantizedExperts` whose layers have the names of checkpoints,
    `<experts>.<i>.gate_proj` and so on.

    Args:
        model: with nn.Linear layers.
        recipe: "fp8" (128x128 weights, 1x128 activations), "fp8-weights", "fp8-row", "fp8-tensor",
            "nvfp4" and its orders "nvfp4-compressed-tensors" and "nvfp4-modelopt", or a `Recipe`.
        skip: a layer stays where a part of its name, split at the dots, matches one of these.
        trains: keep the weights as masters and train them through their codes (`MasterLinear`,
            FP8 alone); otherwise codes are all that is left (`QuantizedLinear`).

    Returns:
        model. q, k and v have one NVFP4 global scale (or FP8 tensor scale), and gate and up: an
        engine that fuses them keeps a single one.

    Raises:
        ValueError: an unknown recipe, a model where no layer would be quantised, or stacked
            experts of another layout (transposed, interleaved, with biases or another gating).
    """
    recipe = find_recipe(_OP, recipe)
    if trains and recipe.shares_amax:
        raise ValueError(f"{_OP}: expected a recipe without a global scale to train, got {recipe}")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {name: module for name, module in linears.items() if not is_skipped(name, skip)}
    stacked = {name: module for name, module in model.named_modules() if is_stacked(module)}
    stacked = {name: module for name, module in stacked.items() if not is_skipped(name, skip)}
    if not chosen and not stacked:
        raise ValueError(
            f"{_OP}: expected layers to quantise, got none: {len(linears)} linear layers, skip = "
            f"{skip}"
        )
    weights = {f"{n}.weight": m.weight for n, m in chosen.items()}
    for name, experts in stacked.items():
        check_stacked(name, experts)
        weights |= slices_of(name, experts.gate_up_proj, experts.down_proj)
    amax = shared_amax(weights, recipe)
    for name, linear in chosen.items():
        if trains:
            made = MasterLinear.of(linear, recipe)
        else:
            q = recipe.quantize(linear.weight, amax.get(f"{name}.weight"))
            made = QuantizedLinear(q, linear.bias, recipe)
            made.train(linear.training)
        _replace(model, name, made)
    for name, experts in stacked.items():
        if trains:
            made = MasterExperts.of(experts, recipe)
        else:
            made = QuantizedExperts.of(experts, name, recipe, amax)
        _replace(model, name, made)
    return model


def _replace(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, made)


def is_skipped(name: str, skip: tuple[str, ...]) -> bool:
    return any(fnmatch(part, pattern) for part in name.split(".") for pattern in skip)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def quantized_experts(model: nn.Module) -> Iterator[tuple[str, QuantizedExperts]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            yield name, module


def fused_group(name: str) -> str:
    """The same for weights whose layers an engine fuses."""
    *parent, layer, _weight = name.split(".")
    for group in FUSED:
        if layer in group:
            return ".".join([*parent, "+".join(group)])
    return name


@torch.no_grad()
def shared_amax(weights: dict[str, Tensor], recipe: Recipe, group=None) -> dict[str, Tensor]:
    """() float32 max |w| by name, over fused layers and over the ranks of a process group.

    Empty for formats whose scales are of blocks alone.
    """
    if not recipe.shares_amax or not weights:
        return {}
    index: dict[str, int] = {}
    most: list[Tensor] = []
    for name, w in weights.items():
        # by the two ends: no tensor of magnitudes
        low, high = torch.aminmax(w) if w.numel() else (w.new_zeros(()), w.new_zeros(()))
        amax = torch.maximum(low.abs(), high.abs()).float()
        at = index.setdefault(fused_group(name), len(most))
        if at == len(most):
            most.append(amax)
        else:
            most[at] = torch.maximum(most[at], amax)
    stacked = torch.stack(most)
    if group is not None:
        torch.distributed.all_reduce(stacked, torch.distributed.ReduceOp.MAX, group)
    # a copy each: the quantisers take () tensors that start where their storage does
    return {name: stacked[index[fused_group(name)]].clone() for name in weights}
