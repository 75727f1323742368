"""NeMo-RL: a LossFunction for a script of your own. docs/integrations/nemo_rl.md."""

from typing import Any

import rlkern
from rlkern._peers import Peer
from rlkern.integrations._objective import build

NEMO_RL = Peer("nemo-rl", "as of August 2026")
_OP = "integrations.nemo_rl"
_CALL = ("self", "next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks")


def policy_loss_fn(objective: str = "dapo", **fields: Any) -> "PolicyLossFn":
    """A loss as NeMo-RL's ClippedPGLossFn, in whose place an entry script passes it.

    Raises:
        RuntimeError: NeMo-RL is missing, or calls its losses otherwise.
        ValueError, TypeError: an unknown preset or field.
    """
    NEMO_RL.takes(_OP, "nemo_rl.algorithms.loss.loss_functions.ClippedPGLossFn.__call__", _CALL)
    interfaces = "nemo_rl.algorithms.loss.interfaces"
    made = PolicyLossFn(objective, **fields)
    kinds = NEMO_RL.resolve(_OP, f"{interfaces}.LossType")
    made.loss_type = kinds.TOKEN_LEVEL if made.per_token else kinds.SEQUENCE_LEVEL
    made.input_type = NEMO_RL.resolve(_OP, f"{interfaces}.LossInputType").LOGPROB
    return made


class PolicyLossFn:
    """Any preset, over NeMo-RL's data: columns are of the token before, masks of tokens and rows.

    The ratio is to prev_logprobs; generation_logprobs are the rollout's, reference_policy_logprobs
    the reference's.
    """

    loss_type: Any
    input_type: Any

    def __init__(self, objective: str = "dapo", **fields: Any) -> None:
        has = ("ref_logprob", "rollout_logprob")
        self.objective = build(_OP, objective, {}, fields, has)
        self.per_token = self.objective.loss_agg_mode in ("token-mean", "token-sum")

    def __call__(
        self, next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any
    ) -> tuple[Any, dict[str, Any]]:
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        columns = {"ref_logprob": "reference_policy_logprobs"}
        if self.objective.needs_rollout:
            columns["rollout_logprob"] = "generation_logprobs"
        if not self.objective.needs_reference:
            del columns["ref_logprob"]
        more = {ours: data[theirs][:, 1:] for ours, theirs in columns.items()}
        count = global_valid_toks if self.per_token else global_valid_seqs
        if self.objective.loss_agg_mode == "token-sum":
            count = None
        loss, metrics = rlkern.policy_loss(
            next_token_logprobs,
            data["prev_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            mask=mask != 0,
            objective=self.objective,
            normalizer=None if count is None else count.reshape(()).float(),
            **more,
        )
        # NeMo-RL adds metrics up over micro-batches and ranks, as it adds losses
        share = metrics["num_tokens"] / global_valid_toks
        names = {
            "probs_ratio": "ratio_mean",
            "clip_frac": "pg_clipfrac",
            "kl_penalty": "kl",
        }
        logged = {
            theirs: (metrics[ours] * share).item()
            for theirs, ours in names.items()
            if ours in metrics
        }
        logged |= {"loss": loss.item(), "num_valid_samples": data["sample_mask"].sum().item()}
        return loss, logged
