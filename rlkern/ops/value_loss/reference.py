"""The clipped value loss in plain torch: the specification.

    V' = clip(V, V_old - c, V_old + c)
    L = 1/2 max((V - R)^2, (V' - R)^2)
    loss = sum w L,  w = scale / denominator [/ n_i]
    d L / d V = V - R, and 0 where (V' - R)^2 is the larger

Computed in float32, or in float64 for float64 values. `forward` also returns
grad = d loss / d V, which autograd through its loss reproduces.
"""

import torch
from torch import Tensor

NOTHING, TOKENS, FILLED_SEQUENCES, ALL_SEQUENCES = range(4)
"""As in policy_loss: what the weighted token losses are divided by."""


def forward(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    cliprange: float,
    denominator: int,
    divide_by_length: bool,
    scale: float,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, metrics, grad); a gradient not wanted is empty."""
    tokens, sequences = values.shape[0], cu_seqlens.shape[0] - 1
    position = torch.arange(tokens, device=values.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), position, right=True)
    valid = (position >= cu_seqlens[0]) & (sequence < sequences)
    if mask is not None:
        valid = valid & mask
    sequence = sequence.clamp(max=max(sequences - 1, 0))

    # masked slots may hold NaN or inf: replaced before any arithmetic
    v, r = (torch.where(valid, x, 0.0) for x in (values, returns))
    error = v - r
    clipped = torch.zeros_like(valid)
    loss = error**2
    if old_values is not None:
        old = torch.where(valid, old_values, 0.0).detach()
        inside = torch.minimum(torch.maximum(v.detach(), old - cliprange), old + cliprange)
        other = (inside - r) ** 2
        clipped = other > loss
        # also where an old value is NaN
        loss = torch.where(clipped | other.isnan(), other, loss)

    lengths = values.new_zeros(sequences).index_add(0, sequence, valid.to(values.dtype))
    weight = torch.full_like(lengths, scale)
    if denominator == TOKENS:
        weight = weight / lengths.sum().clamp(min=1)
    elif denominator == FILLED_SEQUENCES:
        weight = weight / (lengths > 0).sum().clamp(min=1)
    elif denominator == ALL_SEQUENCES:
        weight = weight / max(sequences, 1)
    if divide_by_length:
        weight = weight / lengths.clamp(min=1)
    weight = torch.where(valid, weight[sequence], 0.0)

    total = 0.5 * (weight * loss).sum()
    grad = values.new_empty(0)
    if want_grad:
        grad = torch.where(clipped, 0.0, weight * error).detach()
    count = valid.sum().to(values.dtype)
    share = 1 / count.clamp(min=1)
    metrics = [count, clipped.sum() * share, v.detach().sum() * share]
    return total, torch.stack(metrics), grad
