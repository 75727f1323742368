"""Schemas, fakes, autograd and owners of `shared_prefix_attention`."""

import torch
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.shared_prefix_attention import reference


def _fake_fwd(q, k, v, subtree_end, cu_seqlens, scale, softcap):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_bwd(grad_out, grad_lse, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_TREE = "Tensor subtree_end, Tensor cu_seqlens, float scale, float softcap"
_library.define(
    f"shared_prefix_attention_fwd(Tensor q, Tensor k, Tensor v, {_TREE}) -> (Tensor, Tensor)",
    _fake_fwd,
)
_library.define(
    "shared_prefix_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_TREE}) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)
_TRITON = "rlkern.ops.shared_prefix_attention.triton"
_library.fill("shared_prefix_attention_fwd", reference.forward, f"{_TRITON}:forward")
_library.fill("shared_prefix_attention_bwd", reference.backward, f"{_TRITON}:backward")


class SharedPrefixAttention(torch.autograd.Function):
    """The backward computes the scores again."""

    @staticmethod
    def forward(ctx, q, k, v, *rest):
        """rest: subtree_end, cu_seqlens, scale, softcap. Returns out and lse."""
        # float64 is for checking formulas: the reference alone computes in it
        double = q.dtype == torch.float64
        run = reference.forward if double else torch.ops.rlkern.shared_prefix_attention_fwd
        out, lse = run(q, k, v, *rest)
        ctx.save_for_backward(q, k, v, out, lse, *rest[:2])
        ctx.scalars = rest[2:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, *tree = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        double = q.dtype == torch.float64
        run = reference.backward if double else torch.ops.rlkern.shared_prefix_attention_bwd
        grads = (grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous())
        return *run(*grads, q, k, v, out, lse, *tree, *ctx.scalars), *(None,) * 4
