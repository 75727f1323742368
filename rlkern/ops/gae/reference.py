"""Generalised advantage estimation in plain torch: the specification.

Over the tokens of a sequence that count, from the last to the first, both sums 0 past the end:

    A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}
    returns_t = A_t + V_t
    whitened: (A_t - mean) / sqrt(var + 1e-8), over all tokens that count, n - 1 in the variance

Computed in float32, or in float64 for float64 inputs. What does not count has 0 in both results.
"""

import torch
from torch import Tensor


def forward(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns)."""
    tokens = rewards.shape[0]
    bounds = cu_seqlens.long().clamp(0, tokens)
    begin, length = bounds[:-1], bounds.diff().clamp(min=0)
    counted = torch.zeros(tokens, dtype=torch.bool, device=rewards.device)
    advantages = torch.zeros_like(rewards)
    next_value = rewards.new_zeros(length.shape[0])
    next_advantage = torch.zeros_like(next_value)
    for step in range(int(length.max()) if length.numel() else 0):
        at = begin + length - 1 - step
        counts = length > step
        at = torch.where(counts, at, 0)
        if mask is not None:
            counts = counts & mask[at]
        value = values[at]
        delta = rewards[at] + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(counts, value, next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
        advantages[at[counts]] = advantage[counts]
        counted[at[counts]] = True
    returns = torch.where(counted, advantages + values, 0.0)
    if whiten:
        count = counted.sum()
        mean = advantages.sum() / count.clamp(min=1)
        squares = torch.where(counted, advantages - mean, 0.0).square().sum()
        scale = (squares / (count - 1).clamp(min=1) + 1e-8).rsqrt()
        advantages = torch.where(counted, (advantages - mean) * scale, 0.0)
    return advantages, returns
