"""`branch_select` against the copy of its bytes and the same in torch operations."""

from typing import NamedTuple

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.branch_select.samples import bytes_and_flops

OP = "branch_select"


class Rows(NamedTuple):
    rows: int
    vocab: int
    width: int = 0  # of the embedding; 0: LATR's test alone


ROWS = {
    "smoke": Rows(4, 500, 32),
    "latr-64x32000": Rows(64, 32000),
    "latr-64x151936": Rows(64, 151936),
    "rose-64x32000": Rows(64, 32000, 1024),
}
CASES = [Case(shape, dtype) for shape in ROWS for dtype in ("float32", "bfloat16")]
VARIANTS = [harness.LIMIT, "rlkern", "eager"]


def problem(case: Case, device: str) -> Problem:
    sizes, dtype = ROWS[case.shape], getattr(torch, case.dtype)
    logits = (2 * torch.randn(sizes.rows, sizes.vocab, device=device)).to(dtype)
    embedding = None
    if sizes.width:
        embedding = torch.randn(sizes.vocab, sizes.width, device=device).to(dtype)

    def ours():
        return rlkern.branch_select(logits, tau_abs=0.25, tau_rel=0.15, embedding=embedding)

    variants = {"rlkern": ours, "eager": lambda: peers.branch_test(logits, embedding, 0.25, 0.15)}
    gathered = sizes.rows * 20 * sizes.width * logits.element_size()
    num_bytes, _ = bytes_and_flops(sizes.rows, sizes.vocab, logits.element_size(), gathered)
    return Problem(variants, "copy", sizes._asdict(), num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
