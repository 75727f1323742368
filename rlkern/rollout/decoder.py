"""A Hugging Face causal LM called on packed tokens, with attention of our own.

A decode step of few rows is bound by the number of calls, most of which the modules of transformers
make around their mathematics. For the families that share the layout of Llama, `Decoder` makes the
same calls of torch in the same order, so with the same bits, from the same modules' weights, and
leaves the rest out. All other models go through their own forward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkern.kv import hf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# rotations that depend on the position alone
ROTATIONS = ("default", "linear", "llama3", "yarn")


class Decoder:
    """Logits of packed tokens; `positions`: how many there can be."""

    def __init__(self, model: PreTrainedModel, positions: int, direct: bool = True) -> None:
        self.model, self.positions = model, positions
        self.direct = direct and is_direct(model)
        if self.direct:
            base = model.base_model
            at = torch.arange(positions, device=model.device)[None]
            tables = base.rotary_emb(torch.empty((), dtype=model.dtype, device=model.device), at)
            self.cos, self.sin = (table[0] for table in tables)
            self.layers = [Layer(layer) for layer in base.layers]

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
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        for index, layer in enumerate(self.layers):
            x = layer(index, x, cos, sin, attend)
        return rms_norm(x, base.norm)


class Layer:
    """A decoder layer: norm, attention, norm, gated MLP, with a residual around each half."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.q, self.k, self.v, self.o = (linear(getattr(attention, name)) for name in names)
        names = ("gate_proj", "up_proj", "down_proj")
        self.gate, self.up, self.down = (linear(getattr(mlp, name)) for name in names)
        self.width, self.scale = attention.head_dim, attention.scaling

    def __call__(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        h = rms_norm(x, self.norms[0])
        q = self.q(h).view(len(x), -1, self.width)
        k = self.k(h).view(len(x), -1, self.width)
        v = self.v(h).view(len(x), -1, self.width)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm), rms_norm(k, self.k_norm)
        q, k = rotated(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
        x = x + self.o(attend(index, q, k, v, self.scale, None).flatten(1))
        h = rms_norm(x, self.norms[1])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


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
    return lambda x: F.linear(x, module.weight, module.bias)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """As LlamaRMSNorm: float32 inside, rounded before the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * wide.to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As apply_rotary_pos_emb, for (T, heads, D)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
