"""What an engine takes from a model in training that is cut among processes or has adapters."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlkern._ranks import whole


def adapted(model: nn.Module) -> dict[str, Any]:
    """Its layers that have an adapter."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def dense_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight as if there were neither processes nor adapters: whole, and those merged in."""
    if isinstance(model, FSDPModule):
        model.reshard()
    layers = adapted(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight, layer = whole(parameter), layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            a, b = (whole(x["default"].weight).float() for x in (layer.lora_A, layer.lora_B))
            weight = torch.addmm(weight.float(), b, a, alpha=layer.scaling["default"])
        yield name.replace(".base_layer.", "."), weight
