"""Schemas, fakes, autograd and owners of `segment_reduce`."""

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.segment_reduce import reference


def _fake_fwd(values, cu_seqlens, mask, mean):
    segments = cu_seqlens.shape[0] - 1
    out = values.new_empty((segments,), dtype=torch.float32)
    return out, values.new_empty((segments if mean else 0,), dtype=torch.float32)


def _fake_bwd(grad, values, cu_seqlens, mask, count, mean):
    return values.new_empty(values.shape)


_library.define(
    "segment_reduce_fwd(Tensor values, Tensor cu_seqlens, Tensor? mask, bool mean) "
    "-> (Tensor, Tensor)",
    _fake_fwd,
)
_library.define(
    "segment_reduce_bwd(Tensor grad, Tensor values, Tensor cu_seqlens, Tensor? mask, "
    "Tensor count, bool mean) -> Tensor",
    _fake_bwd,
)
_TRITON = "rlkern.ops.segment_reduce.triton"
_library.fill("segment_reduce_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("segment_reduce_bwd", reference.backward, f"{_TRITON}:backward")


class SegmentReduce(torch.autograd.Function):
    """The sums or means; the gradient needs the counts alone."""

    @staticmethod
    def forward(ctx, values, cu_seqlens, mask, mean):
        # float64 is for checking formulas: the reference alone computes in it
        double = values.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.segment_reduce_fwd
        out, count = run(values, cu_seqlens, mask, mean)
        ctx.save_for_backward(values, cu_seqlens, mask, count)
        ctx.mean = mean
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, cu_seqlens, mask, count = ctx.saved_tensors
        double = values.dtype == torch.float64
        run = reference.backward if double else torch.ops.rlkern.segment_reduce_bwd
        return run(grad.contiguous(), values, cu_seqlens, mask, count, ctx.mean), None, None, None
