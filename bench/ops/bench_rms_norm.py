"""`rms_norm` against the copy of its bytes and the modules' own calls, plain and with RoPE."""

from typing import NamedTuple

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.rms_norm import reference
from rlkern.ops.rms_norm.samples import bytes_and_flops

OP = "rms_norm"


class Step(NamedTuple):
    tokens: int
    heads: int  # 0: whole tokens
    width: int


STEPS = {
    "smoke": Step(4, 2, 16),
    "hidden-64": Step(64, 0, 1024),
    "hidden-4k": Step(4096, 0, 4096),
    "heads-64": Step(64, 16, 128),
    "heads-4k": Step(4096, 32, 128),
}
CASES = [Case("smoke"), *(Case(shape, "bfloat16") for shape in list(STEPS)[1:])]
VARIANTS = [harness.LIMIT, "rlkern", "eager", "compile"]


def problem(case: Case, device: str) -> Problem:
    step = STEPS[case.shape]
    dtype = getattr(torch, case.dtype)
    shape = (step.tokens, step.heads, step.width) if step.heads else (step.tokens, step.width)
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(step.width, device=device).to(dtype)
    rope = {}
    if step.heads:
        angle = torch.rand(step.tokens, step.width // 2, device=device)
        rope = {"cos": angle.cos(), "sin": angle.sin()}

    def eager(x):
        return reference.forward(x, weight, 1e-6, rope.get("cos"), rope.get("sin"))

    compiled = peers.compiled(eager)
    variants = {
        "rlkern": lambda: rlkern.rms_norm(x, weight, **rope),
        "eager": lambda: eager(x),
        "compile": lambda: compiled(x),
    }
    num_bytes, _ = bytes_and_flops(x.numel(), x.element_size())
    return Problem(variants, "copy", step._asdict(), num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
