"""An objective for a trainer whose own configuration has some of its numbers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from rlkern import PolicyObjective, _check


def changed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trainer's options that its user has set: the others are the paper's."""
    return {name: config[name] for name in defaults if config[name] != defaults[name]}


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


def weighted(op: str, objective: PolicyObjective, advantages: Tensor, weights: Tensor) -> Tensor:
    """Advantages times the importance weights that a trainer has computed already.

    The loss of a token is a multiple of its advantage, and weights are not negative.
    """
    if not objective.is_linear or objective.selection in ("clip_cov", "kl_cov"):
        what = objective.selection or objective.surrogate
        reason = f"to be None with {what!r}, whose loss is not a multiple of the advantage"
        _check.fail(op, "importance weights", reason, tuple(weights.shape))
    if objective.rollout_is is not None:
        reason = f"to be None with rollout_is={objective.rollout_is!r}, which corrects already"
        _check.fail(op, "importance weights", reason, tuple(weights.shape))
    return advantages * weights
