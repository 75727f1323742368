"""Schemas, fakes, autograd and owners of `linear_distill_loss`."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.linear_distill_loss import reference


class Scalars(NamedTuple):
    beta: float  # 0: forward KL, 1: reverse KL
    temperature: float
    logit_scale: float
    softcap: float  # 0: none
    teacher_logit_scale: float
    teacher_softcap: float
    vocab_size: int


def _fake_fwd(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, targets, *rest):
    rows = hidden.shape[0]

    def new(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    return new(rows), new(0 if targets is None else rows), new(rows), new(5, rows)


def _fake_bwd(grad_divergence, hidden, weight, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    vocab, depth = weight.shape
    return (
        hidden.new_empty((hidden.shape[0] if need_hidden else 0, depth)),
        weight.new_empty((vocab if need_weight else 0, depth)),
        weight.new_empty((vocab if need_bias else 0,)),
    )


_HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias"
)
_SCALARS = (
    "float beta, float temperature, float logit_scale, float softcap, float teacher_logit_scale, "
    "float teacher_softcap, int vocab_size"
)
_library.define(
    f"linear_distill_loss_fwd({_HEADS}, Tensor? targets, Tensor? row_temperature, {_SCALARS}, "
    "int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
_library.define(
    f"linear_distill_loss_bwd(Tensor grad_divergence, {_HEADS}, Tensor? row_temperature, "
    f"Tensor stats, {_SCALARS}, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)
_TRITON = "rlkern.ops.linear_distill_loss.triton"
_library.fill("linear_distill_loss_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("linear_distill_loss_bwd", reference.backward, f"{_TRITON}:backward")


class LinearDistillLoss(torch.autograd.Function):
    """(divergence, logprob, entropy), the last two without a gradient. The backward recomputes the
    logits of both heads."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        """rest: the teacher's hidden states, weight and bias, without a gradient, targets,
        row_temperature, Scalars, ignore_index."""
        teacher, (targets, row_temperature, scalars, ignore_index) = rest[:3], rest[3:]
        # float64 is for checking formulas: the reference alone computes in it
        double = hidden.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.linear_distill_loss_fwd
        heads = (hidden, weight, bias, *teacher)
        *outputs, stats = run(*heads, targets, row_temperature, *scalars, ignore_index)
        ctx.save_for_backward(*heads, row_temperature, stats)
        ctx.scalars = scalars
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_divergence, *_):
        if grad_divergence is None:
            return (None,) * 10
        double = ctx.saved_tensors[0].dtype == torch.float64
        run = reference.backward if double else torch.ops.rlkern.linear_distill_loss_bwd
        needs = ctx.needs_input_grad[:3]
        found = run(grad_divergence.contiguous(), *ctx.saved_tensors, *ctx.scalars, *needs)
        return *(g if need else None for g, need in zip(found, needs)), *(None,) * 7
