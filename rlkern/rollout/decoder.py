"""A Hugging Face causal LM called on packed tokens, with attention of our own.

A decode step of few rows is bound by the number of calls, most of which the modules of transformers
make around their mathematics. For the families that share the layout of Llama, `Decoder` makes the
same calls of torch in the same order from the same modules' weights, leaves the rest out, and takes
norms and rotations from `rms_norm`. All other models go through their own forward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkern.kv import hf
from rlkern.ops.rms_norm import reference

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# rotations that depend on the position alone
ROTATIONS = ("default", "linear", "llama3", "yarn")


class Decoder:
    """Logits of packed tokens.

    Args:
        positions: how many there can be.
        direct: False goes through the model's own forward even where its layout is known.
        exact: the bits of the model's own forward: means are added up as torch does.
    """

    def __init__(
        self, model: PreTrainedModel, positions: int, *, direct: bool = True, exact: bool = False
    ) -> None:
        self.model, self.positions = model, positions
        self.direct = direct and is_direct(model)
        if self.direct:
            base = model.base_model
            at = torch.arange(positions, device=model.device)[None]
            tables = base.rotary_emb(torch.empty((), dtype=model.dtype, device=model.device), at)
            half = tables[0].shape[-1] // 2
            self.cos, self.sin = (table[0, :, :half].float() for table in tables)
            exact |= model.dtype == torch.float64
            self.norm = reference.forward if exact else torch.ops.rlkern.rms_norm.default
            self.layers = [Layer(layer, self.norm) for layer in base.layers]

    def __call__(
        self, tokens: Tensor, positions: Tensor, rows: Tensor, attend: hf.Attend, hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """-> logits of these rows and, if asked for, their last hidden states."""
        if self.direct:
            state = self._hidden(tokens, positions, attend)[rows]
            return self.model.lm_head(state), state if hidden else None
        out = self.model(
            input_ids=tokens[None].long(),
            position_ids=positions[None].long(),
            logits_to_keep=rows,
            output_hidden_states=hidden,
            **hf.attending(attend, self.positions),
        )
        return out.logits[0], out.hidden_states[-1][0, rows] if hidden else None

    def _hidden(self, tokens: Tensor, positions: Tensor, attend: hf.Attend) -> Tensor:
        base = self.model.base_model
        x = base.embed_tokens(tokens)
        cos, sin = self.cos[positions], self.sin[positions]
        for index, layer in enumerate(self.layers):
            x = layer(index, x, cos, sin, attend)
        return self.norm(x, *weight_of(base.norm), None, None)


class Layer:
    """A decoder layer: norm, attention, norm, gated MLP, with a residual around each half."""

    def __init__(self, layer: nn.Module, norm: Callable[..., Tensor]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm = norm
        self.norms = weight_of(layer.input_layernorm), weight_of(layer.post_attention_layernorm)
        self.q_norm = weight_of(getattr(attention, "q_norm", None))
        self.k_norm = weight_of(getattr(attention, "k_norm", None))
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.q, self.k, self.v, self.o = (linear(getattr(attention, name)) for name in names)
        names = ("gate_proj", "up_proj", "down_proj")
        self.gate, self.up, self.down = (linear(getattr(mlp, name)) for name in names)
        self.width, self.scale = attention.head_dim, attention.scaling

    def __call__(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        norm, heads = self.norm, (len(x), -1, self.width)
        h = norm(x, *self.norms[0], None, None)
        q = norm(self.q(h).view(heads), *self.q_norm, cos, sin)
        k = norm(self.k(h).view(heads), *self.k_norm, cos, sin)
        out = attend(index, q, k, self.v(h).view(heads), self.scale, None)
        x = x + self.o(out.flatten(1))
        h = norm(x, *self.norms[1], None, None)
        return x + self.down(F.silu(self.gate(h)).mul_(self.up(h)))


def is_direct(model: PreTrainedModel) -> bool:
    """Whether the model is laid out as Llama is, and nothing listens at its modules."""
    config, base = model.config, model.base_model
    if config.model_type not in FAMILIES or getattr(config, "hidden_act", "") != "silu":
        return False
    if getattr(base.rotary_emb, "rope_type", None) not in ROTATIONS:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module without the cost of calling it, where it is a plain linear layer."""
    if type(module) is not nn.Linear:
        return module
    return partial(F.linear, weight=module.weight, bias=module.bias)


def weight_of(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    """Arguments of `rms_norm`."""
    return (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
