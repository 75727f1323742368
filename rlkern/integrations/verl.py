"""verl: policy losses, advantage estimators and the fused LM head, by its own registries.

    VERL_USE_EXTERNAL_MODULES=rlkern.integrations.verl

makes verl import this module in every process, which is what enables it: `HANDLE.disable()` undoes
that in this one. docs/integrations/verl.md.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rlkern
from rlkern import PolicyObjective, _check
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle
from rlkern.integrations._head import head as logprob_head
from rlkern.integrations._objective import (
    OBJECTIVE_ENV,
    PREFIX,
    aggregated,
    build,
    estimate,
    from_environment,
    served_kinds,
    weighted,
)
from rlkern.ops.policy_loss.presets import PRESETS

VERL = Peer("verl", "0.9")
_OP = "integrations.verl"
_CORE = "verl.trainer.ppo.core_algos"
_LOSS = (
    *("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config"),
    "rollout_is_weights",
)
_FUSED = "verl.utils.experimental.torch_functional.FusedLinearForPPO"
_CROSS = "verl.utils.kernel.linear_cross_entropy.LinearCrossEntropy"
_AGG = (
    *("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens"),
    *("global_batch_size", "loss_scale_factor"),
)


def enable(
    *,
    losses: bool = True,
    advantages: bool = True,
    head: bool = True,
    replace: bool = False,
) -> Handle:
    """Registers rlkern's functions with verl in this process.

    Args:
        losses: `rlkern_<preset>` for `actor.policy_loss.loss_mode`, of every preset.
        advantages: `rlkern_<kind>` for `algorithm.adv_estimator`, of every kind of
            `group_advantage` whose inputs verl passes on.
        head: `linear_logprob` in place of FusedLinearForPPO and linear_cross_entropy, which verl
            calls where use_fused_kernels is true.
        replace: also the losses and estimators that verl has itself, under their own names, with
            verl's options, aggregation and metrics: those of `TWINS` and `ESTIMATORS`.

    Returns:
        Handle; what an earlier call has registered stays registered.

    Raises:
        RuntimeError: verl is missing, or its functions have other parameters than in the tested
            version; nothing has been registered.
    """
    core = VERL.resolve(_OP, _CORE)
    VERL.takes(_OP, f"{_CORE}.compute_policy_loss_vanilla", _LOSS)
    VERL.takes(_OP, f"{_CORE}.agg_loss", _AGG)
    grouped = ("token_level_rewards", "response_mask", "index", "epsilon", "config", "kwargs")
    VERL.takes(_OP, f"{_CORE}.compute_rloo_outcome_advantage", grouped)
    if head:
        call = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
        VERL.takes(_OP, f"{_FUSED}.forward", call)
        call = ("ctx", "hidden", "weight", "labels", "temperature", "reduction")
        VERL.takes(_OP, f"{_CROSS}.forward", (*call, "dist_process_group"))
    policies, estimators = core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY
    handle = Handle()
    for name in PRESETS if losses else ():
        if PREFIX + name not in policies:
            handle.put(policies, PREFIX + name, partial(policy_loss, name))
    for kind in served_kinds() if advantages else ():
        if PREFIX + kind not in estimators:
            handle.put(estimators, PREFIX + kind, partial(estimate, kind))
    swaps: list[tuple[Any, Any]] = []
    if head:
        swaps.append((VERL.resolve(_OP, _FUSED), FusedLinearForPPO))
        original = VERL.resolve(_OP, _CROSS.replace("LinearCrossEntropy", "linear_cross_entropy"))
        swaps.append((original, linear_cross_entropy))
    for registry, function, names in (
        (policies, _twin, TWINS if replace else ()),
        (estimators, _estimator, ESTIMATORS if replace else ()),
    ):
        for name in names:
            ours = partial(function, name)
            swaps.append((registry[name], ours))
            handle.put(registry, name, ours)
    handle.replace("verl", *swaps)
    return handle


# --- policy losses --------------------------------------------------------------------------------

# verl's fields -> its defaults. Set otherwise, they stand over the preset.
_ACTOR = {
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
}
_POLICY = {
    "clip_cov_ratio": 2e-4,
    "clip_cov_lb": 1.0,
    "clip_cov_ub": 5.0,
    "kl_cov_ratio": 2e-4,
    "ppo_kl_coef": 0.1,
    "dro_beta": None,
}


def policy_loss(
    name: str | PolicyObjective,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A preset, or an objective of your own, as verl calls its losses.

    loss_agg_mode, and the global counts in config.global_batch_info, are verl's; the numbers are
    the preset's, but for fields of the actor's config that are not verl's default, and those in the
    environment variable RLKERN_OBJECTIVE, a JSON object, which wins. Objectives that read
    rollout_logprob take old_log_prob for it: under verl's bypass mode it is that.

    Returns:
        loss, and verl's metrics: actor/pg_clipfrac, actor/ppo_kl, actor/pg_clipfrac_lower.

    Raises:
        ValueError, TypeError: an objective that needs what verl does not pass to its losses
            (entropy, segments, marked tokens; importance weights of its own).
    """
    objective = name if isinstance(name, PolicyObjective) else _objective(name, config)
    return _loss(
        objective,
        *(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode),
        *(_counts(config), rollout_is_weights),
    )


