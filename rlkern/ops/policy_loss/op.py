"""Schema, fake, autograd and owners of `policy_loss`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.policy_loss import reference

METRICS = (
    "num_tokens",
    "pg_clipfrac",
    "pg_clipfrac_lower",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "ppo_kl",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "kl",
    "entropy",
    "rollout_is_mean",
    "rollout_is_eff_sample_size",
    "rollout_rs_masked_fraction",
    "ratio_variance",
)


def _fake(logprob, *rest):
    want_grad, want_entropy_grad = rest[-2:]
    loss = logprob.new_empty((), dtype=torch.float32)
    metrics = logprob.new_empty((len(METRICS),), dtype=torch.float32)
    grad = logprob.new_empty(logprob.shape if want_grad else (0,), dtype=torch.float32)
    grad_entropy = logprob.new_empty(
        logprob.shape if want_entropy_grad else (0,), dtype=torch.float32
    )
    return loss, metrics, grad, grad_entropy


_library.define(
    "policy_loss_fwd(Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor? cu_seqlens, "
    "Tensor? mask, Tensor? rollout_logprob, Tensor? ref_logprob, Tensor? entropy, "
    "Tensor? nll_weight, Tensor? cu_segments, int[] kinds, float[] numbers, bool want_grad, "
    "bool want_entropy_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_library.fill("policy_loss_fwd", reference.forward, "rlkern.ops.policy_loss.triton:forward")


class PolicyLoss(torch.autograd.Function):
    """(loss, metrics); the forward pass has the gradient already, up to the upstream scalar."""

    @staticmethod
    def forward(ctx, logprob: Tensor, entropy: Tensor | None, rest: tuple):
        # rest in one piece: autograd looks at each argument of its own
        # float64 is for checking formulas: the reference alone computes in it
        double = logprob.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.policy_loss_fwd
        *before, nll_weight, cu_segments, kinds, numbers = rest
        tensors = (logprob, *before, entropy, nll_weight, cu_segments)
        loss, metrics, *grads = run(*tensors, kinds, numbers, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return None, None, None
        grads = ctx.saved_tensors
        # loss.backward() passes 1: no pass over the tokens. Looking would stall a GPU.
        plain = type(grad_loss) is Tensor and grad_loss.is_cpu and not torch.compiler.is_compiling()
        wanted = ctx.needs_input_grad
        if not plain or grad_loss.item() != 1.0:
            grads = [c * grad_loss if w else c for c, w in zip(grads, wanted)]
        return *(c if w else None for c, w in zip(grads, wanted)), None
