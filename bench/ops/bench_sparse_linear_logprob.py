"""`sparse_linear_logprob` against the bare products that it cannot avoid, and the whole head.

The limit is the same flops as one matmul: every token times K rows of the weight that all share.
Kept sets that differ must also be read, a row of the weight each; `gather` is that read alone.
`eager` gathers and multiplies in plain torch, `eager-dense` masks all logits, and `head` is
`rlkern.linear_logprob`, which knows nothing of the kept sets.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import rlkern
from bench import harness
from bench.harness import Case, Problem
from bench.shapes import HEADS, Head

OP = "sparse_linear_logprob"


class Kept(NamedTuple):
    head: Head
    kept: int  # per token


SHAPES = {
    "smoke": Kept(HEADS["smoke"], 8),
    "cpu-64k-top20": Kept(HEADS["cpu-64k"], 20),
    "cpu-64k-top512": Kept(HEADS["cpu-64k"], 512),
    "cpu-qwen3-0.6b-top64": Kept(HEADS["cpu-qwen3-0.6b"], 64),
    "qwen3-8b-top20": Kept(HEADS["qwen3-8b"], 20),
    "qwen3-8b-top512": Kept(HEADS["qwen3-8b"], 512),
}
BOTH = ("forward", "forward+backward")
CASES = [
    *(Case("smoke", "bfloat16", passes, memory=True) for passes in BOTH),
    *(
        Case(shape, "bfloat16", passes, "cpu", memory=True)
        for shape in ("cpu-64k-top20", "cpu-64k-top512", "cpu-qwen3-0.6b-top64")
        for passes in BOTH
    ),
    *(
        Case(shape, "bfloat16", passes, "cuda", memory=True)
        for shape in ("qwen3-8b-top20", "qwen3-8b-top512")
        for passes in BOTH
    ),
]
VARIANTS = [harness.LIMIT, "rlkern", "gather", "eager", "eager-dense", "head"]
# the gathered rows of eager torch may take this many bytes
GATHER_BYTES = 8 * 2**30


def kept_sets(tokens: int, vocab: int, kept: int, device: str) -> Tensor:
    """(T, K) ids, distinct in a row: one of each K-th of the vocabulary. Texts keep some tokens
    more often than others: half of all ids come from an eighth of the vocabulary."""
    width = vocab // kept
    within = (torch.rand(tokens, kept, device=device) ** 3 * width).long()
    return torch.arange(kept, device=device) * width + within


def problem(case: Case, device: str) -> Problem:
    (tokens, width, vocab), kept = SHAPES[case.shape]
    dtype = getattr(torch, case.dtype)
    backward = case.passes == "forward+backward"
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype).mul_(width**-0.5)
    ids = kept_sets(tokens, vocab, kept, device)
    choice = torch.randint(kept, (tokens, 1), device=device)
    targets = ids.gather(1, choice)[:, 0]
    flat, offsets = ids.flatten(), torch.arange(tokens + 1, device=device) * kept
    upstream = torch.randn(tokens, device=device)
    shared = weight[:kept]

    def ours(hidden, weight):
        return rlkern.sparse_linear_logprob(hidden, weight, targets, flat, offsets).logprob

    def head(hidden, weight):
        return rlkern.linear_logprob(hidden, weight, targets).logprob

    def eager(hidden, weight):
        logits = torch.bmm(weight[ids], hidden[:, :, None])[:, :, 0].float()
        return logits.log_softmax(-1).gather(-1, choice)[:, 0]

    def dense(hidden, weight):
        mask = torch.full((tokens, vocab), float("-inf"), device=device).scatter_(1, ids, 0.0)
        logp = ((hidden @ weight.T).float() + mask).log_softmax(-1)
        return logp.gather(-1, targets[:, None])[:, 0]

    def matmuls():
        logits = hidden @ shared.T
        return (logits, logits @ shared, logits.T @ hidden) if backward else logits

    def call(function):
        if not backward:
            return lambda: function(hidden, weight)
        leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
        return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)

    variants = {
        harness.LIMIT: matmuls,
        "rlkern": call(ours),
        "eager-dense": call(dense),
        "head": call(head),
    }
    if flat.numel() * width * weight.element_size() < GATHER_BYTES:
        variants["gather"] = lambda: weight[flat]
        variants["eager"] = call(eager)
    return Problem(variants, "matmul", SHAPES[case.shape].head._asdict() | {"kept": kept})


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
