"""torchtitan's RL experiment: a loss for its Python config. docs/integrations/torchtitan.md.

from rlkern.integrations.torchtitan import policy_loss_class
PolicyLoss = policy_loss_class()
PolicyTrainer.Config(loss=PolicyLoss.Config(objective="minpro"), ...)
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import rlkern
from rlkern import PolicyObjective, _check
from rlkern._peers import Peer
from rlkern.integrations._objective import aggregated, build

TORCHTITAN = Peer("torchtitan", "as of August 2026")
_OP = "integrations.torchtitan"


def policy_loss_class() -> type:
    """A BaseLoss of torchtitan, called as its DAPOLoss.

    Raises:
        RuntimeError: torchtitan is missing, or calls its losses otherwise.
    """
    base = TORCHTITAN.resolve(_OP, "torchtitan.components.loss.BaseLoss")
    TORCHTITAN.takes(
        _OP,
        "torchtitan.experiments.rl.losses.dapo.DAPOLoss.__call__",
        (
            *("self", "logits", "labels", "global_valid_tokens", "generator_logprobs"),
            *("advantages", "loss_mask"),
        ),
    )
    wanted = ("logits", "labels", "return_entropy")
    logprobs = TORCHTITAN.takes(_OP, "torchtitan.components.loss.compute_logprobs", wanted)

    class PolicyLoss(base):
        """Any preset whose loss of a token does not depend on where sequences begin and end.

        The ratio is to generator_logprobs; tokens where they are not finite do not count.
        """

        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            objective: str = "dapo"
            fields: dict[str, Any] = field(default_factory=dict)
            """Of PolicyObjective, in place of the preset's."""

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            del compile_config
            self.objective = token_objective(config.objective, config.fields)

        def __call__(
            self,
            logits: Tensor,
            labels: Tensor,
            global_valid_tokens: float | None = None,
            *,
            generator_logprobs: Tensor,
            advantages: Tensor,
            loss_mask: Tensor,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            if type(logits) is Tensor:
                out = rlkern.logprob_from_logits(logits, labels, outputs=("logprob", "entropy"))
                logprob, entropy = out.logprob, out.entropy
            else:
                # a DTensor of a vocabulary in parts
                logprob, entropy = logprobs(logits, labels, return_entropy=True)
            mask = loss_mask & generator_logprobs.isfinite()
            sampled = generator_logprobs[None]
            loss, metrics = rlkern.policy_loss(
                logprob[None],
                sampled,
                advantages[None],
                mask=mask[None],
                objective=self.objective,
                rollout_logprob=sampled if self.objective.needs_rollout else None,
                entropy=entropy[None].detach(),
            )
            total = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
            loss, share = loss / total, metrics["num_tokens"] / total
            names = {
                "loss/ratio_mean": "ratio_mean",
                "loss/ratio_clipped_frac": "pg_clipfrac",
                "trainer/entropy/mean": "entropy",
            }
            logged = {theirs: metrics[ours] * share for theirs, ours in names.items()}
            logged["bit_wise/logprob_diff/mean"] = -metrics["ppo_kl"] * share
            return loss, {"loss/mean": loss.detach(), **logged}

    return PolicyLoss


def token_objective(name: str, fields: dict[str, Any]) -> PolicyObjective:
    objective = build(_OP, name, {}, fields, ("rollout_logprob",))
    objective = aggregated(objective, "token-sum")
    if objective.needs_sequences:
        reason = "whose loss of a token depends on that token alone (torchtitan passes no bounds)"
        _check.fail(_OP, "an objective", reason, repr(name))
    return objective
