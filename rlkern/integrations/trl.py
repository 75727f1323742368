"""TRL: its fused LM head, its log-softmax functions, and any objective in its GRPOTrainer.

docs/integrations/trl.md.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern import PolicyObjective, _check
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle
from rlkern.integrations._head import from_logits, head
from rlkern.integrations._objective import build, changed, weighted
from rlkern.ops.policy_loss.presets import NAMES

TRL = Peer("trl", "1.15 - 1.16")
_OP = "integrations.trl"
_UTILS = "trl.trainer.utils"
_FUNCTION = "trl.kernels.chunked_logprob.ChunkedLogProbFunction"
_HEAD = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_OURS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_sq_prob",
    "is_top1": "is_top1",
}
_HANDLE = Handle()


def enable(*, lm_head: bool = True, logits: bool = True) -> Handle:
    """Puts rlkern behind TRL's names in this process, for trainers made before or after.

    Args:
        lm_head: `linear_logprob` in place of trl.trainer.utils._ChunkedLogProbFunction, behind the
            fused LM head of all of TRL's trainers.
        logits: `logprob_from_logits` in place of selective_log_softmax, entropy_from_logits and
            selective_log_softmax_and_entropy, wherever a module of TRL has imported them.

    Returns:
        Handle: of the first call that is still enabled, so that a second one changes nothing.

    Raises:
        RuntimeError: TRL is missing, or its functions have other parameters than in the tested
            versions; nothing has been replaced.
    """
    if _HANDLE.enabled:
        return _HANDLE
    utils = TRL.resolve(_OP, _UTILS)
    TRL.takes(_OP, f"{_FUNCTION}.forward", ("ctx", *_HEAD))
    swaps = []
    for name, twin in _TWINS.items() if logits else ():
        original = TRL.takes(_OP, f"{_UTILS}.{name}", list(inspect.signature(twin).parameters))
        swaps.append((original, twin))
    if lm_head:
        # None in TRL 1.15 where Triton is missing
        _HANDLE.set(utils, "_ChunkedLogProbFunction", LogprobHead)
    _HANDLE.replace("trl", *swaps)
    return _HANDLE


# --- the LM head ---------------------------------------------------------------------------------


class LogprobHead:
    """In place of trl.kernels.ChunkedLogProbFunction: hidden states to statistics of their tokens.

    Computed in the dtype that TRL computes in, that of autocast or of hidden, without rounding a
    logit to it. Left to TRL's own function, whole calls: `mean_logits` of soft-capped logits (no
    other output needs a soft-capped logit on its own), a logit_scale that is not positive, and
    weights that DeepSpeed has cut up, which must be gathered again in the backward pass.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(logprob, entropy, log_sum_sq_probs, mean_logits, is_top1); None where not asked for.

        The first two are differentiable. chunk_size is TRL's, and unused.
        """
        wants_mean = "mean_logits" in outputs
        capped = final_logit_softcapping is not None
        if (wants_mean and capped) or logit_scale <= 0 or hasattr(weight, "ds_id"):
            return TRL.resolve(_OP, _FUNCTION).apply(
                *(hidden, weight, bias, targets, temperature, chunk_size),
                *(final_logit_softcapping, logit_scale, outputs),
            )
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        out = head(
            hidden,
            weight,
            targets,
            temperature,
            dtype=dtype,
            bias=bias,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=[ours for trls, ours in _OURS.items() if trls in ("log_probs", *outputs)],
        )
        mean = None
        if wants_mean:
            mean = _mean_logits(hidden, weight, bias, dtype) * (logit_scale / temperature)
        sum_sq = out.sum_sq_prob
        return (
            out.logprob,
            out.entropy,
            None if sum_sq is None else sum_sq.log(),
            mean,
            out.is_top1,
        )


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mean of linear functions is that of the mean of their weights."""
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.to(dtype).float() @ weight.to(dtype).mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.to(dtype).mean(dtype=torch.float32)


# --- logits in ------------------------------------------------------------------------------------


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log_softmax(logits / temperature) at index, (...) or (..., K), in float32.

    row_mask: 0 marks rows that are skipped: log-prob 0, no gradient.
    """
    if index.ndim == logits.ndim:
        ids = index.reshape(-1, index.shape[-1])
        if row_mask is not None:
            ids = ids.masked_fill(row_mask.reshape(ids.shape) == 0, -100)
        targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        out = from_logits(logits, targets, temperature=temperature, ids=ids, outputs=())
        return out.id_logprob
    ids = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
    return from_logits(logits, ids, temperature=temperature).logprob


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """In nats, float32; chunk_size is TRL's, and unused."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return from_logits(logits, targets, outputs=("entropy",)).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both of one pass over the logits."""
    ids = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
    outputs = ("logprob", "entropy")
    out = from_logits(logits, ids, temperature=temperature, outputs=outputs)
    entropy = out.entropy if entropy_requires_grad else out.entropy.detach()
    if row_mask is not None:
        entropy = entropy.masked_fill(row_mask == 0, 0.0)
    return out.logprob, entropy


_TWINS = {
    "selective_log_softmax": selective_log_softmax,
    "entropy_from_logits": entropy_from_logits,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
}

# --- the loss -------------------------------------------------------------------------------------

