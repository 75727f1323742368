"""`smc_resample` against the copy of its bytes and a loop over groups in torch operations."""

from typing import NamedTuple

import pytest
import torch

import rlkern
from bench import harness
from bench.harness import Case, Problem
from rlkern.ops.smc_resample import reference
from rlkern.ops.smc_resample.samples import bytes_and_flops

OP = "smc_resample"


class Particles(NamedTuple):
    groups: int
    particles: int


PARTICLES = {
    "smoke": Particles(2, 4),
    "1x32": Particles(1, 32),
    "64x32": Particles(64, 32),
    "512x64": Particles(512, 64),
}
CASES = [Case(shape) for shape in PARTICLES]
VARIANTS = [harness.LIMIT, "rlkern", "eager"]


def problem(case: Case, device: str) -> Problem:
    groups, particles = PARTICLES[case.shape]
    weights = 2 * torch.randn(groups * particles, device=device)
    u = torch.rand(groups, device=device)
    bounds = torch.arange(groups + 1, device=device) * particles
    variants = {
        "rlkern": lambda: rlkern.smc_resample(weights, u, cu_seqlens=bounds),
        "eager": lambda: reference.forward(weights, u, bounds, 0.5),
    }
    num_bytes, _ = bytes_and_flops(groups * particles, groups)
    return Problem(variants, "copy", {"groups": groups, "particles": particles}, num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
