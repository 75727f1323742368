"""Schemas, fakes, autograd and owners of `linear_logprob`."""

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.linear_logprob import reference


def _fake_fwd(hidden, *rest):
    rows = hidden.shape[0]
    stat = hidden.new_empty((rows,), dtype=torch.float32)
    entropy = hidden.new_empty((rows if rest[-1] else 0,), dtype=torch.float32)
    return stat, torch.empty_like(stat), entropy


def _fake_bwd(a, c, b, hidden, weight, *rest):
    need_hidden, need_weight = rest[-2:]
    grad_hidden = hidden.new_empty((hidden.shape[0] if need_hidden else 0, hidden.shape[1]))
    return grad_hidden, weight.new_empty((weight.shape[0] if need_weight else 0, weight.shape[1]))


_library.define(
    "linear_logprob_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? row_temperature, "
    "float temperature, float logit_scale, float softcap, int ignore_index, bool want_entropy) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_fwd,
)
_library.define(
    "linear_logprob_bwd(Tensor? grad_logprob, Tensor? grad_logsumexp, Tensor? grad_entropy, "
    "Tensor hidden, Tensor weight, Tensor targets, Tensor logsumexp, Tensor entropy, "
    "Tensor? row_temperature, float temperature, float logit_scale, float softcap, "
    "int ignore_index, bool need_hidden, bool need_weight) -> (Tensor, Tensor)",
    _fake_bwd,
)
_TRITON = "rlkern.ops.linear_logprob.triton"
_library.fill("linear_logprob_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("linear_logprob_bwd", reference.backward, f"{_TRITON}:backward")


class LinearLogprob(torch.autograd.Function):
    """(logprob, logsumexp, entropy); the backward recomputes the logits block by block."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, row_temperature, scalars, want_entropy):
        """scalars: (temperature, logit_scale, softcap, ignore_index)."""
        # float64 is for checking formulas: the reference alone computes in it
        double = hidden.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.linear_logprob_fwd
        outputs = run(hidden, weight, targets, row_temperature, *scalars, want_entropy)
        ctx.save_for_backward(hidden, weight, targets, *outputs[1:], row_temperature)
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_logsumexp, grad_entropy):
        hidden, weight, targets, logsumexp, entropy, row_temperature = ctx.saved_tensors
        double = hidden.dtype == torch.float64
        run = reference.backward if double else torch.ops.rlkern.linear_logprob_bwd
        if entropy.numel() == 0:
            grad_entropy = None
        grads = [
            None if g is None else g.contiguous()
            for g in (grad_logprob, grad_logsumexp, grad_entropy)
        ]
        saved = (hidden, weight, targets, logsumexp, entropy, row_temperature)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = run(*grads, *saved, *ctx.scalars, need_hidden, need_weight)
        return (
            grad_hidden if need_hidden else None,
            grad_weight if need_weight else None,
            *(None,) * 4,
        )
