"""`value_loss`, forward and backward, against the copy of its bytes and eager torch.

`eager` is verl's compute_value_loss with its metric.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.value_loss.samples import bytes_and_flops

OP = "value_loss"
CLIPRANGE = 0.2


class Batch(NamedTuple):
    sequences: int
    longest: int


BATCHES = {
    "smoke": Batch(4, 16),
    "64x1k": Batch(64, 1024),
    "1024x1k": Batch(1024, 1024),
}
CASES = [Case(shape, passes="forward+backward") for shape in BATCHES]
VARIANTS = [harness.LIMIT, "rlkern", "eager", "compile"]


def eager(values: Tensor, returns: Tensor, old_values: Tensor, mask: Tensor) -> tuple:
    clipped = torch.clamp(values, old_values - CLIPRANGE, old_values + CLIPRANGE)
    plain, other = (values - returns) ** 2, (clipped - returns) ** 2
    count = mask.sum()
    loss = 0.5 * (torch.max(plain, other) * mask).sum() / count
    return loss, ((other > plain) * mask).sum() / count


def problem(case: Case, device: str) -> Problem:
    sequences, longest = BATCHES[case.shape]
    old_values = torch.rand(sequences, longest, device=device)
    values = (old_values + 0.3 * torch.randn_like(old_values)).requires_grad_()
    returns = torch.rand(sequences, longest, device=device)
    lengths = torch.randint(longest // 2, longest + 1, (sequences, 1), device=device)
    mask = torch.arange(longest, device=device) < lengths
    numbers = mask.float()
    compiled = peers.compiled(eager)

    def call(function):
        return lambda: torch.autograd.grad(function(), values)

    def ours():
        return rlkern.value_loss(values, returns, old_values, mask=mask, cliprange=CLIPRANGE).loss

    variants = {
        "rlkern": call(ours),
        "eager": call(lambda: eager(values, returns, old_values, numbers)[0]),
        "compile": call(lambda: compiled(values, returns, old_values, numbers)[0]),
    }
    num_bytes, _ = bytes_and_flops(values.numel())
    return Problem(variants, "copy", BATCHES[case.shape]._asdict(), num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
