"""The policy loss of RL post-training: loss, gradient coefficients and metrics in one pass."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.policy_loss.objective import PolicyObjective
from rlkern.ops.policy_loss.op import PLACES, Metrics, PolicyLoss
from rlkern.ops.policy_loss.reference import NOTHING
from rlkern.ops.policy_loss.selection import normalised, per_token, select

_OP = "policy_loss"


class PolicyLossOutput(NamedTuple):
    """A float32 scalar to minimise, and float32 scalars on the same device to look at."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    objective: str | PolicyObjective = "grpo",
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    nll_weight: Tensor | None = None,
    cu_segments: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> PolicyLossOutput:
    """Clipped, detached or sequence-level policy loss, with KL and entropy terms and metrics.

        r = exp(logprob - old_logprob)
        L = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)      (see PolicyObjective)
        loss = aggregate(L + kl_coef KL(logprob, ref_logprob) - entropy_coef entropy
                         - nll_coef nll_weight logprob)

    Equivalent torch program of the default objective, padded form::

        r = (logprob - old_logprob).exp()
        a = advantages[:, None]
        L = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a) * mask
        loss = (L.sum(1) / mask.sum(1).clamp(min=1)).sum() / (mask.sum(1) > 0).sum()

    Args:
        logprob: log-probs of the tokens taken, of the policy that is trained. Packed (T,) with
            cu_seqlens, or padded (B, L) with mask. Packed without cu_seqlens is one run of
            tokens: for objectives that average over tokens and advantages of shape (T,).
        old_logprob: same shape; those of the policy that the ratio is taken against.
        advantages: one per sequence, (S,) or (B,), or one per token, (T,) or (B, L). A length
            that is both S and T means sequences. An advantage of 0 gives exactly no loss and no
            gradient but those of the KL, entropy and NLL terms.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to T, not decreasing: sequence i is
            [cu_seqlens[i], cu_seqlens[i + 1]). The values are checked on the CPU only; on other
            devices tokens outside of all sequences are ignored.
        mask: (B, L) bool, True where a token counts; all count without it. Masked slots may
            hold anything, NaN included, and get a gradient of exactly 0.
        objective: a preset's name (docs/objectives.md has them all) or a PolicyObjective.
        ref_logprob: same shape as logprob; needed where kl_coef is not 0. Without kl_coef it
            only adds the metric.
        rollout_logprob: same shape: those of the engine that sampled. Needed by ratio_anchor=
            "rollout", rollout_is, rollout_rs and off_policy_mask_threshold, ignored otherwise.
        entropy: same shape; needed where entropy_coef is not 0 or tokens are chosen by it.
        nll_weight: shape as advantages, bool or floating point: how much of -logprob a sequence or
            token adds, 1 or True on correct answers or demonstrations, 0 elsewhere. Needed where
            nll_coef is not 0, ignored otherwise.
        cu_segments: (K + 1,), like cu_seqlens: items inside the sequences, for
            importance_sampling_level="segment" alone, packed.
        normalizer: the number of tokens (token-mean) or of sequences (seq-mean-*) of the whole
            batch, over all micro-batches and ranks, in place of the count in this call: the
            losses and gradients of the parts then add up to those of the whole. A 0-d tensor
            stays on its device.

    Returns:
        PolicyLossOutput(loss, metrics). Differentiable with respect to logprob and entropy.
        metrics, means over the tokens of this call, 0 where it has none:
            num_tokens
            pg_clipfrac          tokens whose loss the clip range changed (verl; TRL
                                 clip_ratio/region_mean)
            pg_clipfrac_lower    tokens at the dual clip, or at the bound of the weight (verl)
            clip_ratio/low_mean, clip_ratio/high_mean   pg_clipfrac by side (TRL)
            ppo_kl               mean of old_logprob - logprob (verl), clamped like the ratio
            ratio_mean, ratio_min, ratio_max            of the ratio that is clipped
            kl                   estimate kl_type against ref_logprob, when given
            entropy              when given
            rollout_is_mean, rollout_is_eff_sample_size   of the correction, as a share of the
                                 tokens; with rollout_logprob
            rollout_rs_masked_fraction   tokens that rollout_rs rejects, which no other metric
                                 counts; with rollout_logprob
            ratio_variance       mean of (r - 1)^2, R2VPO's constraint; with surrogate="quadratic"
        With surrogate="detached" the clip metrics count ratios outside the bounds whatever the
        sign of the advantage.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Inputs in bfloat16 or float16 are computed in float32; float64 by the reference, in float64.
    Two runs give the same bits, whatever the number of threads.
    """
    if not isinstance(objective, PolicyObjective):
        if not isinstance(objective, str):
            kind = type(objective).__name__
            raise TypeError(f"{_OP}: expected objective to be a str or PolicyObjective, got {kind}")
        objective = PolicyObjective.preset(objective)
    _check.tensor(_OP, "logprob", logprob)
    _check.dtype(_OP, "logprob", logprob, _check.FLOATS)
    _check_tokens("old_logprob", old_logprob, logprob)
    if logprob.ndim == 2:
        _check_padded(logprob, advantages, cu_seqlens, mask)
    else:
        _check_packed(logprob, advantages, cu_seqlens, mask, objective)
    for name, value, needed in (
        ("ref_logprob", ref_logprob, objective.needs_reference),
        ("rollout_logprob", rollout_logprob, objective.needs_rollout),
        ("entropy", entropy, objective.needs_entropy),
    ):
        if value is not None:
            _check_tokens(name, value, logprob)
        elif needed:
            reason = f"of shape {tuple(logprob.shape)} with {objective.reason(name)}"
            _check.fail(_OP, name, reason, None)
    _check_segments(logprob, cu_segments, objective)
    if objective.nll_coef != 0:
        nll_weight = _check_nll_weight(nll_weight, logprob, cu_seqlens, objective)
    kinds, numbers = objective.kinds, objective.numbers
    if normalizer is not None:
        if objective.rollout_is_batch_normalize:
            reason = (
                "to be None with rollout_is_batch_normalize=True, whose mean is that of this call "
                "(divide the advantages by the mean weight of the batch in its place)"
            )
            _check.fail(_OP, "normalizer", reason, normalizer)
        if kinds.denominator == NOTHING:
            reason = "to be None with loss_agg_mode='token-sum' ('token-mean' divides by it)"
            _check.fail(_OP, "normalizer", reason, normalizer)
        kinds = kinds._replace(denominator=NOTHING)
        if isinstance(normalizer, Tensor):
            _check.shape(_OP, "normalizer", normalizer, (), "()")
            _check.same_device(_OP, "normalizer", normalizer, "logprob", logprob.device)
        else:
            _check.positive(_OP, "normalizer", normalizer)
            numbers = numbers._replace(scale=numbers.scale / normalizer)

    kind = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    live, old, h = _plain(logprob, kind), _plain(old_logprob, kind), _plain(entropy, kind)
    advantages, rollout = _plain(advantages, kind), _plain(rollout_logprob, kind)
    ref = {"ref": _plain(ref_logprob, kind), "old": old, "rollout": rollout}[objective.kl_against]
    if objective.rollout_is_batch_normalize:
        advantages = normalised(objective, old, rollout, advantages, cu_seqlens, mask)
    if objective.selection is not None:
        advantages, penalised = select(objective, live, old, advantages, cu_seqlens, mask, h)
        advantages, ref = advantages.contiguous(), ref if penalised is None else penalised
    rest = (
        old,
        advantages,
        _plain(cu_seqlens, None),
        _plain(mask, None),
        rollout if objective.needs_rollout else None,
        ref,
        _plain(nll_weight, kind) if objective.nll_coef != 0 else None,
        _plain(cu_segments, None),
        list(kinds),
        list(numbers),
    )
    loss, metrics = PolicyLoss.apply(live, h, rest)
    if isinstance(normalizer, Tensor):
        loss = loss / normalizer
    quadratic = objective.surrogate == "quadratic"
    have = (ref is not None, entropy is not None, objective.needs_rollout, quadratic)
    return PolicyLossOutput(loss, Metrics(PLACES[have], metrics))


