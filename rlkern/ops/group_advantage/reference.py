"""Group-relative advantages in plain torch: the specification.

With n rows in group g, mean m_g, and s the standard deviation with n - 1 in its denominator:

    grpo       (r - m_g) / (s_g + epsilon)
    dr_grpo     r - m_g
    rloo        r - mean of the other rows of g = (r - m_g) n / (n - 1)
    batch_std  (r - m_g) / (s of all rows + epsilon)

Computed in float32, or in float64 for float64 rewards. Sums run over r - (first reward of the
group), so that a group of equal rewards has deviations of exactly 0.
"""

import torch
from torch import Tensor

KINDS = ("grpo", "dr_grpo", "rloo", "batch_std")
"""The schema carries a kind as its index here; csrc and Triton follow the same order."""


def forward(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    kind: int,
    num_groups: int,
    epsilon: float,
) -> Tensor:
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    if rewards.shape[0] == 0:
        return rewards.new_empty(0)
    inside = (group_ids >= 0) & (group_ids < num_groups)
    counted = inside if mask is None else inside & mask
    # rows that count nowhere gather in one group more
    slot = torch.where(counted, group_ids, num_groups)
    values = torch.where(counted, rewards, 0.0)
    count = _sums(torch.ones_like(values), slot, num_groups)
    deviation = values - _first(values, slot, num_groups)[slot]
    deviation = deviation - (_sums(deviation, slot, num_groups) / count)[slot]
    # an infinite reward makes its whole group NaN, wherever it stands in it
    deviation = torch.where(deviation.isfinite(), deviation, float("nan"))
    broken = _sums(deviation.isnan().to(values.dtype), slot, num_groups) > 0
    deviation = torch.where(broken[slot], float("nan"), deviation)

    name = KINDS[kind]
    if name == "grpo":
        variance = _sums(deviation**2, slot, num_groups) / (count - 1).clamp(min=1)
        denominator = variance.sqrt()[slot] + epsilon
    elif name == "batch_std":
        shifted = values - values[counted.to(torch.uint8).argmax()]
        total = counted.sum()
        shifted = torch.where(counted, shifted - _masked_sum(shifted, counted) / total, 0.0)
        denominator = ((shifted**2).sum() / (total - 1).clamp(min=1)).sqrt() + epsilon
    elif name == "rloo":
        denominator = ((count - 1) / count)[slot]
    else:
        denominator = torch.ones_like(values)
    # a denominator of 0 belongs to a group of one row or of equal rewards: its deviations are 0
    advantages = deviation / torch.where(denominator == 0, 1.0, denominator)
    advantages = torch.where(inside, advantages, float("nan"))
    return advantages if mask is None else torch.where(mask, advantages, 0.0)


def _sums(values: Tensor, slot: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups + 1).index_add_(0, slot, values)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum()


def _first(values: Tensor, slot: Tensor, num_groups: int) -> Tensor:
    """The first value of each group in row order; any value for an empty group."""
    rows = torch.arange(values.shape[0], device=values.device)
    first = torch.zeros(num_groups + 1, dtype=rows.dtype, device=rows.device)
    first = first.scatter_reduce(0, slot, rows, "amin", include_self=False)
    return values[first]
