"""Hugging Face models with `attn_implementation="rlkern"`: packed tokens that attend along a tree.

    hf.install()                                       # before the model is made; once is enough
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="rlkern")
    with hf.training(pack.subtree_end, pack.cu_seqlens):
        hidden = model.base_model(input_ids=pack.ids[None], position_ids=pack.positions[None])
        ...
        loss.backward()                                # inside too where layers are recomputed

One function is registered. It hands packed queries, keys and values to the `Attention` in force,
which `using` sets; without one the model attends as with "sdpa", so that the same model also runs
on padded batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from rlkern.ops.shared_prefix_attention import shared_prefix_attention

NAME = "rlkern"


class Attention(Protocol):
    """What the layers of a model call while it is in force."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """q (T, Hq, D), k and v (T, Hkv, D) of packed tokens, positions applied -> (T, Hq, D)."""


# Of the process, not of the context: autograd recomputes checkpointed layers in its own threads.
_in_force: list[Attention] = []


@contextmanager
def using(attention: Attention) -> Iterator[None]:
    """Models with this implementation attend with it; the innermost one counts."""
    _in_force.append(attention)
    try:
        yield
    finally:
        _in_force.pop()


class Training(NamedTuple):
    """Attention over whole packs, with gradients: see `shared_prefix_attention`."""

    subtree_end: Tensor | None
    cu_seqlens: Tensor | None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        return shared_prefix_attention(
            q, k, v, self.subtree_end, cu_seqlens=self.cu_seqlens, scale=scale, softcap=softcap
        )


def training(subtree_end: Tensor | None, cu_seqlens: Tensor | None = None) -> Any:
    """A context in which models attend along the tree of `subtree_end`, in packs of cu_seqlens."""
    return using(Training(subtree_end, cu_seqlens))


def install() -> None:
    """Registers "rlkern" with transformers; again is no different from once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query (1, Hq, T, D) -> (1, T, Hq, D)."""
    if not _in_force:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, **kwargs
        )
    for what, asked in (
        ("dropout", dropout > 0),
        ("a sliding window", kwargs.get("sliding_window") is not None),
        ("attention sinks", kwargs.get("s_aux") is not None),
        ("attention that is not causal", not getattr(module, "is_causal", True)),
        ("a batch that is not packed into one row", query.shape[0] != 1),
    ):
        if asked:
            raise ValueError(f'attn_implementation="{NAME}" does not support {what}')
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return _in_force[-1].attend(module.layer_idx, q, k, v, scale, softcap)[None], None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None while an `Attention` is in force: it knows by itself who sees whom."""
    if _in_force:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)
