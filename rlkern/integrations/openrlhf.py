"""OpenRLHF: its log-prob functions and its PolicyLoss. docs/integrations/openrlhf.md."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rlkern
from rlkern import PolicyObjective, _check
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle
from rlkern.integrations._head import from_logits
from rlkern.integrations._objective import build

OPENRLHF = Peer("openrlhf", "as of August 2026")
_HANDLE = Handle()
_OP = "integrations.openrlhf"
_UTILS = "openrlhf.models.utils"
_INIT = (
    *("clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss", "policy_loss_type"),
    *("enable_vllm_is_correction", "vllm_is_truncated_threshold", "vllm_is_correction_type"),
)
_FORWARD = (
    *("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs"),
    *("dp_size", "batch_num_tokens", "global_batch_size"),
)


def enable(objective: str | None = None, **fields: Any) -> Handle:
    """log_probs_from_logits, compute_entropy and PolicyLoss are rlkern's, for actors made later.

    Args:
        objective: a preset in place of OpenRLHF's loss; None: its own, by its options.
        fields: of PolicyObjective, with a preset.

    Raises:
        RuntimeError: OpenRLHF is missing, or its functions have other parameters; nothing has been
            replaced.
        ValueError, TypeError: an unknown preset or field.
    """
    if _HANDLE.enabled:
        return _HANDLE
    if objective is not None:
        _preset(objective, fields)
    swaps = [
        (
            OPENRLHF.takes(_OP, f"{_UTILS}.log_probs_from_logits", _LOGPROBS),
            log_probs_from_logits,
        ),
        (OPENRLHF.takes(_OP, f"{_UTILS}.compute_entropy", ("logits",)), compute_entropy),
    ]
    theirs = OPENRLHF.takes(_OP, "openrlhf.models.loss.PolicyLoss", _INIT)
    OPENRLHF.takes(_OP, "openrlhf.models.loss.PolicyLoss.forward", _FORWARD)

    class Chosen(PolicyLoss):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, objective=objective, fields=fields)

    _HANDLE.replace("openrlhf", *swaps, (theirs, Chosen))
    return _HANDLE


_LOGPROBS = ("logits", "labels", "temperature")


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """float32, shape of labels; logits are not divided in place, as OpenRLHF's are."""
    return from_logits(logits, labels, temperature=temperature).logprob


def compute_entropy(logits: Tensor) -> Tensor:
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return from_logits(logits, targets, outputs=("entropy",)).entropy


class PolicyLoss(nn.Module):
    """Made and called as openrlhf.models.loss.PolicyLoss.

    objective, fields: a preset in place of the loss that the other options name; the averages and
    OpenRLHF's global counts stay.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: Sequence[float] | None = None,
        vllm_is_correction_type: str = "tis",
        *,
        objective: str | None = None,
        fields: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check.one_of(_OP, "policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        self.per_token = token_level_loss and policy_loss_type != "gspo"
        mode = "token-mean" if self.per_token else "seq-mean-token-mean"
        chosen: dict[str, Any] = {"loss_agg_mode": mode}
        corrects = enable_vllm_is_correction
        if objective is not None:
            self.objective = _preset(objective, {**(fields or {}), **chosen})
            return
        if policy_loss_type == "gspo":
            chosen |= {"importance_sampling_level": "sequence", "log_ratio_clamp": None}
            # without a clamp, and to the rollout's log-probs where those are used
            chosen["ratio_anchor"] = "rollout" if corrects else "old"
        elif corrects:
            _check.one_of(
                *(_OP, "vllm_is_correction_type", vllm_is_correction_type, ("tis", "icepop"))
            )
            low, high = vllm_is_truncated_threshold
            chosen |= {
                "rollout_is": "token",
                "rollout_is_mode": "mask" if vllm_is_correction_type == "icepop" else "truncate",
                "rollout_is_low": low,
                "rollout_is_threshold": high,
            }
        self.objective = PolicyObjective(
            epsilon_low=clip_eps_low, epsilon_high=clip_eps_high, clip_ratio_c=dual_clip, **chosen
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(loss, clip_ratio, ppo_kl, vllm_kl)."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        mask = mask.bool()
        count = batch_num_tokens if self.per_token else global_batch_size
        loss, metrics = rlkern.policy_loss(
            log_probs,
            old_log_probs,
            advantages.expand_as(log_probs),
            mask=mask,
            objective=self.objective,
            rollout_logprob=rollout_log_probs if self.objective.needs_rollout else None,
            normalizer=count,
        )
        loss = loss if count is None else loss * dp_size
        vllm_kl = None
        if self.objective.rollout_is is not None:
            gap = torch.where(mask, rollout_log_probs - old_log_probs, 0.0).sum()
            vllm_kl = gap / metrics["num_tokens"]
        return loss, metrics["pg_clipfrac"], metrics["ppo_kl"], vllm_kl


def _preset(name: str, fields: dict[str, Any]) -> PolicyObjective:
    return build(_OP, name, {}, fields, ("rollout_logprob",))