def _plain(value: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Contiguous and of the computing dtype; the tensor itself where it is both."""
    if value is None:
        return None
    if dtype is not None and value.dtype != dtype:
        value = value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def _check_tokens(name: str, value: Tensor, logprob: Tensor) -> None:
    _check.tensor(_OP, name, value)
    _check.dtype(_OP, name, value, _check.FLOATS)
    symbols = "(B, L)" if logprob.ndim == 2 else "(T,)"
    if value.shape != logprob.shape:
        _check.shape(_OP, name, value, logprob.shape, symbols)
    _check.same_device(_OP, name, value, "logprob", logprob.device)


def _check_nll_weight(
    nll_weight: Tensor | None,
    logprob: Tensor,
    cu_seqlens: Tensor | None,
    objective: PolicyObjective,
) -> Tensor:
    """One number a token."""
    name = "nll_weight"
    shapes = [tuple(logprob.shape)]
    if cu_seqlens is not None:
        shapes.insert(0, (cu_seqlens.shape[0] - 1,))
    elif logprob.ndim == 2:
        shapes.insert(0, (logprob.shape[0],))
    sizes = " or ".join(str(shape) for shape in shapes)
    if nll_weight is None:
        _check.fail(_OP, name, f"of shape {sizes} with {objective.reason(name)}", None)
    _check.tensor(_OP, name, nll_weight)
    _check.dtype(_OP, name, nll_weight, (*_check.FLOATS, torch.bool))
    if tuple(nll_weight.shape) not in shapes:
        _check.fail(_OP, name, f"of shape {sizes}", tuple(nll_weight.shape))
    _check.same_device(_OP, name, nll_weight, "logprob", logprob.device)
    return per_token(logprob, nll_weight, cu_seqlens)


def _check_advantages(advantages: Tensor, logprob: Tensor, shapes: tuple, symbols: str) -> None:
    _check.tensor(_OP, "advantages", advantages)
    _check.dtype(_OP, "advantages", advantages, _check.FLOATS)
    if tuple(advantages.shape) not in shapes:
        sizes = " or ".join(str(shape) for shape in shapes)
        _check.fail(_OP, "advantages", f"of shape {symbols} = {sizes}", tuple(advantages.shape))
    _check.same_device(_OP, "advantages", advantages, "logprob", logprob.device)


def _check_padded(
    logprob: Tensor, advantages: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> None:
    if cu_seqlens is not None:
        _check.fail(_OP, "logprob", "of shape (T,) with cu_seqlens", tuple(logprob.shape))
    rows = logprob.shape[:1]
    _check_advantages(advantages, logprob, (tuple(rows), tuple(logprob.shape)), "(B,) or (B, L)")
    if mask is not None:
        _check.tensor(_OP, "mask", mask)
        _check.dtype(_OP, "mask", mask, (torch.bool,))
        _check.shape(_OP, "mask", mask, logprob.shape, "(B, L)")
        _check.same_device(_OP, "mask", mask, "logprob", logprob.device)


def _check_packed(
    logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    objective: PolicyObjective,
) -> None:
    if logprob.ndim != 1:
        _check.fail(_OP, "logprob", "of shape (T,) or (B, L)", tuple(logprob.shape))
    if mask is not None:
        reason = "to be None with packed log-probs: pack the tokens that count"
        _check.fail(_OP, "mask", reason, tuple(getattr(mask, "shape", ())))
    tokens = logprob.shape[0]
    if cu_seqlens is None:
        if objective.needs_sequences:
            reason = (
                "of shape (S + 1,) with packed log-probs, loss_agg_mode="
                f"{objective.loss_agg_mode!r} and importance_sampling_level="
                f"{objective.importance_sampling_level!r}"
            )
            _check.fail(_OP, "cu_seqlens", reason, None)
        _check_advantages(advantages, logprob, ((tokens,),), "(T,) (no cu_seqlens)")
        return
    _check_offsets("cu_seqlens", cu_seqlens, logprob)
    sequences = cu_seqlens.shape[0] - 1
    _check_advantages(advantages, logprob, ((sequences,), (tokens,)), "(S,) or (T,)")


def _check_offsets(name: str, offsets: Tensor, logprob: Tensor) -> None:
    symbol = "S" if name == "cu_seqlens" else "K"
    _check.tensor(_OP, name, offsets)
    _check.dtype(_OP, name, offsets, _check.INTEGERS)
    _check.ndim(_OP, name, offsets, f"({symbol}+1,)")
    if offsets.shape[0] == 0:
        _check.fail(_OP, name, f"of shape ({symbol} + 1,), {symbol} >= 0", (0,))
    _check.same_device(_OP, name, offsets, "logprob", logprob.device)
    if offsets.is_cpu and not torch.compiler.is_compiling():
        # elsewhere reading the values would stall the device
        tokens, bounds = logprob.shape[0], offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            got = bounds if len(bounds) <= 8 else f"{str(bounds[:4])[:-1]}, ..., {bounds[-1]}]"
            _check.fail(_OP, name, f"to rise from 0 to T = {tokens}", got)


def _check_segments(
    logprob: Tensor, cu_segments: Tensor | None, objective: PolicyObjective
) -> None:
    level = objective.importance_sampling_level
    if (level == "segment") != (cu_segments is not None):
        wanted = "of shape (K + 1,)" if level == "segment" else "to be None"
        got = None if cu_segments is None else tuple(getattr(cu_segments, "shape", ()))
        _check.fail(_OP, "cu_segments", f"{wanted} with importance_sampling_level={level!r}", got)
    if cu_segments is None:
        return
    if logprob.ndim != 1:
        _check.fail(_OP, "logprob", "of shape (T,) with cu_segments", tuple(logprob.shape))
    _check_offsets("cu_segments", cu_segments, logprob)
