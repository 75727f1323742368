"""`segment_reduce` (mean) against the copy of its bytes and the ways that trainers write it.

The limit of forward and backward also writes the gradient. `eager` scatters by sequence ids that it
is given; `eager-loop` splits and stacks.
"""

from typing import NamedTuple

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.segment_reduce.samples import bytes_and_flops

OP = "segment_reduce"


class Batch(NamedTuple):
    sequences: int
    longest: int


BATCHES = {
    "smoke": Batch(4, 16),
    "64x1k": Batch(64, 1024),
    "1024x1k": Batch(1024, 1024),
    "8x128k": Batch(8, 131072),
}
BOTH = ("forward", "forward+backward")
CASES = [
    *(Case("smoke", passes=passes) for passes in BOTH),
    *(Case(shape, passes=passes) for shape in ("64x1k", "1024x1k", "8x128k") for passes in BOTH),
]
VARIANTS = [harness.LIMIT, "rlkern", "eager", "eager-loop", "compile"]


def problem(case: Case, device: str) -> Problem:
    sequences, longest = BATCHES[case.shape]
    lengths = torch.randint(longest // 2, longest + 1, (sequences,))
    sizes = lengths.tolist()
    tokens = sum(sizes)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    ids = torch.arange(sequences).repeat_interleave(lengths).to(device)
    lengths = lengths.to(device)
    values = torch.randn(tokens, device=device)
    upstream = torch.randn(sequences, device=device)
    backward = case.passes == "forward+backward"

    def ours(values):
        return rlkern.segment_reduce(values, cu_seqlens, kind="mean")

    def scattered(values):
        return values.new_zeros(sequences).index_add(0, ids, values) / lengths

    def looped(values):
        return torch.stack([part.mean() for part in values.split(sizes)])

    def call(function):
        if not backward:
            return lambda: function(values)
        leaf = values.detach().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf), leaf, upstream)

    variants = {
        "rlkern": call(ours),
        "eager": call(scattered),
        "eager-loop": call(looped),
        "compile": call(peers.compiled(scattered)),
    }
    num_bytes, _ = bytes_and_flops(tokens, sequences, values.element_size())
    if backward:
        num_bytes += tokens * values.element_size()
    return Problem(variants, "copy", BATCHES[case.shape]._asdict() | {"tokens": tokens}, num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
