"""Schemas, fakes, autograd and owners of `logprob_from_logits`."""

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.logprob_from_logits import reference


def _fake_fwd(logits, *rest):
    rows = logits.shape[0]
    stat = logits.new_empty((rows,), dtype=torch.float32)
    entropy = logits.new_empty((rows if rest[-1] else 0,), dtype=torch.float32)
    return stat, torch.empty_like(stat), entropy


def _fake_bwd(grad_logprob, grad_logsumexp, grad_entropy, logits, *rest):
    return logits.new_empty(logits.shape)


_library.define(
    "logprob_from_logits_fwd(Tensor logits, Tensor targets, Tensor? row_temperature, "
    "float temperature, float logit_scale, float softcap, int ignore_index, bool want_entropy) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_fwd,
)
_library.define(
    "logprob_from_logits_bwd(Tensor? grad_logprob, Tensor? grad_logsumexp, Tensor? grad_entropy, "
    "Tensor logits, Tensor targets, Tensor logsumexp, Tensor entropy, Tensor? row_temperature, "
    "float temperature, float logit_scale, float softcap, int ignore_index) -> Tensor",
    _fake_bwd,
)
_TRITON = "rlkern.ops.logprob_from_logits.triton"
_library.fill("logprob_from_logits_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("logprob_from_logits_bwd", reference.backward, f"{_TRITON}:backward")


class LogprobFromLogits(torch.autograd.Function):
    """(logprob, logsumexp, entropy); the gradient recomputes p from the logits it was given."""

    @staticmethod
    def forward(ctx, logits, targets, row_temperature, scalars, want_entropy):
        """scalars: (temperature, logit_scale, softcap, ignore_index)."""
        # float64 is for checking formulas: the reference alone computes in it
        double = logits.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.logprob_from_logits_fwd
        outputs = run(logits, targets, row_temperature, *scalars, want_entropy)
        ctx.save_for_backward(logits, targets, *outputs[1:], row_temperature)
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_logsumexp, grad_entropy):
        logits, targets, logsumexp, entropy, row_temperature = ctx.saved_tensors
        double = logits.dtype == torch.float64
        run = reference.backward if double else torch.ops.rlkern.logprob_from_logits_bwd
        if entropy.numel() == 0:
            grad_entropy = None
        grads = [
            None if g is None else g.contiguous()
            for g in (grad_logprob, grad_logsumexp, grad_entropy)
        ]
        saved = (logits, targets, logsumexp, entropy, row_temperature)
        return run(*grads, *saved, *ctx.scalars), *(None,) * 4
