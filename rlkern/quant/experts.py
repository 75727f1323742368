"""Experts of a mixture that a model keeps as parameters of three dimensions, quantised one by one.

Engines and checkpoints know each expert's gate_proj, up_proj and down_proj: so do the layers here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlkern.ops._quantized import QuantizedTensor
from rlkern.ops.quantized_linear import quantized_linear
from rlkern.quant.linear import QuantizedLinear, Recipe

_OP = "quantize_model"
STACKED = ("gate_up_proj", "down_proj")
"""(E, 2 I, H), of which the first I rows of an expert are gate's, and (E, H, I)."""


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is experts as of Qwen3-MoE and Mixtral in transformers from 5 on."""
    own = dict(module.named_parameters(recurse=False))
    return all(name in own and own[name].ndim == 3 for name in STACKED)


def check_stacked(name: str, experts: nn.Module) -> None:
    """Raises ValueError for experts whose layout or gating is another."""
    gate_up, down = (getattr(experts, n) for n in STACKED)
    gating = getattr(type(experts)._apply_gate, "__name__", "") if has_gating(experts) else ""
    usual = (
        gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
        and not getattr(experts, "is_transposed", False)
        and getattr(experts, "is_concatenated", True)
        and not getattr(experts, "has_post_expert_norm", False)
        and gating in ("", "_default_apply_gate")
        and len(list(experts.parameters())) == len(STACKED)
    )
    if not usual:
        raise ValueError(
            f"{_OP}: expected experts of a gate, an up and a down projection without bias, got "
            f"{type(experts).__name__} at {name}: name it in skip"
        )


def has_gating(experts: nn.Module) -> bool:
    return hasattr(type(experts), "_apply_gate")


def slices_of(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, (out, in) weight) of every expert's three layers."""
    for i, (both, last) in enumerate(zip(gate_up.unbind(), down.unbind())):
        gate, up = both.chunk(2)
        yield f"{prefix}.{i}.gate_proj.weight", gate
        yield f"{prefix}.{i}.up_proj.weight", up
        yield f"{prefix}.{i}.down_proj.weight", last


class _Experts(nn.Module):
    """y = sum over a token's experts of its weight times down(act(gate(x)) up(x))."""

    def __init__(self, num_experts: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn

    def expert(self, index: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k) and (T, k) -> (T, H). Experts add up in the order of their index."""
        chosen = top_k_index.flatten()
        # an index past the last stands for an expert of another rank
        counts = torch.bincount(chosen.clamp(max=self.num_experts), minlength=self.num_experts)
        counts = counts[: self.num_experts].tolist()
        order = chosen.argsort(stable=True)[: sum(counts)]
        token = order // top_k_index.shape[1]
        weight = top_k_weights.flatten()[order, None]
        out = torch.zeros_like(hidden_states)
        parts = zip(*(x.split(counts) for x in (token, hidden_states[token], weight)))
        for index, (rows, x, scale) in enumerate(parts):
            if len(rows):
                out.index_add_(0, rows, (self.expert(index, x) * scale).to(out.dtype))
        return out


class Expert(nn.Module):
    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj


class QuantizedExperts(_Experts):
    """Experts of `QuantizedLinear` layers, named <i>.gate_proj, <i>.up_proj and <i>.down_proj."""

    @classmethod
    def of(
        cls, experts: nn.Module, prefix: str, recipe: Recipe, amax: dict[str, Tensor]
    ) -> "QuantizedExperts":
        made = cls(experts.down_proj.shape[0], experts.act_fn)
        layers = []
        for name, w in slices_of(prefix, experts.gate_up_proj, experts.down_proj):
            q = recipe.quantize(w.detach(), amax.get(name))
            layers.append(QuantizedLinear(q, None, recipe))
        for i in range(made.num_experts):
            made.add_module(str(i), Expert(*layers[3 * i : 3 * i + 3]))
        return made.train(experts.training)

    def expert(self, index: int, x: Tensor) -> Tensor:
        own = self.get_submodule(str(index))
        return own.down_proj(self.act_fn(own.gate_proj(x)) * own.up_proj(x))


class MasterExperts(_Experts):
    """Experts that train their own parameters through the codes, as `MasterLinear` does.

    The forward is that of `QuantizedExperts` on the codes of the present weights, bit for bit.
    """

    @classmethod
    def of(cls, experts: nn.Module, recipe: Recipe) -> "MasterExperts":
        """Takes over the experts' own parameters."""
        made = cls(experts.down_proj.shape[0], experts.act_fn)
        made.gate_up_proj, made.down_proj = experts.gate_up_proj, experts.down_proj
        made.recipe, made._held = recipe, None
        return made.train(experts.training)

    def quantized(self) -> list[QuantizedTensor]:
        """gate, up and down of each expert."""
        stacked = (self.gate_up_proj, self.down_proj)
        version = tuple((w.data_ptr(), w._version) for w in stacked)
        if self._held is None or self._held[0] != version:
            found = [self.recipe.quantize(w.detach()) for _, w in slices_of("", *stacked)]
            self._held = (version, found)
        return self._held[1]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # one view of all experts, whose gradients autograd stacks once
        self._masters = [w for _, w in slices_of("", self.gate_up_proj, self.down_proj)]
        try:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        finally:
            self._masters = None

    def expert(self, index: int, x: Tensor) -> Tensor:
        codes, masters = self.quantized(), self._masters

        def layer(place: int, x: Tensor) -> Tensor:
            at = 3 * index + place
            how = {"activations": self.recipe.activations, "master": masters[at]}
            return quantized_linear(x, codes[at], None, **how)

        return layer(2, self.act_fn(layer(0, x)) * layer(1, x))
