"""Schema, fake, autograd and owners of `value_loss`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.value_loss import reference

METRICS = ("num_tokens", "vf_clipfrac", "vpred_mean")


def _fake(values, *rest):
    want_grad = rest[-1]
    grad = values.new_empty(values.shape if want_grad else (0,))
    return values.new_empty(()), values.new_empty((len(METRICS),)), grad


_library.define(
    "value_loss_fwd(Tensor values, Tensor returns, Tensor? old_values, Tensor cu_seqlens, "
    "Tensor? mask, float cliprange, int denominator, bool divide_by_length, float scale, "
    "bool want_grad) -> (Tensor, Tensor, Tensor)",
    _fake,
)
_library.fill("value_loss_fwd", reference.forward, "rlkern.ops.value_loss.triton:forward")


class ValueLoss(torch.autograd.Function):
    """(loss, metrics); the forward pass has the gradient already, up to the upstream scalar."""

    @staticmethod
    def forward(ctx, values: Tensor, tensors: tuple, constants: tuple):
        # float64 is for checking formulas: the reference alone computes in it
        double = values.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.value_loss_fwd
        loss, metrics, grad = run(values, *tensors, *constants, ctx.needs_input_grad[0])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None or not ctx.needs_input_grad[0]:
            return None, None, None
        return ctx.saved_tensors[0] * grad_loss, None, None
