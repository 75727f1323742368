"""Megatron-LM: linear_cross_entropy over a vocabulary in parts. docs/integrations/megatron.md."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

import rlkern
from rlkern import _check
from rlkern._peers import Peer
from rlkern.integrations._handle import Handle

MEGATRON = Peer("megatron-core", "of January 2026")
_HANDLE = Handle()
_OP = "integrations.megatron"
_PATH = "megatron.core.fusions.fused_linear_cross_entropy.linear_cross_entropy"
_CALL = (
    *("hidden", "weight", "labels", "tp_group", "reduction", "ignore_index"),
    "sequence_parallel",
)


def enable() -> Handle:
    """`linear_cross_entropy` is rlkern's wherever Megatron has imported it.

    Raises:
        RuntimeError: Megatron-core is missing, or its function has other parameters.
    """
    if _HANDLE.enabled:
        return _HANDLE
    original = MEGATRON.takes(_OP, _PATH, _CALL)
    _HANDLE.replace("megatron", (original, linear_cross_entropy))
    return _HANDLE


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: ProcessGroup | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    sequence_parallel: bool = False,
) -> Tensor:
    """Minus the log-prob of labels, called as Megatron's; see `logprobs` for the rest.

    Returns:
        float32: of the shape of labels with reduction "none"; a scalar with "sum", or "mean" over
        the labels that are not ignore_index.
    """
    _check.one_of(_OP, "reduction", reduction, ("none", "sum", "mean"))
    out = logprobs(
        *(hidden, weight, labels, tp_group),
        ignore_index=ignore_index,
        sequence_parallel=sequence_parallel,
    )
    if reduction == "none":
        return -out.logprob
    total = -out.logprob.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


def logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    sequence_parallel: bool = False,
    **options: Any,
) -> rlkern.LogprobOutput:
    """`linear_logprob` as a Megatron output layer sees its tensors; outputs of labels' shape.

    Args:
        hidden: (..., H), tokens in the order of labels; with sequence_parallel this rank's part of
            the first dimension.
        weight: (V / ranks, H), this rank's part of the vocabulary.
        labels: all of them, the same on every rank.
        options: of `linear_logprob`: outputs, temperature, ...

    The gradient of hidden is complete on every rank; with sequence_parallel it is this rank's part.
    """
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    if sequence_parallel and tp_group is not None:
        hidden = _Gathered.apply(hidden, tp_group)
    out = rlkern.linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        ignore_index=ignore_index,
        tp_group=tp_group,
        **options,
    )
    values = (None if x is None else x.view(*labels.shape, *x.shape[1:]) for x in out)
    return rlkern.LogprobOutput(*values)


class _Gathered(torch.autograd.Function):
    """All ranks' parts in order; backwards this rank's part of a gradient that all ranks have."""

    @staticmethod
    def forward(ctx, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, part.shape[0]
        whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, part.contiguous(), group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        start = ctx.group.rank() * ctx.rows
        return grad[start : start + ctx.rows].contiguous(), None
