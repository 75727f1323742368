"""SkyRL: policy losses and advantage estimators by its registries. docs/integrations/skyrl.md.

from rlkern.integrations import skyrl; skyrl.enable()      # before the trainer is made
trainer.algorithm.policy_loss_type=rlkern_minpro trainer.algorithm.advantage_estimator=rlkern_rloo
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle
from rlkern.integrations._objective import (
    OBJECTIVE_ENV,
    PREFIX,
    aggregated,
    alone,
    build,
    estimate,
    from_environment,
    served_kinds,
    weighted,
)
from rlkern.ops.policy_loss.presets import PRESETS

SKYRL = Peer("skyrl", "as of August 2026")
_OP = "integrations.skyrl"
_UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
_DEFAULTS = {"eps_clip_low": 0.2, "eps_clip_high": 0.2, "clip_ratio_c": 3.0}
_FIELDS = {
    "eps_clip_low": "epsilon_low",
    "eps_clip_high": "epsilon_high",
    "clip_ratio_c": "clip_ratio_c",
}


def enable() -> Handle:
    """Registers `rlkern_<preset>` and `rlkern_<kind>`; SkyRL sends them to its Ray workers.

    Raises:
        RuntimeError: SkyRL is missing, or calls its losses otherwise.
    """
    call = ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs")
    SKYRL.takes(_OP, f"{_UTILS}.ppo_policy_loss", call)
    SKYRL.takes(_OP, f"{_UTILS}.PolicyLossRegistry.register", ("name", "func"))
    handle = Handle()
    for registry, functions in (
        ("PolicyLossRegistry", {name: partial(policy_loss, name) for name in PRESETS}),
        ("AdvantageEstimatorRegistry", {k: partial(estimate, k) for k in served_kinds()}),
    ):
        held = SKYRL.resolve(_OP, f"{_UTILS}.{registry}")
        known = set(held.list_available())
        for name, function in functions.items():
            if PREFIX + name not in known:
                held.register(PREFIX + name, function)
                handle.undone_by(partial(held.unregister, PREFIX + name))
    return handle


def policy_loss(
    name: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A preset as SkyRL calls its losses: a sum, for its advantages are divided already.

    Numbers of the preset, but for eps_clip_low, eps_clip_high and clip_ratio_c of the config that
    are not SkyRL's default, and fields in the environment variable RLKERN_OBJECTIVE, which win.
    config.off_policy_correction is not applied: rollout_is and rollout_rs are fields.
    """
    options: Mapping[str, Any] = {
        field: getattr(config, key)
        for key, field in _FIELDS.items()
        if getattr(config, key, None) not in (None, _DEFAULTS[key])
    }
    has = () if rollout_logprobs is None else ("rollout_logprob",)
    objective = build(_OP, name, options, from_environment(OBJECTIVE_ENV), has)
    objective = aggregated(alone(_OP, name, objective), "token-sum")
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    advantages = weighted(_OP, objective, advantages, mask.to(log_probs.dtype))
    loss, metrics = rlkern.policy_loss(
        log_probs,
        old_log_probs,
        advantages.expand_as(log_probs).contiguous(),
        mask=mask != 0,
        objective=objective,
        rollout_logprob=rollout_logprobs if objective.needs_rollout else None,
    )
    names = {"clip_ratio": "pg_clipfrac", "ppo_kl": "ppo_kl", "ratio_mean": "ratio_mean"}
    values = torch.stack([metrics[ours] for ours in names.values()]).tolist()
    return loss, dict(zip(names, values))
