"""Schemas, fakes, autograd and owners of `logprob_from_logits`."""

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops import _logprob
from rlkern.ops._logprob import GRADS, RETURNS, ROWS, SCALARS, Rows, Stats
from rlkern.ops.logprob_from_logits import reference


def _fake_fwd(logits, targets, ids, *rest):
    return tuple(_logprob.empty_stats(logits, logits.shape[0], ids, rest[-1]))


def _fake_bwd(a, c, b, g, logits, *rest):
    return logits.new_empty(logits.shape)


_library.define(
    f"logprob_from_logits_fwd(Tensor logits, {ROWS}, {SCALARS}, int topk) -> {RETURNS}", _fake_fwd
)
_library.define(
    f"logprob_from_logits_bwd({GRADS}, Tensor logits, {ROWS}, Tensor logsumexp, Tensor entropy, "
    f"{SCALARS}) -> Tensor",
    _fake_bwd,
)
# writes the gradient over the logits
_library.define(
    f"logprob_from_logits_bwd_inplace({GRADS}, Tensor(a!) logits, {ROWS}, Tensor logsumexp, "
    f"Tensor entropy, {SCALARS}) -> ()",
    lambda *args: None,
)
_TRITON = "rlkern.ops.logprob_from_logits.triton"
_library.fill("logprob_from_logits_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("logprob_from_logits_bwd", reference.backward, f"{_TRITON}:backward")
_library.fill(
    "logprob_from_logits_bwd_inplace", reference.backward_inplace, f"{_TRITON}:backward_inplace"
)
_BACKWARD = {
    False: torch.ops.rlkern.logprob_from_logits_bwd,
    True: torch.ops.rlkern.logprob_from_logits_bwd_inplace,
}


class LogprobFromLogits(torch.autograd.Function):
    """The gradient recomputes p from the logits it was given."""

    @staticmethod
    def forward(ctx, logits, *rest):
        """rest: *Rows, Scalars, topk, inplace_backward; returns Stats."""
        rows, (scalars, topk, ctx.inplace) = Rows(*rest[:4]), rest[4:]
        # float64 is for checking formulas: the reference alone computes in it
        double = logits.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.logprob_from_logits_fwd
        stats = Stats(*run(logits, *rows, *scalars, topk))
        ctx.save_for_backward(logits, *rows, stats.logsumexp, stats.entropy, stats.topk_ids)
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(stats[i] for i in Stats.CONSTANTS))
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, a, c, b, _sum_sq, _top1, grad_ids, grad_topk, _topk_ids):
        logits, *rows, logsumexp, entropy, topk_ids = ctx.saved_tensors
        rows = Rows(*rows)
        grad_ids, ids = _logprob.with_topk(grad_ids, rows.ids, grad_topk, topk_ids)
        grads = [None if g is None else g.contiguous() for g in (a, c, b, grad_ids)]
        args = (*grads, logits, *rows._replace(ids=ids), logsumexp, entropy, *ctx.scalars)
        double = logits.dtype == torch.float64
        name = "backward_inplace" if ctx.inplace else "backward"
        run = getattr(reference, name) if double else _BACKWARD[ctx.inplace]
        grad = run(*args)
        if ctx.inplace:
            # a second backward, or whoever else kept the logits, must not read a gradient
            torch.autograd.graph.increment_version(logits)
            grad = logits
        return grad, *(None,) * 7
