"""Sums and means over the sequences of a packed batch."""

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.segment_reduce.op import SegmentReduce
from rlkern.ops.segment_reduce.reference import KINDS

_OP = "segment_reduce"


def segment_reduce(
    values: Tensor, cu_seqlens: Tensor, *, kind: str = "sum", mask: Tensor | None = None
) -> Tensor:
    """Sum or mean of the values of each sequence.

        sum[s]  = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]]
        mean[s] = sum[s] / max(1, how many there are)

    Equivalent torch program, a loop over the sequences::

        parts = values.float().split(cu_seqlens.diff().tolist())
        out = torch.stack([part.mean() if len(part) else part.sum() for part in parts])

    Args:
        values: (T,) float32, bfloat16 or float16. float64 is computed by the reference, in float64.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to T, not decreasing; S may be 0. The values are
            checked on the CPU only; elsewhere, and under torch.compile, values outside of all
            sequences are ignored.
        kind: "sum" or "mean".
        mask: (T,) bool, True where a value counts; all count without it. Masked slots may hold
            anything, NaN included, and get a gradient of exactly 0.

    Returns:
        (S,) float32. A sequence in which nothing counts has sum 0 and mean 0. A NaN or infinite
        value reaches its own sequence alone. Differentiable with respect to values.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Sums run in float64, in an order that a sequence's length alone decides: two runs give the same
    bits, with any number of threads and whatever the other sequences are.
    """
    _check.tensor(_OP, "values", values)
    _check.dtype(_OP, "values", values, _check.FLOATS)
    _check.ndim(_OP, "values", values, "(T,)")
    tokens = values.shape[0]
    _check.tensor(_OP, "cu_seqlens", cu_seqlens)
    _check.dtype(_OP, "cu_seqlens", cu_seqlens, _check.INTEGERS)
    _check.ndim(_OP, "cu_seqlens", cu_seqlens, "(S+1,)")
    if cu_seqlens.shape[0] == 0:
        _check.fail(_OP, "cu_seqlens", "of shape (S + 1,), S >= 0", (0,))
    _check.same_device(_OP, "cu_seqlens", cu_seqlens, "values", values.device)
    _check.one_of(_OP, "kind", kind, KINDS)
    if mask is not None:
        _check.tensor(_OP, "mask", mask)
        _check.dtype(_OP, "mask", mask, (torch.bool,))
        _check.shape(_OP, "mask", mask, (tokens,), "(T,)")
        _check.same_device(_OP, "mask", mask, "values", values.device)
        mask = mask.contiguous()
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        _check_bounds(cu_seqlens, tokens)
    return SegmentReduce.apply(values.contiguous(), cu_seqlens.contiguous(), mask, kind == "mean")


def _check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] == 0 and bounds[-1] == tokens and bounds == sorted(bounds):
        return
    got = bounds if len(bounds) <= 8 else f"{str(bounds[:4])[:-1]}, ..., {bounds[-1]}]"
    _check.fail(_OP, "cu_seqlens", f"to rise from 0 to T = {tokens}", got)
