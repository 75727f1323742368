"""`linear_logprob` with entropy against the bare matmuls that it cannot avoid, and eager torch."""

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from bench.shapes import HEADS

OP = "linear_logprob"
BOTH = ("forward", "forward+backward")
CASES = [
    *(Case("smoke", "bfloat16", passes, memory=True) for passes in BOTH),
    *(
        Case("cpu-64k", dtype, passes, "cpu", memory=True)
        for dtype in ("bfloat16", "float32")
        for passes in BOTH
    ),
    *(Case("cpu-qwen3-0.6b", "bfloat16", passes, "cpu", memory=True) for passes in BOTH),
    *(
        Case(shape, "bfloat16", passes, "cuda", memory=True)
        for shape in ("qwen3-0.6b", "qwen3-8b", "gpt-oss-20b", "deepseek-v3")
        for passes in BOTH
    ),
]
VARIANTS = [harness.LIMIT, "rlkern", "eager", "compile"]


def problem(case: Case, device: str) -> Problem:
    tokens, width, vocab = HEADS[case.shape]
    dtype = getattr(torch, case.dtype)
    backward = case.passes == "forward+backward"
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype).mul_(width**-0.5)
    targets = torch.randint(vocab, (tokens,), device=device)
    upstream = (torch.randn(tokens, device=device), torch.full((tokens,), 0.01, device=device))

    def ours(hidden, weight, targets):
        out = rlkern.linear_logprob(hidden, weight, targets, outputs=("logprob", "entropy"))
        return out.logprob, out.entropy

    def matmuls():
        logits = hidden @ weight.T
        return (logits, logits @ weight, logits.T @ hidden) if backward else logits

    def call(function):
        if not backward:
            return lambda: function(hidden, weight, targets)
        leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
        return lambda: torch.autograd.grad(function(*leaves, targets), leaves, upstream)

    variants = {
        harness.LIMIT: matmuls,
        "rlkern": call(ours),
        "eager": call(peers.linear_logprob_entropy),
        "compile": call(peers.compiled(peers.linear_logprob_entropy)),
    }
    return Problem(variants, "matmul", HEADS[case.shape]._asdict())


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
