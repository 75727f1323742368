"""`attn_implementation="rlkern"`: attention of Hugging Face models over packed tokens and trees.

A call `model(input_ids, position_ids=..., **attending(how))` carries `how` down to every layer's
attention, also where a layer is computed again in the backward pass (gradient checkpointing). Calls
without it are computed by SDPA, with the masks that Hugging Face makes.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlkern.kv.pack import TreePack, plan_of
from rlkern.ops.shared_prefix_attention import shared_prefix_attention
from rlkern.ops.tree_attention import tree_attention

NAME = "rlkern"


class Attend(Protocol):
    """Attention of one layer over the packed tokens of a call."""

    def __call__(
        self,
        layer: int,
        query: Tensor,  # (T, Hq, D), rotated
        key: Tensor,  # (T, Hkv, D), rotated
        value: Tensor,  # (T, Hkv, D)
        scale: float,
        softcap: float | None,
    ) -> Tensor: ...  # (T, Hq, D)


def attending(how: Attend, longest: int | None = None) -> dict[str, Any]:
    """Arguments of a model's forward that make every layer attend by `how`.

    The tokens are one row: input_ids and position_ids (1, T). longest: no path has more tokens, so
    that layers with a sliding window of as many may see all of it; without it they are refused.
    """
    # A mask of four dimensions is taken as it is: none is made of T x T.
    mask = torch.empty(1, 1, 1, 1)
    return {"attend": how, "longest": longest, "attention_mask": mask, "use_cache": False}


def along_tree(subtree_end: Tensor | None, cu_seqlens: Tensor | None = None) -> Attend:
    """Attention with gradients over whole packs, as `tree_pack` lays them out."""

    def attend(layer, query, key, value, scale, softcap):
        return shared_prefix_attention(
            query, key, value, subtree_end, cu_seqlens=cu_seqlens, scale=scale, softcap=softcap
        )

    return attend


def as_decoded(pack: TreePack, chunk: int | None = None) -> Attend:
    """The same with the bits of decoding: each row adds up its path in the chunks of a cache.

    Along the tree the keys of one row are cut where its pack is, which is not where a cache of its
    path alone would be cut; `tree_attention` cuts every path alike, at multiples of `chunk`. The
    backward is that of `shared_prefix_attention`.
    """
    plan = plan_of(pack, chunk)

    def attend(layer, query, key, value, scale, softcap):
        tree = pack.subtree_end, pack.cu_seqlens
        return AsDecoded.apply(query, key, value, plan, *tree, scale, softcap or 0.0)

    return attend


class AsDecoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, subtree_end, cu_seqlens, scale, softcap):
        q, k, v = (x.contiguous() for x in (query, key, value))
        out, lse = tree_attention(
            q, k[:, None], v[:, None], plan, scale=scale, softcap=softcap or None
        )
        ctx.save_for_backward(q, k, v, out, lse, subtree_end, cu_seqlens)
        ctx.scalars = scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, *tree = ctx.saved_tensors
        run = torch.ops.rlkern.shared_prefix_attention_bwd
        grads = run(grad.contiguous(), None, q, k, v, out, lse, *tree, *ctx.scalars)
        return *grads, *(None,) * 5


def logit_options(model: nn.Module) -> dict[str, float]:
    """What the model does to its head's logits, as options of `rlkern.linear_logprob`."""
    config, options = model.config.get_text_config(), {}
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        options["softcap"] = cap
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if scale := getattr(config, name, None):
            options["logit_scale"] = scale
    if scaling := getattr(config, "logits_scaling", None):
        # Granite divides by it, HyperCLOVA X multiplies
        times = config.model_type == "hyperclovax"
        options["logit_scale"] = scaling if times else 1.0 / scaling
    return options


def install(model: nn.Module) -> None:
    """Switches `model` to it."""
    register()
    model.set_attn_implementation(NAME)


def register() -> None:
    """Makes the implementation known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    attend: Attend | None = None,
    longest: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: (B, H, T, D) query, key and value; returns (B, T, Hq, D)."""
    if attend is None:
        if softcap is not None:
            raise ValueError(f"{NAME}: a soft cap needs attend=..., which this call lacks")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"{NAME}: expected no dropout, got {dropout}")
    if sliding_window is not None and (longest is None or longest > sliding_window):
        what = f"{NAME}: expected no path longer than the sliding window of {sliding_window}"
        raise ValueError(f"{what}, got {longest or 'no `longest`'}")
    if len(query) != 1:
        raise ValueError(f"{NAME}: expected packed tokens as one row, got {len(query)} rows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(module.layer_idx, q, k, v, scale, softcap)[None], None
