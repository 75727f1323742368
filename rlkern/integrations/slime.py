"""slime: a loss and a reward post-process by dotted path. docs/integrations/slime.md.

--loss-type custom_loss --custom-loss-function-path rlkern.integrations.slime.policy_loss
--custom-reward-post-process-path rlkern.integrations.slime.group_rewards
RLKERN_OBJECTIVE='{"preset": "minpro"}'  RLKERN_ADVANTAGE='{"kind": "rloo"}'
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern import _check
from rlkern._peers import Peer
from rlkern.integrations._objective import (
    ADVANTAGE_ENV,
    OBJECTIVE_ENV,
    aggregated,
    alone,
    build,
    from_environment,
    weighted,
)

SLIME = Peer("slime", "as of August 2026")
_OP = "integrations.slime"
_DEFAULTS = {"eps_clip": 0.2, "eps_clip_high": 0.2, "eps_clip_c": None}
_FIELDS = {
    "eps_clip": "epsilon_low",
    "eps_clip_high": "epsilon_high",
    "eps_clip_c": "clip_ratio_c",
}


def policy_loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """A preset as slime calls a custom loss, with slime's log-probs, averages and entropy bonus.

    The preset's name is "preset" in the environment variable RLKERN_OBJECTIVE, a JSON object whose
    other entries are fields of PolicyObjective; eps_clip, eps_clip_high and eps_clip_c are taken
    where they are not slime's default. A token is weighted as `sum_of_sample_mean` weights it.

    Raises:
        ValueError: samples cut up by context parallelism, an objective that reads entropies, or one
            with a KL term of its own (use_kl_loss is slime's, which this loss does not add).
    """
    if args.use_kl_loss:
        _check.fail(_OP, "use_kl_loss", "to be False: kl_coef is a field of the objective", True)
    given = from_environment(OBJECTIVE_ENV)
    name = given.pop("preset", "grpo")
    options = {
        _FIELDS[key]: getattr(args, key)
        for key, default in _DEFAULTS.items()
        if getattr(args, key) is not None and getattr(args, key) != default
    }
    objective = alone(_OP, name, build(_OP, name, options, given, ("rollout_logprob",)))
    lengths = batch["response_lengths"]
    module = "slime.backends.megatron_utils.loss"
    compute = SLIME.resolve(_OP, f"{module}.get_log_probs_and_entropy")
    if compute is None:
        raise RuntimeError(f"{_OP}: expected {module}.get_log_probs_and_entropy, got none")
    more = SLIME.resolve(_OP, f"{module}.get_rollout_top_p_logprob_kwargs")(args, batch)
    _, found = compute(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=lengths,
        with_entropy=True,
        **more,
    )
    if [len(x) for x in found["log_probs"]] != list(lengths):
        got = [len(x) for x in found["log_probs"]]
        reason = f"of whole responses, {list(lengths)} tokens (no context parallelism)"
        _check.fail(_OP, "log-probs", reason, got)
    logprob, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    sampled = batch.get("rollout_log_probs")
    old = sampled if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(old) if old else logprob.detach()
    sampled = torch.cat(sampled) if sampled else old
    advantages = torch.cat(batch["advantages"])
    masks = torch.cat(batch["loss_masks"]).bool()
    # what one token adds to slime's average, masks and all
    share = torch.ones_like(logprob, requires_grad=True)
    if len(logprob):
        (share,) = torch.autograd.grad(sum_of_sample_mean(share), share)
    rows = _padded(lengths, logprob, old, sampled, weighted(_OP, objective, advantages, share))
    value, metrics = rlkern.policy_loss(
        rows[0],
        rows[1],
        rows[3],
        mask=_padded(lengths, masks)[0],
        objective=aggregated(objective, "token-sum"),
        rollout_logprob=rows[2] if objective.needs_rollout else None,
    )
    entropy = sum_of_sample_mean(entropy)
    total = value - args.entropy_coef * entropy
    if logprob.numel() == 0:
        total = total + 0 * logits.sum()
    # slime adds its metrics up as it adds its losses
    count = sum_of_sample_mean(torch.ones_like(logprob)).detach()
    logged = {name: metrics[name] * count for name in ("pg_clipfrac", "ppo_kl")}
    logged |= {"loss": total, "pg_loss": value, "entropy_loss": entropy}
    return total, {key: x.clone().detach() for key, x in logged.items()}


def _padded(lengths: list[int], *packed: Tensor) -> list[Tensor]:
    rows = [x.split(list(lengths)) for x in packed]
    return [torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in rows]


def group_rewards(args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
    """A kind of `group_advantage` as slime post-processes rewards: samples of one prompt together.

    "kind" in the environment variable RLKERN_ADVANTAGE, a JSON object, names it, "grpo" by default;
    its other entries are options of the kind. With slime's grpo estimator the advantage of every
    token is then this number.

    Returns:
        (raw rewards, advantages) in the order of samples.
    """
    raw = [sample.get_reward_value(args) for sample in samples]
    options = from_environment(ADVANTAGE_ENV)
    kind = options.pop("kind", "grpo")
    prompts: dict[int, int] = {}
    ids = [prompts.setdefault(sample.group_index, len(prompts)) for sample in samples]
    found = rlkern.group_advantage(torch.tensor(raw), torch.tensor(ids), kind=kind, **options)
    return raw, found.tolist()
