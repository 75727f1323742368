"""What strategies ask for from outside, for the task of the demo: to bring digits into order."""

import torch
from torch import Tensor


def in_order(number: int, prompt: list[int]) -> list[int]:
    """For PrefixRL: an answer that is right. The prompt ends with "=", ids of digits rise."""
    return sorted(prompt[:-1])


def rising(number: int, tokens: Tensor) -> float:
    """For SMC: a log-potential that falls by 1 where a digit is below the one before."""
    digits = tokens[tokens > 1]
    return -float((digits.diff() < 0).sum())


def untrained(hidden: Tensor) -> Tensor:
    """For ARRoL: stands where a quality head would, and knows nothing."""
    return torch.sigmoid(hidden.float().mean(-1))
