"""The policy loss straight from hidden states, and its gradients in the same call."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops._logprob import Scalars
from rlkern.ops.policy_loss import PolicyObjective, policy_loss

_OP = "linear_policy_loss"
# Of logits, by default: all of those of 2048 tokens and the largest vocabularies of today.
KEEP_BYTES = 2**30


class LinearPolicyLossOutput(NamedTuple):
    loss: Tensor
    """float32 scalar to minimise"""
    logprob: Tensor
    """(T,) float32, of the targets; without a gradient"""
    entropy: Tensor
    """(T,) float32; without a gradient"""
    metrics: Mapping[str, Tensor]
    """as policy_loss"""


class _Given(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, *grads):
        ctx.save_for_backward(*grads)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        grads = ctx.saved_tensors
        # a gradient of weight is large: not multiplied by 1 where that can be seen for free
        if not (grad_loss.is_cpu and grad_loss.item() == 1):
            grads = [None if g is None else g * grad_loss.to(g.dtype) for g in grads]
        return *grads, None, None, None, None


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    objective: str | PolicyObjective = "grpo",
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    nll_weight: Tensor | None = None,
    cu_segments: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    vocab_mask: Tensor | None = None,
    logits_rounding: str | None = None,
    weight_grad: Tensor | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> LinearPolicyLossOutput:
    """policy_loss of linear_logprob's log-probs and entropies, and its gradients at once.

        out = linear_logprob(hidden, weight, targets, outputs=("logprob", "entropy"))
        loss = policy_loss(out.logprob, old_logprob, advantages, entropy=out.entropy)

    is the equivalent program; loss, metrics, logprob and entropy have its bits on CPU. That program
    takes four matmuls: its backward multiplies the logits out again, for only then does it know
    the gradient of the log-probs. This op knows the loss: it keeps logits, keep_bytes of them at
    most, until the loss has given their gradient, and multiplies out again only what is left of
    T V. Three matmuls where that is nothing. Tokens whose gradient is exactly 0 (clipped,
    advantage 0) drop out of all but the first, on CPU.

    Beside the gradients, what exists depends on T and H but not on V: the kept logits, and float32
    sums and packed copies of the tokens.

    Args:
        hidden, weight, targets: as linear_logprob, and so are bias, temperature, softcap,
            logit_scale, vocab_size, vocab_mask and logits_rounding; but that no target is ignored:
            pack the tokens that count. Not float64.
        old_logprob, advantages, cu_seqlens, objective: as policy_loss, packed, and so are
            ref_logprob, rollout_logprob, nll_weight, cu_segments and normalizer.
        weight_grad: (V, H) float32, contiguous: the gradient of weight is added to it in this call,
            for an upstream gradient of 1, and weight.grad stays as it is (Megatron's main_grad).
        keep_bytes: how much memory kept logits may take: speed for memory. A logit takes 4 bytes,
            and 2.5 where the inputs are bfloat16 on a CPU with AVX512-BF16; T V of them make it
            three matmuls, 0 keeps none and makes it four.

    Returns:
        LinearPolicyLossOutput; loss is differentiable with respect to hidden, weight and bias. The
        gradients exist when the function returns: backward() only scales them, once.

    Raises:
        ValueError, TypeError: as linear_logprob and policy_loss.

    Two runs give the same bits.
    """
    if isinstance(objective, str):
        objective = PolicyObjective.preset(objective)
    _logprob.check_head(_OP, hidden, weight, bias)
    if hidden.dtype == torch.float64:
        _check.dtype(_OP, "hidden", hidden, _check.FLOATS[:3])
    vocab = weight.shape[0]
    size = _logprob.check_vocab_size(_OP, vocab_size, vocab)
    temperatures, scalar = _logprob.split_temperature(_OP, temperature, hidden, "hidden")
    rows = _logprob.rows_of(_OP, hidden, "hidden", targets, None, vocab_mask, vocab, temperatures)
    # of no target: none is ignored
    nothing = torch.iinfo(torch.int64).min
    limits = _logprob.scalars_of(_OP, scalar, logit_scale, softcap, nothing)
    scalars = Scalars(*limits, size, _logprob.check_rounding(_OP, logits_rounding))
    for name, value in (("old_logprob", old_logprob), ("advantages", advantages)):
        _check.tensor(_OP, name, value)
    _check.shape(_OP, "old_logprob", old_logprob, (hidden.shape[0],), "(T,)")
    if weight_grad is not None:
        _check.tensor(_OP, "weight_grad", weight_grad)
        _check.dtype(_OP, "weight_grad", weight_grad, (torch.float32,))
        _check.shape(_OP, "weight_grad", weight_grad, weight.shape, "(V, H)")
        _check.same_device(_OP, "weight_grad", weight_grad, "hidden", hidden.device)
        if not weight_grad.is_contiguous():
            _check.fail(_OP, "weight_grad", "to be contiguous", weight_grad.stride())
    if isinstance(keep_bytes, bool) or not isinstance(keep_bytes, int):
        kind = type(keep_bytes).__name__
        raise TypeError(f"{_OP}: expected keep_bytes to be an int, got {kind}")
    if keep_bytes < 0:
        _check.fail(_OP, "keep_bytes", "to be at least 0", keep_bytes)
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    head = (
        hidden.detach() if hidden.stride(-1) == 1 else hidden.detach().contiguous(),
        weight.detach() if weight.stride(-1) == 1 else weight.detach().contiguous(),
        None if bias is None else bias.detach().contiguous(),
        *rows,
    )
    # no top-k, batch-invariant where that is a choice, the kernel's own chunks of vocabulary
    how = (*scalars, 0, False, 0)
    *stats, kept = torch.ops.rlkern.linear_logprob_fwd_keep(
        *head, *how, keep_bytes if trains else 0
    )
    logprob, logsumexp, entropy = stats[:3]

    # what the loss is differentiated by
    by = [logprob.detach().requires_grad_(trains)]
    if objective.needs_entropy:
        by.append(entropy.detach().requires_grad_(trains))
    value, metrics = policy_loss(
        by[0],
        old_logprob,
        advantages,
        cu_seqlens=cu_seqlens,
        objective=objective,
        ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob,
        entropy=by[1] if objective.needs_entropy else entropy,
        nll_weight=nll_weight,
        cu_segments=cu_segments,
        normalizer=normalizer,
    )
    if not trains:
        return LinearPolicyLossOutput(value, logprob, entropy, metrics)
    # entropies may only select tokens
    found = torch.autograd.grad(value, by, allow_unused=True)
    by_logprob, by_entropy = (*found, None)[:2]
    needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    found = torch.ops.rlkern.linear_logprob_bwd_kept(
        by_logprob,
        None,
        by_entropy,
        None,
        *head,
        logsumexp,
        entropy,
        *scalars,
        *how[-2:],
        kept,
        weight_grad if needs[1] else None,
        *needs,
    )
    needs[1] = needs[1] and weight_grad is None
    grads = [g if need else None for g, need in zip(found, needs)]
    value = _Given.apply(hidden, weight, bias, value.detach(), *grads)
    return LinearPolicyLossOutput(value, logprob, entropy, metrics)