_REMEDIES = {
    "ref_logprob": f"set actor.use_kl_loss, and kl_coef 0 in {OBJECTIVE_ENV}",
    "rollout_logprob": "set algorithm.rollout_correction, whose weights every loss takes",
}


def _counts(config: Any) -> Mapping[str, Any]:
    """Of the batch over all ranks and micro-batches."""
    return {} if config is None else config.global_batch_info


def _loss(
    objective: PolicyObjective,
    old: Tensor,
    logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    agg_mode: str,
    counts: Mapping[str, Any],
    weights: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:
    processes = counts.get("dp_size") or 1
    scale = counts.get("loss_scale_factor") or mask.shape[-1]
    objective = aggregated(objective, agg_mode, float(scale))
    normalizer = None
    if agg_mode != "token-sum":
        what = "batch_num_tokens" if agg_mode == "token-mean" else "global_batch_size"
        normalizer = counts.get(what)
        if normalizer is None and processes > 1:
            raise ValueError(f"{_OP}: expected {what} with dp_size {processes}, got None")
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(logprob.device).float().reshape(())
    # verl's callers broadcast them
    advantages = advantages.expand_as(logprob)
    if weights is not None:
        advantages = weighted(_OP, objective, advantages, weights, corrects=True)
    loss, metrics = rlkern.policy_loss(
        logprob,
        old,
        advantages,
        mask=mask.bool(),
        objective=objective,
        rollout_logprob=old if objective.needs_rollout else None,
        normalizer=normalizer,
    )
    names = ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")
    # one copy to the host, as verl wants numbers
    values = torch.stack([metrics[name] for name in names]).tolist()
    loss = loss * processes if processes > 1 else loss
    return loss, {f"actor/{name}": value for name, value in zip(names, values)}


def _get(config: Any, name: str, default: Any) -> Any:
    get = getattr(config, "get", None)
    return get(name, default) if get else getattr(config, name, default)


def _objective(name: str, config: Any) -> PolicyObjective:
    options = {}
    if config is not None:
        nested = _get(config, "policy_loss", None) or {}
        for held, defaults in ((config, _ACTOR), (nested, _POLICY)):
            found = {key: _get(held, key, default) for key, default in defaults.items()}
            options |= {k: v for k, v in found.items() if v is not None and v != defaults[k]}
    if "clip_ratio" in options and "clip_ratio_low" in options:
        both = options.pop("clip_ratio")
        options.setdefault("clip_ratio_high", both)
    given = from_environment(OBJECTIVE_ENV)
    # the anchor of a ratio or a KL: under bypass mode old_log_prob is the rollout's
    objective = build(_OP, name, options, given, ("rollout_logprob",), _REMEDIES)
    if objective.rollout_is is not None or objective.rollout_rs is not None:
        build(_OP, name, options, given, (), _REMEDIES)
    return objective


# --- verl's own losses ----------------------------------------------------------------------------


def _clips(config: Any) -> dict[str, float]:
    both = _get(config, "clip_ratio", 0.2)
    low, high = (_get(config, f"clip_ratio_{side}", None) for side in ("low", "high"))
    return {
        "epsilon_low": both if low is None else low,
        "epsilon_high": both if high is None else high,
    }


def _vanilla(config: Any) -> PolicyObjective:
    return PolicyObjective(**_clips(config), clip_ratio_c=_get(config, "clip_ratio_c", 3.0))


def _gspo(config: Any) -> PolicyObjective:
    return PolicyObjective(
        **_clips(config), importance_sampling_level="sequence", log_ratio_clamp=10.0
    )


def _cispo(config: Any) -> PolicyObjective:
    return PolicyObjective(**_clips(config), surrogate="detached")


def _dppo(kind: str, config: Any) -> PolicyObjective:
    bound = _get(config, "clip_ratio_c", 20.0)
    return PolicyObjective.preset(kind, **_clips(config), clip_ratio_c=bound)


def _gpg(config: Any) -> PolicyObjective:
    return PolicyObjective.preset("gpg")


def _sapo(config: Any) -> PolicyObjective:
    taus = {name: _get(config, name, _ACTOR[name]) for name in ("tau_pos", "tau_neg")}
    return PolicyObjective.preset("sapo", **taus)


def _geo_mean(config: Any) -> PolicyObjective:
    return PolicyObjective.preset("geo_mean", **_clips(config), count_empty=True)


def _dro(config: Any) -> PolicyObjective:
    return PolicyObjective.preset("dro", dro_beta=_get(config.policy_loss, "dro_beta", None))


TWINS: Mapping[str, Callable[[Any], PolicyObjective]] = {
    "vanilla": _vanilla,
    "gspo": _gspo,
    "cispo": _cispo,
    "dppo_tv": partial(_dppo, "dppo_tv"),
    "dppo_kl": partial(_dppo, "dppo_kl"),
    "gpg": _gpg,
    "sapo": _sapo,
    "geo_mean": _geo_mean,
    "dro": _dro,
}
"""verl's name -> the objective that its options make."""
# their aggregation, whatever is asked for; gspo's where nothing is
_FIXED = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}
_DEFAULT = {"gspo": "seq-mean-token-mean"}


