"""A Hugging Face causal LM called on packed tokens, with attention of our own.

A decode step of few rows is bound by the number of calls, most of which the modules of transformers
make around their mathematics. For the families that share the layout of Llama, `Decoder` makes the
same calls of torch in the same order from the same modules' weights, leaves the rest out, and takes
norms and rotations from `rms_norm`; on the CPU a layer is one call into C++. All other models go
through their own forward.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkern.kv import Work, hf
from rlkern.ops.rms_norm import reference
from rlkern.ops.tree_attention import TreePlan
from rlkern.rollout import layer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# rotations that depend on the position alone
ROTATIONS = ("default", "linear", "llama3", "yarn")


class Attend:
    """Writes keys and values to the layers of a cache, and reads along a plan: an hf.Attend."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], work: Work, plan: TreePlan) -> None:
        self.layers, self.work, self.plan = layers, work, plan

    def __call__(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        k, v = self.layers[index]
        # the cache made slots and plan: checks of every layer's arguments would find nothing
        write, read = torch.ops.rlkern.write_kv.default, torch.ops.rlkern.tree_attention.default
        write(key.contiguous(), value.contiguous(), self.work.slots, k, v, None, None)
        return read(query.contiguous(), k, v, *self.plan, scale, softcap or 0.0)[0]


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
            norm = reference.forward if exact else torch.ops.rlkern.rms_norm.default
            native = layer.NATIVE and model.device.type == "cpu" and not exact
            self.layers = [Layer(one, norm, native) for one in base.layers]
            self.norm, self.last_norm = norm, weight_of(base.norm)
            self.head = linear(model.lm_head, native)
            self.embed = base.embed_tokens
            if type(self.embed) is nn.Embedding and self.embed.max_norm is None:
                self.embed = partial(F.embedding, weight=self.embed.weight)

    def __call__(
        self, work: Work, rows: Tensor | None, attend: Attend, hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """-> logits of these rows, or of all, and, if asked for, their last hidden states."""
        if self.direct:
            state = self._hidden(work, rows, attend)
            return self.head(state), state if hidden else None
        out = self.model(
            input_ids=work.tokens[None].long(),
            position_ids=work.positions[None].long(),
            logits_to_keep=0 if rows is None else rows,
            output_hidden_states=hidden,
            **hf.attending(attend, self.positions),
        )
        if not hidden:
            return out.logits[0], None
        state = out.hidden_states[-1][0]
        return out.logits[0], state if rows is None else state[rows]

    def _hidden(self, work: Work, rows: Tensor | None, attend: Attend) -> Tensor:
        x = self.embed(work.tokens)
        cos, sin = (table.index_select(0, work.positions) for table in (self.cos, self.sin))
        for index, one in enumerate(self.layers):
            x = one(index, x, cos, sin, attend)
        x = x if rows is None else x[rows]
        return self.norm(x, *self.last_norm, None, None)


class Layer:
    """A decoder layer's weights, and who computes it."""

    def __init__(self, module: nn.Module, norm: Callable[..., Tensor], native: bool) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.norm = norm
        norms = module.input_layernorm, module.post_attention_layernorm
        heads = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.norms = tuple(weight_of(one) for one in (*norms, *heads))
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        linears = [getattr(attention, name) for name in names]
        linears += [getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
        self.linears = [linear(one, native) for one in linears]
        self.width, self.scale = attention.head_dim, attention.scaling
        self.weights = None
        eps = {eps for weight, eps in self.norms if weight is not None}
        if native and len(eps) == 1 and all(type(one) is nn.Linear for one in linears):
            weights = [one.weight for one in linears], [one.bias for one in linears]
            self.weights = *(weight for weight, _ in self.norms), *eps, *weights[0], *weights[1]

    def __call__(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.weights is not None:
            cache, plan = (attend.work.slots, *attend.layers[index]), attend.plan
            run = torch.ops.rlkern.decoder_layer.default
            return run(x, *self.weights, cos, sin, *cache, *plan, self.scale)

        def read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(index, query, key, value, self.scale, None)

        return layer.compute(x, self.norm, self.norms, self.linears, self.width, cos, sin, read)


def is_direct(model: PreTrainedModel) -> bool:
    """Whether the model is laid out as Llama is, and nothing listens at its modules."""
    config, base = model.config, model.base_model
    if config.model_type not in FAMILIES or getattr(config, "hidden_act", "") != "silu":
        return False
    if getattr(base.rotary_emb, "rope_type", None) not in ROTATIONS:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def linear(module: nn.Module, native: bool) -> Callable[[Tensor], Tensor]:
    """The module without the cost of calling it, where it is a plain linear layer."""
    if type(module) is not nn.Linear:
        return module
    run = torch.ops.rlkern.decoder_linear.default if native else F.linear
    weight, bias = module.weight, module.bias
    return lambda x: run(x, weight, bias)


def weight_of(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    """Arguments of `rms_norm`."""
    return (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
