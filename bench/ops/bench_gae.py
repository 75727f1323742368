"""`gae` against the copy of its bytes and the ways that trainers write it.

Padded rows of one length, without a mask. `eager-loop` is verl's loop over columns; `eager-matmul`
multiplies the one-step errors with the powers of gamma lam.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import rlkern
from bench import harness
from bench.harness import Case, Problem
from rlkern.ops.gae.samples import bytes_and_flops

OP = "gae"
GAMMA, LAM = 0.99, 0.95


class Batch(NamedTuple):
    sequences: int
    length: int


BATCHES = {
    "smoke": Batch(4, 16),
    "64x1k": Batch(64, 1024),
    "512x4k": Batch(512, 4096),
}
CASES = [Case(shape) for shape in BATCHES]
VARIANTS = [harness.LIMIT, "rlkern", "rlkern-whiten", "eager-loop", "eager-matmul"]
# its matrix of powers is length x length
LONGEST_MATMUL = 2048


def looped(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """verl's compute_gae_advantage_return without its mask and whitening."""
    after = carry = 0
    found = []
    for t in reversed(range(rewards.shape[1])):
        carry = rewards[:, t] + GAMMA * after - values[:, t] + GAMMA * LAM * carry
        after = values[:, t]
        found.append(carry)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages, advantages + values


def multiplied(rewards: Tensor, values: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages = (rewards + GAMMA * after - values) @ powers
    return advantages, advantages + values


def problem(case: Case, device: str) -> Problem:
    sequences, length = BATCHES[case.shape]
    rewards = torch.zeros(sequences, length, device=device)
    rewards[:, -1] = torch.randint(2, (sequences,)).to(rewards)
    values = torch.rand(sequences, length, device=device)
    options = {"gamma": GAMMA, "lam": LAM}
    variants = {
        "rlkern": lambda: rlkern.gae(rewards, values, **options),
        "rlkern-whiten": lambda: rlkern.gae(rewards, values, whiten=True, **options),
        "eager-loop": lambda: looped(rewards, values),
    }
    if length <= LONGEST_MATMUL:
        steps = torch.arange(length, device=device)
        apart = steps[:, None] - steps
        powers = torch.where(apart >= 0, (GAMMA * LAM) ** apart.clamp(min=0).float(), 0.0)
        variants["eager-matmul"] = lambda: multiplied(rewards, values, powers)
    num_bytes, _ = bytes_and_flops(sequences * length)
    return Problem(variants, "copy", BATCHES[case.shape]._asdict(), num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
