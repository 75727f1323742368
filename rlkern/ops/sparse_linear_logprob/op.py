"""Schemas, fakes, autograd and owners of `sparse_linear_logprob`."""

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.sparse_linear_logprob import reference


def _fake_fwd(hidden, weight, targets, kept_ids, *rest):
    want_entropy, want_logits = rest[-2:]
    rows = hidden.shape[0]
    stat = hidden.new_empty((rows,), dtype=torch.float32)
    entropy = hidden.new_empty((rows if want_entropy else 0,), dtype=torch.float32)
    slots = kept_ids.shape[0] if want_logits else 0
    logits = hidden.new_empty((slots,), dtype=torch.float32)
    target_slot = targets.new_empty((rows if want_logits else 0,), dtype=torch.int64)
    return stat, torch.empty_like(stat), entropy, logits, target_slot


def _fake_bwd(a, c, b, hidden, weight, *rest):
    need_hidden, need_weight = rest[-2:]
    grad_hidden = hidden.new_empty((hidden.shape[0] if need_hidden else 0, hidden.shape[1]))
    return grad_hidden, weight.new_empty((weight.shape[0] if need_weight else 0, weight.shape[1]))


_library.define(
    "sparse_linear_logprob_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor kept_ids, "
    "Tensor kept_offsets, Tensor? row_temperature, float temperature, int ignore_index, "
    "bool want_entropy, bool want_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
_library.define(
    "sparse_linear_logprob_bwd(Tensor? grad_logprob, Tensor? grad_logsumexp, "
    "Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor kept_ids, Tensor kept_offsets, "
    "Tensor logits, Tensor target_slot, Tensor logsumexp, Tensor entropy, "
    "Tensor? row_temperature, float temperature, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor)",
    _fake_bwd,
)
_TRITON = "rlkern.ops.sparse_linear_logprob.triton"
_library.fill("sparse_linear_logprob_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("sparse_linear_logprob_bwd", reference.backward, f"{_TRITON}:backward")


class SparseLinearLogprob(torch.autograd.Function):
    """(logprob, logsumexp, entropy); keeps the kept tokens' logits for the backward."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        targets,
        kept_ids,
        kept_offsets,
        row_temperature,
        temperature,
        ignore_index,
        want_entropy,
        want_logits,
    ):
        # float64 is for checking formulas: the reference alone computes in it
        double = hidden.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.sparse_linear_logprob_fwd
        logprob, logsumexp, entropy, logits, target_slot = run(
            hidden,
            weight,
            targets,
            kept_ids,
            kept_offsets,
            row_temperature,
            temperature,
            ignore_index,
            want_entropy,
            want_logits,
        )
        saved = (kept_ids, kept_offsets, logits, target_slot, logsumexp, entropy, row_temperature)
        ctx.save_for_backward(hidden, weight, *saved)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprob, logsumexp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_logsumexp, grad_entropy):
        hidden, entropy = ctx.saved_tensors[0], ctx.saved_tensors[-2]
        double = hidden.dtype == torch.float64
        run = reference.backward if double else torch.ops.rlkern.sparse_linear_logprob_bwd
        if entropy.numel() == 0:
            grad_entropy = None
        grads = [
            None if g is None else g.contiguous()
            for g in (grad_logprob, grad_logsumexp, grad_entropy)
        ]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = run(
            *grads, *ctx.saved_tensors, ctx.temperature, need_hidden, need_weight
        )
        return (
            grad_hidden if need_hidden else None,
            grad_weight if need_weight else None,
            *(None,) * 8,
        )