def _twin(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str | None = None,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's loss of that name, with its options and metrics."""
    agg_mode = _FIXED.get(name) or loss_agg_mode or _DEFAULT.get(name, "token-mean")
    counts, weights = _counts(config), rollout_is_weights
    if name == "geo_mean":
        # a plain mean over the rows of the call, weighted by the geometric mean of the weights
        counts = {}
        if weights is not None:
            mask = response_mask.bool()
            logs = torch.where(mask, (weights + 1e-10).log(), 0.0).sum(-1)
            weights = (logs / mask.sum(-1).clamp(min=1)).exp()[:, None]
    return _loss(
        TWINS[name](config),
        *(old_log_prob, log_prob, advantages, response_mask, agg_mode),
        *(counts, weights),
    )


# --- advantages -----------------------------------------------------------------------------------

# verl's name -> our kind: the same but for a group of one row (docs/parity.md)
ESTIMATORS = {
    "grpo_vectorized": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "opo": "opo",
}


def _estimator(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    kind = ESTIMATORS[name]
    if kind == "grpo" and not norm_adv_by_std_in_grpo:
        kind = "dr_grpo"
    return estimate(kind, token_level_rewards, response_mask, index, epsilon=epsilon)


# --- the head -------------------------------------------------------------------------------------


class FusedLinearForPPO(torch.nn.Module):
    """In place of verl.utils.experimental.torch_functional.FusedLinearForPPO.

    log_probs and entropy in float32, whatever the dtype of hidden_states. chunk_size and
    impl_backend are verl's, and unused.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        outputs = ("logprob", "entropy")
        out = logprob_head(hidden_states, vocab_weights, input_ids, temperature, outputs=outputs)
        return out.logprob, out.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """In place of verl.utils.kernel.linear_cross_entropy.linear_cross_entropy.

    Like it, (N,) whatever the shape of labels. With a process group weight is this rank's part of
    the vocabulary.
    """
    if str(reduction).lower() != "none":
        _check.fail(_OP, "reduction", "'none'", repr(reduction))
    group = dist_process_group
    if group is not None and group.size() == 1:
        group = None
    out = logprob_head(
        hidden, weight, labels, temperature, outputs=("logprob", "entropy"), tp_group=group
    )
    return out.logprob.flatten(), out.entropy.flatten()


# verl imports this module because its user has said so
HANDLE = enable()
