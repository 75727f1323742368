"""Sums and means of packed segments in plain torch: the specification.

    out[s] = sum of values[i] over the i of segment s that count     (mean: divided by their number)

Segment s is [cu_seqlens[s], cu_seqlens[s + 1]); an i counts where mask is True. A segment in which
nothing counts has sum and mean 0. Computed in float32, or in float64 for float64 values.
"""

import torch
from torch import Tensor

KINDS = ("sum", "mean")


def forward(
    values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, mean: bool
) -> tuple[Tensor, Tensor]:
    """The results, and how many values counted: of size (0,) for sums."""
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    segments = cu_seqlens.shape[0] - 1
    slot, counts = _slots(values, cu_seqlens, mask)
    terms = torch.where(counts, values.to(kind), 0.0)
    # what counts nowhere gathers in one slot more
    out = terms.new_zeros(segments + 1).index_add_(0, slot, terms)[:segments]
    if not mean:
        return out.clone(), out.new_empty(0)
    count = terms.new_zeros(segments + 1).index_add_(0, slot, counts.to(kind))[:segments].clone()
    return out / count.clamp(min=1), count


def backward(
    grad: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    count: Tensor,
    mean: bool,
) -> Tensor:
    """grad[s], or grad[s] / count[s], for what counts in segment s; 0 elsewhere."""
    slot, counts = _slots(values, cu_seqlens, mask)
    each = grad / count.clamp(min=1) if mean else grad
    each = torch.cat([each, each.new_zeros(1)])
    return torch.where(counts, each[slot], 0.0).to(values.dtype)


def _slots(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each value its segment, S where it counts in none; and whether it counts."""
    position = torch.arange(values.shape[0], device=values.device)
    segments = cu_seqlens.shape[0] - 1
    slot = torch.searchsorted(cu_seqlens[1:].long().contiguous(), position, right=True)
    counts = (position >= cu_seqlens[0]) & (slot < segments)
    if mask is not None:
        counts = counts & mask
    return torch.where(counts, slot, segments), counts
