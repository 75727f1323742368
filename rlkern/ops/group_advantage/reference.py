"""Group-relative advantages in plain torch: the specification.

With m_g the mean of group g, s_g its standard deviation, n_g its rows, b_g and c_g its largest and
second largest reward:

    grpo        (r - m_g) / (s_g + epsilon)
    dr_grpo      r - m_g
    rloo         r - mean of the other rows of g = (r - m_g) n_g / (n_g - 1)
    batch_std   (r - m_g) / (s of all rows + epsilon)
    maxrl       (r - m_g) / (m_g + epsilon)
    passk        b_g - c_g for the first row with b_g, 0 for the others
    grpo_passk  (b_g - c_g) / (s_g + epsilon), likewise

A row of weight w counts as w rows: m = sum w r / sum w, s^2 = sum w (r - m)^2 / (sum w - 1).

Computed in float32, or in float64 for float64 rewards. Sums run over r - (first reward of the
group), so that a group of equal rewards has deviations of exactly 0.
"""

import torch
from torch import Tensor

KINDS = ("grpo", "dr_grpo", "rloo", "batch_std", "maxrl", "passk", "grpo_passk")
"""The schema carries a kind as its index here; csrc and Triton follow the same order."""


def forward(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    kind: int,
    num_groups: int,
    epsilon: float,
) -> Tensor:
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    if rewards.shape[0] == 0:
        return rewards.new_empty(0)
    counted, slot, values, weight = _rows(rewards, group_ids, mask, weights, num_groups)
    count, mean, squares, deviation = _moments(values, weight, slot, num_groups)

    name = KINDS[kind]
    if name in ("passk", "grpo_passk"):
        deviation = torch.where(deviation.isnan(), deviation, _lead(values, slot, num_groups))
    denominator = torch.ones_like(values)
    if name in ("grpo", "grpo_passk"):
        denominator = _std(squares, count)[slot] + epsilon
    elif name == "batch_std":
        shifted = values - values[counted.to(torch.uint8).argmax()]
        total = _masked_sum(weight, counted)
        shifted = torch.where(counted, shifted - _masked_sum(weight * shifted, counted) / total, 0)
        denominator = _std((weight * shifted**2).sum(), total) + epsilon
    elif name == "rloo":
        denominator = ((count - 1) / count)[slot]
    elif name == "maxrl":
        denominator = mean[slot] + epsilon
    # a denominator of 0 belongs to a group of one row or of equal rewards: its deviations are 0
    advantages = deviation / torch.where(denominator == 0, 1.0, denominator)
    inside = (group_ids >= 0) & (group_ids < num_groups)
    advantages = torch.where(inside, advantages, float("nan"))
    return advantages if mask is None else torch.where(mask, advantages, 0.0)


def moments(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    num_groups: int,
) -> Tensor:
    """(3, num_groups) float64: count (the sum of weights), mean and standard deviation of groups.

    An empty group has (0, 0, 0); a NaN or infinite reward makes mean and deviation NaN.
    """
    rewards = rewards.double()
    if rewards.shape[0] == 0:
        return rewards.new_zeros(3, num_groups)
    _, slot, values, weight = _rows(rewards, group_ids, mask, weights, num_groups)
    count, mean, squares, _ = _moments(values, weight, slot, num_groups)
    return torch.stack([count, mean, _std(squares, count)])[:, :num_groups]


def _rows(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows count, their group, reward and weight; rows that do not, in one group more."""
    counted = (group_ids >= 0) & (group_ids < num_groups)
    if mask is not None:
        counted = counted & mask
    slot = torch.where(counted, group_ids, num_groups)
    values = torch.where(counted, rewards, 0.0)
    weight = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    return counted, slot, values, torch.where(counted, weight, 1.0)


def _moments(
    values: Tensor, weight: Tensor, slot: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean and squared deviations by group; deviation by row, NaN in a broken group."""
    count = _sums(weight, slot, num_groups)
    first = _first(values, slot, num_groups)
    shifted = values - first[slot]
    offset = _sums(weight * shifted, slot, num_groups) / count
    # a group without weight has no mean, but 0 times NaN is still to be seen
    offset = torch.where(count == 0, _sums(weight * shifted, slot, num_groups), offset)
    deviation = torch.where((count == 0)[slot], 0.0, shifted) - offset[slot]
    # an infinite reward makes its whole group NaN, wherever it stands in it
    broken = _sums((~deviation.isfinite()).to(values.dtype), slot, num_groups) > 0
    deviation = torch.where(broken[slot], float("nan"), deviation)
    squares = _sums(weight * deviation**2, slot, num_groups)
    mean = torch.where(count == 0, 0.0, first + offset)
    mean = torch.where(broken, float("nan"), mean)
    return count, mean, squares, deviation


def _std(squares: Tensor, count: Tensor) -> Tensor:
    return (squares / torch.where(count > 1, count - 1, 1.0)).sqrt()


def _lead(values: Tensor, slot: Tensor, num_groups: int) -> Tensor:
    """How far the best row of each group is ahead of the second; 0 for the other rows."""

    def largest(values: Tensor) -> Tensor:
        lowest = values.new_full((num_groups + 1,), -float("inf"))
        return lowest.scatter_reduce(0, slot, values, "amax")

    rows = torch.arange(values.shape[0], device=values.device)
    best = largest(values)
    candidate = torch.where(values == best[slot], rows, values.shape[0])
    winner = torch.full_like(best, values.shape[0], dtype=rows.dtype)
    winner = winner.scatter_reduce(0, slot, candidate, "amin")
    wins = rows == winner[slot]
    second = largest(torch.where(wins, -float("inf"), values))
    lead = torch.where(second.isfinite(), best - second, 0.0)
    return torch.where(wins, lead[slot], 0.0)


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
