"""AReaL: its log-prob functions and its actor's loss. docs/integrations/areal.md."""

from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern import PolicyObjective
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle
from rlkern.integrations._head import from_logits
from rlkern.integrations._objective import aggregated, build

AREAL = Peer("areal", "as of May 2026")
_HANDLE = Handle()
_OP = "integrations.areal"
_PARALLEL = "areal.utils.functional.vocab_parallel"
_LOSS = "areal.utils.functional.functional.ppo_actor_loss_fn"
_CALL = ("logits", "labels", "temperature", "tp_group", "chunk_size")
_LOSS_CALL = (
    *("logprobs", "proximal_logprobs", "old_logprobs", "advantages", "eps_clip", "loss_mask"),
    *("eps_clip_higher", "c_clip", "rejection_sampling", "importance_sampling_level"),
    "cu_seqlens",
)


def enable(objective: str | None = None, **fields: Any) -> Handle:
    """gather_logprobs, gather_logprobs_entropy and ppo_actor_loss_fn are rlkern's in AReaL.

    With a vocabulary in parts (tp_group of several ranks), and with rejection_sampling, the call is
    AReaL's own function's.

    Args:
        objective: a preset in place of AReaL's loss; None: its own, by the options of the call.
        fields: of PolicyObjective, with a preset.

    Raises:
        RuntimeError: AReaL is missing, or its functions have other parameters; nothing has been
            replaced.
    """
    if _HANDLE.enabled:
        return _HANDLE
    if objective is not None:
        _preset(objective, fields)
    alone = AREAL.takes(_OP, f"{_PARALLEL}.gather_logprobs", _CALL)
    both = AREAL.takes(_OP, f"{_PARALLEL}.gather_logprobs_entropy", _CALL)
    loss = AREAL.takes(_OP, _LOSS, _LOSS_CALL)

    def gather_logprobs(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024):
        if _several(tp_group):
            return alone(logits, labels, temperature, tp_group, chunk_size)
        return from_logits(logits, labels, temperature=temperature).logprob

    def gather_logprobs_entropy(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024):
        if _several(tp_group):
            return both(logits, labels, temperature, tp_group, chunk_size)
        outputs = ("logprob", "entropy")
        out = from_logits(logits, labels, temperature=temperature, outputs=outputs)
        return out.logprob, out.entropy

    def actor_loss(*args, **kwargs):
        call = dict(zip(_LOSS_CALL, args)) | kwargs
        if call.get("rejection_sampling") is not None:
            return loss(**call)
        call.pop("rejection_sampling", None)
        return ppo_actor_loss_fn(**call, objective=objective, fields=fields)

    _HANDLE.replace(
        "areal", (alone, gather_logprobs), (both, gather_logprobs_entropy), (loss, actor_loss)
    )
    return _HANDLE


def _several(group: Any) -> bool:
    return group is not None and torch.distributed.get_world_size(group) > 1


def ppo_actor_loss_fn(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
    *,
    objective: str | None = None,
    fields: dict[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """AReaL's actor loss, or a preset, of (B, L) or packed (T,) tensors: a mean over tokens.

    Returns:
        loss, and statistics of tokens: `loss` is the mean loss at every token, whose masked mean is
        what AReaL logs; `importance_weight` and `approx_kl` are of tokens whatever the level.
    """
    if objective is None:
        high = eps_clip if eps_clip_higher is None else eps_clip_higher
        chosen = PolicyObjective(
            epsilon_low=eps_clip,
            epsilon_high=high,
            clip_ratio_c=c_clip,
            importance_sampling_level=importance_sampling_level,
            log_ratio_clamp=None,
        )
    else:
        chosen = _preset(objective, fields or {})
    if logprobs.ndim == 1 and cu_seqlens is None and chosen.needs_sequences:
        raise ValueError(f"{_OP}: expected cu_seqlens with {chosen}, got None")
    tensors = (logprobs, proximal_logprobs, old_logprobs, advantages)
    mask = loss_mask.bool()
    if logprobs.ndim == 1:
        # AReaL packs prompts too: sequences are padded, so that a mask may have holes
        tensors, padded = _rows(cu_seqlens, *tensors), _rows(cu_seqlens, mask)[0]
    else:
        padded = mask
    loss, _ = rlkern.policy_loss(
        tensors[0],
        tensors[1],
        tensors[3],
        mask=padded,
        objective=chosen,
        rollout_logprob=tensors[2] if chosen.needs_rollout else None,
    )
    with torch.no_grad():
        gap = torch.where(mask, logprobs - proximal_logprobs, 0.0)
        ratio = torch.where(mask, gap.exp(), 0.0)
        low, high = 1 - (chosen.epsilon_low or 1.0), 1 + (chosen.epsilon_high or float("inf"))
        outside = torch.where(advantages > 0, ratio > high, ratio < low) & mask
        capped = torch.zeros_like(mask)
        if chosen.clip_ratio_c is not None:
            capped = (ratio > chosen.clip_ratio_c) & (advantages < 0) & mask
        stat = {
            "loss": loss.detach().expand_as(logprobs),
            "importance_weight": ratio,
            "approx_kl": gap,
            "clip_mask": outside,
            "dual_clip_mask": capped,
        }
    return loss, stat


def _preset(name: str, fields: dict[str, Any]) -> PolicyObjective:
    return aggregated(build(_OP, name, {}, fields, ("rollout_logprob",)), "token-mean")


def _rows(cu_seqlens: Tensor | None, *packed: Tensor) -> list[Tensor]:
    if cu_seqlens is None:
        return [x[None] for x in packed]
    lengths = cu_seqlens.diff().tolist()
    parts = ([*x.split(lengths)] for x in packed)
    return [torch.nn.utils.rnn.pad_sequence(p, batch_first=True) for p in parts]
