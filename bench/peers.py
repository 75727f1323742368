"""What each op is compared with: eager torch, the same under torch.compile, and other packages.

A peer of a package that is not installed is absent from the dictionary.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def logprob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    logprob = log_p.gather(-1, targets[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def linear_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits rounded to the inputs' dtype, as eager trainers have them."""
    return logprob_entropy(hidden @ weight.T, targets)


def trl_logprob_entropy() -> Callable | None:
    if importlib.util.find_spec("trl") is None:
        return None
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(logits, targets), entropy_from_logits(logits)

    return run


def scatter_advantage(rewards: Tensor, group_ids: Tensor, num_groups: int) -> Tensor:
    """GRPO for groups of any size, vectorised."""
    count = rewards.new_zeros(num_groups).index_add_(0, group_ids, torch.ones_like(rewards))
    mean = rewards.new_zeros(num_groups).index_add_(0, group_ids, rewards) / count
    deviation = rewards - mean[group_ids]
    squares = rewards.new_zeros(num_groups).index_add_(0, group_ids, deviation**2)
    std = (squares / (count - 1)).sqrt()
    return deviation / (std[group_ids] + 1e-6)


def reshaped_advantage(rewards: Tensor, samples: int) -> Tensor:
    """GRPO as TRL has it: groups of one size, in blocks."""
    grouped = rewards.view(-1, samples)
    mean = grouped.mean(dim=1).repeat_interleave(samples)
    std = grouped.std(dim=1).repeat_interleave(samples)
    return (rewards - mean) / (std + 1e-6)


def looped_advantage(rewards: Tensor, group_ids: list[int]) -> Tensor:
    """GRPO as verl's compute_grpo_outcome_advantage has it: a Python loop over rows."""
    members: dict[int, list[Tensor]] = {}
    for i, group in enumerate(group_ids):
        members.setdefault(group, []).append(rewards[i])
    stats = {}
    for group, values in members.items():
        stacked = torch.stack(values)
        stats[group] = (torch.mean(stacked), torch.std(stacked) + 1e-6)
    out = rewards.clone()
    for i, group in enumerate(group_ids):
        mean, scale = stats[group]
        out[i] = (rewards[i] - mean) / scale
    return out
