"""Schemas, fakes, autograd and owners of `sparse_linear_logprob`."""

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.sparse_linear_logprob import reference


def _fake_fwd(hidden, weight, bias, targets, kept_ids, *rest):
    want_logits = rest[-1]
    rows = hidden.shape[0]
    stats = [hidden.new_empty((rows,), dtype=torch.float32) for _ in range(4)]
    is_top1 = hidden.new_empty((rows,), dtype=torch.bool)
    slots = kept_ids.shape[0] if want_logits else 0
    logits = hidden.new_empty((slots,), dtype=torch.float32)
    target_slot = targets.new_empty((rows if want_logits else 0,), dtype=torch.int64)
    return *stats, is_top1, logits, target_slot


def _fake_bwd(a, c, b, hidden, weight, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    vocab, depth = weight.shape
    grad_hidden = hidden.new_empty((hidden.shape[0] if need_hidden else 0, depth))
    grad_weight = weight.new_empty((vocab if need_weight else 0, depth))
    return grad_hidden, grad_weight, weight.new_empty((vocab if need_bias else 0,))


_library.define(
    "sparse_linear_logprob_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor kept_ids, Tensor kept_offsets, Tensor? row_temperature, float temperature, "
    "float logit_scale, float softcap, int ignore_index, bool round_logits, bool want_logits) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
_library.define(
    "sparse_linear_logprob_bwd(Tensor? grad_logprob, Tensor? grad_logsumexp, "
    "Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor kept_ids, Tensor kept_offsets, "
    "Tensor logits, Tensor target_slot, Tensor logsumexp, Tensor entropy, "
    "Tensor? row_temperature, float temperature, float logit_scale, float softcap, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)
_TRITON = "rlkern.ops.sparse_linear_logprob.triton"
_library.fill("sparse_linear_logprob_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("sparse_linear_logprob_bwd", reference.backward, f"{_TRITON}:backward")


class SparseLinearLogprob(torch.autograd.Function):
    """(logprob, logsumexp, entropy, sum_sq_prob, is_top1), the last two without a gradient; keeps
    the kept tokens' logits for the backward."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        kept_ids,
        kept_offsets,
        row_temperature,
        scalars,
        round_logits,
        want_logits,
    ):
        """scalars: (temperature, logit_scale, softcap, ignore_index)."""
        # float64 is for checking formulas: the reference alone computes in it
        double = hidden.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.sparse_linear_logprob_fwd
        inputs = (hidden, weight, bias, targets, kept_ids, kept_offsets, row_temperature)
        *outputs, logits, target_slot = run(*inputs, *scalars, round_logits, want_logits)
        _, logsumexp, entropy, sum_sq_prob, is_top1 = outputs
        saved = (kept_ids, kept_offsets, logits, target_slot, logsumexp, entropy, row_temperature)
        ctx.save_for_backward(hidden, weight, *saved)
        ctx.scalars = scalars[:3]
        ctx.mark_non_differentiable(sum_sq_prob, is_top1)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_logsumexp, grad_entropy, *_):
        double = ctx.saved_tensors[0].dtype == torch.float64
        run = reference.backward if double else torch.ops.rlkern.sparse_linear_logprob_bwd
        upstream = [
            None if g is None else g.contiguous()
            for g in (grad_logprob, grad_logsumexp, grad_entropy)
        ]
        needs = ctx.needs_input_grad[:3]
        grads = run(*upstream, *ctx.saved_tensors, *ctx.scalars, *needs)
        return *(g if need else None for g, need in zip(grads, needs)), *(None,) * 7