# What TRL's own _compute_loss knows, which it goes on to compute.
_NATIVE = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# Fields of GRPOConfig that a preset takes where they are not TRL's default.
_OPTIONS = (
    *("epsilon", "epsilon_high", "delta", "importance_sampling_level", "top_entropy_quantile"),
    *("sapo_temperature_pos", "sapo_temperature_neg", "off_policy_mask_threshold"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
)
_LOGPROBS = (
    *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    *("compute_entropy", "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images"),
    *("pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids"),
    *("mm_token_type_ids", "image_position_ids"),
)


class ObjectiveMixin:
    """`class Trainer(ObjectiveMixin, trl.GRPOTrainer)`: GRPOConfig(loss_type=...) is any preset.

    A preset's numbers are its paper's, but for the options of GRPOConfig that are not TRL's
    default, and for `rlkern_objective`, fields of PolicyObjective, which wins. beta, its
    use_bias_correction_kl, and entropy_coef are always the config's. A loss_type that TRL has
    itself is TRL's own unless rlkern_objective is given: {} is enough.

    rlkern_objective: keyword argument of the constructor beside TRL's.

    Raises:
        ValueError, TypeError: in the constructor: an unknown loss_type or field, or an objective
            that needs what TRL does not have (segments, marked tokens).
    """

    def __init__(
        self, *args: Any, rlkern_objective: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        TRL.takes(_OP, "trl.GRPOTrainer._get_per_token_logps_and_entropies", ("self", *_LOGPROBS))
        TRL.takes(_OP, "trl.GRPOTrainer._compute_loss", ("self", "model", "inputs"))
        super().__init__(*args, **kwargs)
        self.rlkern_objective = None
        if rlkern_objective is not None or self.loss_type not in _NATIVE:
            self.rlkern_objective = _objective(self.args, dict(rlkern_objective or {}))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        objective = self.rlkern_objective
        if objective is None:
            return super()._compute_loss(model, inputs)
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        mask = inputs["completion_mask"]
        attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        more = {name: inputs.get(name) for name in _LOGPROBS[7:]}
        logprob, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompt, completion], dim=1),
            attention,
            completion.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **more,
        )
        old = inputs.get("old_per_token_logps")
        old = logprob.detach() if old is None else old
        rollout = inputs.get("sampling_per_token_logps")
        # NaN: tokens that the engine could not score
        rollout = old if rollout is None else torch.where(rollout.isnan(), old, rollout)
        advantages = inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction and _corrects(objective):
            ratio = inputs["importance_sampling_ratio"]
            advantages = advantages if advantages.ndim == 2 else advantages[:, None]
            advantages = advantages.expand_as(logprob)
            advantages = weighted(_OP, objective, advantages, ratio, corrects=True)

        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1.0
        processes = self.accelerator.num_processes
        divide, normalizer = steps, float(len(mask))
        if objective.loss_agg_mode == "token-mean":
            # of the generation batch, as TRL's dapo: one window of accumulation is its share
            divide, normalizer = 1.0, inputs["num_items_in_batch"].clamp(min=1).float() / processes
            if training:
                normalizer = normalizer * steps / self.args.steps_per_generation
            normalizer = normalizer.to(logprob.device)
        elif objective.loss_agg_mode == "token-sum":
            divide, normalizer = 1.0 / processes, None
        loss, metrics = rlkern.policy_loss(
            logprob,
            old,
            advantages,
            mask=mask.bool(),
            objective=objective,
            ref_logprob=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            rollout_logprob=rollout if objective.needs_rollout else None,
            entropy=entropy if objective.trains_entropy else entropy.detach(),
            normalizer=normalizer,
        )
        loss = loss / divide
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
        self._log_objective("train" if training else "eval", metrics, aux_loss)
        return loss

    def _log_objective(
        self, mode: str, metrics: Mapping[str, Tensor], aux_loss: Tensor | None
    ) -> None:
        """Means over the tokens of all processes, under TRL's names."""
        trls = {
            "entropy": "entropy",
            "clip_ratio/low_mean": "clip_ratio/low_mean",
            "clip_ratio/high_mean": "clip_ratio/high_mean",
            "clip_ratio/region_mean": "pg_clipfrac",
        }
        if self.beta != 0.0:
            trls["kl"] = "kl"
        count = metrics["num_tokens"]
        sums = torch.stack([count, *(metrics[name] * count for name in trls.values())])
        total, *sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, value in zip(trls, sums):
            self._metrics[mode][name].append(value / max(total, 1.0))
        if aux_loss is not None:
            everywhere = self.accelerator.gather_for_metrics(aux_loss)
            self._metrics[mode]["aux_loss"].append(everywhere.mean().item())


def _corrects(objective: PolicyObjective) -> bool:
    """Whether TRL's own correction applies: not where the objective has one."""
    return objective.rollout_is is None and objective.ratio_anchor == "old"


def _objective(args: Any, given: dict[str, Any]) -> PolicyObjective:
    """Of a GRPOConfig and of what stands over it."""
    name = args.loss_type
    if args.use_adaptive_entropy:
        _check.fail(_OP, "use_adaptive_entropy", f"to be False with loss_type {name!r}", True)
    defaults = {f.name: f.default for f in fields(args) if f.name in _OPTIONS}
    options = changed(vars(args), defaults)
    if NAMES.get(name, name) == "cispo" and "epsilon_high" in options:
        # an absolute ratio there
        options["cispo_max_ratio"] = options.pop("epsilon_high")
    options["entropy_coef"] = args.entropy_coef
    if args.beta != 0.0:
        options |= {"kl_coef": args.beta, "use_bias_correction_kl": args.use_bias_correction_kl}
    has = ("entropy", "ref_logprob", "rollout_logprob")
    if args.beta == 0.0:
        # the reference model is made for beta alone
        has = ("entropy", "rollout_logprob")
    objective = build(
        *(_OP, name, options, given, has),
        remedies={"ref_logprob": "set beta"},
        loss_scale_factor=args.max_completion_length,
    )
    # TRL averages over all rows of a micro-batch, those without tokens too
    if objective.loss_agg_mode.startswith("seq-"):
        objective = replace(objective, count_empty=True)
    return objective
