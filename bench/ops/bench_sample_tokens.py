"""`sample_tokens` against the copy of its bytes, torch's softmax and multinomial, Gumbel noise and
Hugging Face's processors."""

from typing import NamedTuple

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.sample_tokens.samples import bytes_and_flops

OP = "sample_tokens"


class Rows(NamedTuple):
    rows: int
    vocab: int
    top_k: int = 0
    top_p: float = 1.0
    # logits of normal noise, whose nucleus is a good part of the vocabulary
    flat: bool = False


ROWS = {"smoke": Rows(4, 1000), "smoke-p": Rows(4, 1000, top_p=0.9)}
for rows, vocab in ((8, 32000), (64, 32000), (8, 151936), (64, 151936), (256, 151936)):
    ROWS[f"{rows}x{vocab}"] = Rows(rows, vocab)
    ROWS[f"{rows}x{vocab}-p"] = Rows(rows, vocab, top_p=0.9)
ROWS["64x151936-kp"] = Rows(64, 151936, top_k=50, top_p=0.9)
ROWS["64x151936-p-flat"] = Rows(64, 151936, top_p=0.9, flat=True)
CASES = [
    *(Case(shape) for shape in ROWS),
    *(Case(shape, "bfloat16") for shape in ("64x151936", "64x151936-p")),
]
VARIANTS = [harness.LIMIT, "rlkern", "multinomial", "gumbel", "hf"]


def like_a_model(rows: int, vocab: int) -> torch.Tensor:
    """Zipf's law under noise: at 0.9 a nucleus of tens of tokens."""
    rank = torch.rand(rows, vocab).argsort(-1) + 1.0
    return -1.5 * rank.log() + 0.5 * torch.randn(rows, vocab)


def problem(case: Case, device: str) -> Problem:
    sizes = ROWS[case.shape]
    make = (lambda *s: 2 * torch.randn(s)) if sizes.flat else like_a_model
    logits = make(sizes.rows, sizes.vocab).to(device, getattr(torch, case.dtype))
    ids = torch.arange(sizes.rows, device=device)
    warpers = peers.logits_warpers(sizes.top_k, sizes.top_p)

    def ours():
        return rlkern.sample_tokens(
            logits,
            seed=1,
            branch_ids=ids,
            positions=ids,
            temperature=0.9,
            top_k=sizes.top_k,
            top_p=sizes.top_p,
        )

    variants = {"rlkern": ours}
    if sizes.top_k == 0 and sizes.top_p == 1:
        variants["multinomial"] = lambda: peers.multinomial(logits, 0.9)
        variants["gumbel"] = lambda: peers.gumbel_argmax(logits, 0.9)
    if warpers is not None:
        variants["hf"] = lambda: peers.multinomial(logits, 0.9, warpers)
    num_bytes, _ = bytes_and_flops(sizes.rows, sizes.vocab, logits.element_size())
    shape = {"rows": sizes.rows, "vocab": sizes.vocab}
    return Problem(variants, "copy", shape, num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
