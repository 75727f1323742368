"""prime-rl: a custom loss by import path, and the fused LM head. docs/integrations/prime_rl.md.

[trainer.loss]
type = "custom"
import_path = "rlkern.integrations.prime_rl.loss"
kwargs = { objective = "dapo", epsilon_high = 0.3 }
"""

from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle
from rlkern.integrations._head import head
from rlkern.integrations._objective import aggregated, build, weighted

PRIME_RL = Peer("prime-rl", "as of August 2026")
_HANDLE = Handle()
_OP = "integrations.prime_rl"
_HEAD = "prime_rl.trainer.models.layers.lm_head"
_NAME = "_SequenceChunkedLogProbEntropyFn"


def loss(inputs: Any, *, objective: str = "prime_rl", **fields: Any) -> Any:
    """A preset as prime-rl calls a custom loss: one sample, summed over its tokens.

    prime-rl has no log-probs of an old policy: ratios are to inference_logprobs. It divides the sum
    by the tokens of the batch, so that an objective's own average is left aside.

    Args:
        inputs: prime-rl's LossInputs. loss_weights weigh the policy term of a token, and are
            refused with an objective that has other terms.
        objective: a preset's name; `fields` are those of PolicyObjective.

    Returns:
        prime-rl's LossOutputs, with the metrics of `rlkern.policy_loss`.
    """
    outputs = PRIME_RL.find(_OP, "prime_rl.trainer.rl.loss.LossOutputs", ("loss", "metrics"))
    has = ("rollout_logprob",)
    if inputs.ref_logprobs is not None:
        has = (*has, "ref_logprob")
    chosen = aggregated(build(_OP, objective, fields, {}, has), "token-sum")
    advantages = inputs.advantages[None]
    if inputs.loss_weights is not None:
        if chosen.kl_coef:
            raise ValueError(
                f"{_OP}: expected loss_weights to be None with {objective!r}, whose KL term they "
                "would not reach (kl_coef = 0 leaves it out)"
            )
        advantages = weighted(_OP, chosen, advantages, inputs.loss_weights[None])
    sampled = inputs.inference_logprobs[None]
    value, metrics = rlkern.policy_loss(
        inputs.trainer_logprobs[None],
        sampled,
        advantages,
        mask=inputs.loss_mask[None],
        objective=chosen,
        ref_logprob=None if inputs.ref_logprobs is None else inputs.ref_logprobs[None],
        rollout_logprob=sampled if chosen.needs_rollout else None,
    )
    return outputs(loss=value, metrics=dict(metrics))


def enable() -> Handle:
    """`linear_logprob` in place of the autograd function behind prime-rl's fused LM head.

    Raises:
        RuntimeError: prime-rl is missing, or its function has other parameters.
    """
    if _HANDLE.enabled:
        return _HANDLE
    call = ("ctx", "hidden", "weight", "labels", "inv_temperature", "chunk_size")
    PRIME_RL.takes(_OP, f"{_HEAD}.{_NAME}.forward", call)
    _HANDLE.set(PRIME_RL.resolve(_OP, _HEAD), _NAME, LogprobEntropy)
    return _HANDLE


class LogprobEntropy:
    """Called as prime-rl calls its function, whose entropy has no gradient; this one's has."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        temperature = torch.reciprocal(inv_temperature.float())
        outputs = ("logprob", "entropy")
        out = head(hidden, weight, labels, temperature, dtype=hidden.dtype, outputs=outputs)
        return out.logprob, out.entropy
