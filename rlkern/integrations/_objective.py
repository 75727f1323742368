"""An objective for a trainer whose own configuration has some of its numbers."""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rlkern
from rlkern import PolicyObjective, _check
from rlkern.ops.group_advantage.methods import INPUTS
from rlkern.ops.policy_loss.presets import NAMES, PRESETS, resolve

OBJECTIVE_ENV, ADVANTAGE_ENV = "RLKERN_OBJECTIVE", "RLKERN_ADVANTAGE"
PREFIX = "rlkern_"


def from_environment(variable: str) -> dict[str, Any]:
    """A JSON object; nothing where the variable is not set."""
    text = os.environ.get(variable) or "{}"
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        _check.fail("integrations", variable, "to be a JSON object", repr(text))
    return found


def changed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trainer's options that its user has set: the others are the paper's."""
    return {name: config[name] for name in defaults if config[name] != defaults[name]}


def build(
    op: str,
    name: str,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    has: Collection[str] = (),
    remedies: Mapping[str, str] | None = None,
    loss_scale_factor: float = 1.0,
) -> PolicyObjective:
    """The preset with a trainer's options, and with those given to rlkern over them.

    has: which of policy_loss' optional tensors the trainer has.
    """
    if NAMES.get(name, name) not in PRESETS:
        _check.fail(op, "the objective", f"to be one of {', '.join(sorted(PRESETS))}", repr(name))
    preset, fields = resolve(name, dict(options))
    fields |= resolve(name, dict(given))[1]
    agg_mode = {**PRESETS[preset].fields, **fields}.get("loss_agg_mode")
    if agg_mode == "seq-mean-token-sum-norm":
        fields.setdefault("loss_scale_factor", loss_scale_factor)
    objective = PolicyObjective.preset(preset, **fields)
    lacking = {
        "entropy": objective.needs_entropy,
        "ref_logprob": objective.needs_reference,
        "rollout_logprob": objective.needs_rollout,
        "nll_weight": objective.nll_coef != 0,
        "cu_segments": objective.importance_sampling_level == "segment",
    }
    for what, needed in lacking.items():
        if needed and what not in has:
            remedy = (remedies or {}).get(what, "call rlkern.policy_loss from a loss of your own")
            raise ValueError(
                f"{op}: expected an objective of the tensors that this trainer passes to its "
                f"losses, got {name!r}, which needs {what}: {remedy}"
            )
    return objective


def aggregated(
    objective: PolicyObjective, mode: str, scale: float | None = None
) -> PolicyObjective:
    """The same loss of a token under another average."""
    normed = mode == "seq-mean-token-sum-norm"
    count_empty = objective.count_empty and mode.startswith("seq-")
    return replace(
        objective,
        loss_agg_mode=mode,
        loss_scale_factor=scale if normed else None,
        count_empty=count_empty,
    )


def weighted(
    op: str,
    objective: PolicyObjective,
    advantages: Tensor,
    weights: Tensor,
    corrects: bool = False,
) -> Tensor:
    """Advantages times weights of tokens that a trainer has computed already, at least 0.

    The policy term of a token is a multiple of its advantage, and so is weighted by them; nothing
    else in the loss is. corrects: they are importance weights, which an objective may have too.
    """
    if not objective.is_linear or objective.selection in ("clip_cov", "kl_cov"):
        what = objective.selection or objective.surrogate
        reason = f"to be None with {what!r}, whose loss is not a multiple of the advantage"
        _check.fail(op, "weights of tokens", reason, tuple(weights.shape))
    if corrects and objective.rollout_is is not None:
        reason = f"to be None with rollout_is={objective.rollout_is!r}, which corrects already"
        _check.fail(op, "weights of tokens", reason, tuple(weights.shape))
    return advantages * weights


def alone(op: str, name: str, objective: PolicyObjective) -> PolicyObjective:
    """Refused where it has terms beside the policy's, which weights of tokens would not reach."""
    terms = {"kl_coef": objective.kl_coef, "entropy_coef": objective.entropy_coef}
    for what, value in terms.items():
        if value:
            reason = f"to be 0 with {name!r}: this trainer weighs advantages alone, and has that "
            _check.fail(op, what, reason + "term itself", value)
    return objective


# --- advantages -----------------------------------------------------------------------------------

# inputs of rows that trainers do not pass on; gdpo takes several rewards a row
_NOT_SERVED = ("flawed", "novelty", "confidence", "state", "reward_weights")


def served_kinds() -> list[str]:
    """Kinds of group_advantage that need rewards, groups, lengths, baselines and numbers alone."""
    return [kind for kind, inputs in INPUTS.items() if not set(inputs) & set(_NOT_SERVED)]


def estimate(
    kind: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | None = None,
    reward_baselines: Tensor | None = None,
    epsilon: float = 1e-6,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """A kind of `group_advantage` as verl and SkyRL call their estimators.

    Options of the kind come from the environment variable RLKERN_ADVANTAGE, a JSON object by kind:
    {"w_reinforce": {"positive_weight": 0.2}}.

    Args:
        token_level_rewards, response_mask: (B, L). A row's reward is its sum.
        index: (B,) uids of prompts, of any type: rows with the same are a group.

    Returns:
        (advantages, returns), the same (B, L) tensor, 0 where response_mask is.
    """
    if index is None:
        _check.fail("integrations", "index", "with the uid of every row's prompt", None)
    options = from_environment(ADVANTAGE_ENV).get(kind, {})
    if "lengths" in INPUTS[kind]:
        options["lengths"] = response_mask.sum(-1).float()
    if "reward_baselines" in INPUTS[kind]:
        options["reward_baselines"] = reward_baselines
    _, groups = np.unique(np.asarray(index), return_inverse=True)
    rewards = token_level_rewards.sum(-1)
    groups = torch.as_tensor(groups.reshape(-1), device=rewards.device)
    found = rlkern.group_advantage(rewards, groups, kind=kind, epsilon=epsilon, **options)
    advantages = found[:, None] * response_mask
    return advantages, advantages
