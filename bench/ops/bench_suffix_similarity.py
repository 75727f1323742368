"""`suffix_similarity` against the copy of its bytes and dynamic programmes in Python, as LATR has
them."""

from typing import NamedTuple

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.suffix_similarity.samples import bytes_and_flops, related

OP = "suffix_similarity"


class Pairs(NamedTuple):
    pairs: int
    width: int
    mode: str


PAIRS = {"smoke-edit": Pairs(4, 8, "edit")}
for mode in ("edit", "suffix", "rouge"):
    PAIRS |= {f"{n}x50-{mode}": Pairs(n, 50, mode) for n in (16, 256)}
CASES = [Case(shape) for shape in PAIRS]
VARIANTS = [harness.LIMIT, "rlkern", "python"]


def problem(case: Case, device: str) -> Problem:
    sizes = PAIRS[case.shape]
    random = torch.Generator().manual_seed(0)
    a, b = (t.to(device) for t in related(sizes.pairs, sizes.width, 1000, random))
    variants = {"rlkern": lambda: rlkern.suffix_similarity(a, b, mode=sizes.mode)}
    if sizes.mode != "suffix":
        variants["python"] = lambda: peers.looped_similarity(a, b, sizes.mode)
    num_bytes, _ = bytes_and_flops(sizes.pairs, sizes.width)
    return Problem(variants, "copy", {"pairs": sizes.pairs, "width": sizes.width}, num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
