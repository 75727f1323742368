"""`attn_implementation="rlkern"`: attention of Hugging Face models over packed tokens and trees.

A call `model(input_ids, position_ids=..., **attending(how))` carries `how` down to every layer's
attention, also where a layer is computed again in the backward pass (gradient checkpointing). Calls
without it are computed by SDPA, with the masks that Hugging Face makes.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlkern.ops.shared_prefix_attention import shared_prefix_attention

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


def attending(how: Attend) -> dict[str, Any]:
    """Arguments of a model's forward that make every layer attend by `how`.

    The tokens are one row: input_ids and position_ids (1, T).
    """
    # A mask of four dimensions is taken as it is: none is made of T x T.
    return {"attend": how, "attention_mask": torch.empty(1, 1, 1, 1), "use_cache": False}


def along_tree(subtree_end: Tensor | None, cu_seqlens: Tensor | None = None) -> Attend:
    """Attention with gradients over whole packs, as `tree_pack` lays them out."""

    def attend(layer, query, key, value, scale, softcap):
        return shared_prefix_attention(
            query, key, value, subtree_end, cu_seqlens=cu_seqlens, scale=scale, softcap=softcap
        )

    return attend


def install(model: nn.Module) -> None:
    """Registers the implementation and switches `model` to it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


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
    if sliding_window is not None:
        raise ValueError(f"{NAME}: expected no sliding window, got {sliding_window}")
    if len(query) != 1:
        raise ValueError(f"{NAME}: expected packed tokens as one row, got {len(query)} rows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(module.layer_idx, q, k, v, scale, softcap)[None], None
