"""`linear_distill_loss` against the bare matmuls that it cannot avoid, torch and peers.

Student and teacher have heads of one size. A forward multiplies out both; a backward that
recomputes the logits does so again, and takes the gradients of hidden states and weight: six
matmuls. Those are its limit. `four matmuls` is without the second pair: what an implementation
takes that keeps all (T, V) logits from its forward.
"""

import math

import pytest
import torch

import rlkern
from bench import harness, oracles, peers
from bench.harness import Case, Problem
from bench.shapes import HEADS

OP = "linear_distill_loss"
BOTH = ("forward", "forward+backward")
FOUR = "four matmuls"
TRL = "TRL ChunkedDivergenceFunction"
BETA = 0.5
# shapes end in the divergence
KINDS = {"kl": "reverse_kl", "jsd": "jsd"}
CASES = [
    *(Case(f"smoke-{kind}", "bfloat16", passes, memory=True) for kind in KINDS for passes in BOTH),
    *(
        Case(f"cpu-64k-{kind}", dtype, passes, "cpu", memory=dtype == "bfloat16")
        for kind in KINDS
        for dtype in ("bfloat16", "float32")
        for passes in BOTH
    ),
    *(
        Case(f"{shape}-{kind}", "bfloat16", passes, "cuda", memory=True)
        for shape in ("qwen3-0.6b", "qwen3-8b")
        for kind in KINDS
        for passes in BOTH
    ),
]
VARIANTS = [harness.LIMIT, FOUR, "rlkern", "eager", "compile", TRL]


def problem(case: Case, device: str) -> Problem:
    shape, _, kind = case.shape.rpartition("-")
    tokens, width, vocab = HEADS[shape]
    dtype = getattr(torch, case.dtype)
    backward = case.passes == "forward+backward"

    def head():
        hidden = torch.randn(tokens, width, device=device, dtype=dtype)
        return hidden, torch.randn(vocab, width, device=device, dtype=dtype).mul_(width**-0.5)

    student, teacher = head(), head()
    upstream = torch.randn(tokens, device=device)

    def ours(hidden, weight):
        return rlkern.linear_distill_loss(
            hidden, weight, *teacher, divergence=KINDS[kind], beta=BETA
        ).divergence

    def eager(hidden, weight):
        log_s = (hidden @ weight.T).float().log_softmax(-1)
        with torch.no_grad():
            log_t = (teacher[0] @ teacher[1].T).float().log_softmax(-1)
        if kind == "kl":
            return (log_s.exp() * (log_s - log_t)).sum(-1)
        log_m = torch.logaddexp(log_s + math.log(1 - BETA), log_t + math.log(BETA))
        terms = log_t.exp() * (log_t - log_m) * BETA + log_s.exp() * (log_s - log_m) * (1 - BETA)
        return terms.sum(-1)

    def forward_matmuls():
        return student[0] @ student[1].T, teacher[0] @ teacher[1].T

    def four_matmuls():
        logits, _ = forward_matmuls()
        return logits @ student[1], logits.T @ student[0]

    def six_matmuls():
        forward_matmuls()
        return four_matmuls()

    def call(function):
        if not backward:
            return lambda: function(*student)
        leaves = tuple(x.detach().requires_grad_() for x in student)
        return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)

    variants = {
        harness.LIMIT: six_matmuls if backward else forward_matmuls,
        "rlkern": call(ours),
        "eager": call(eager),
        "compile": call(peers.compiled(eager)),
    }
    if backward:
        variants[FOUR] = four_matmuls
    if oracles.installed("trl"):
        beta = 1.0 if kind == "kl" else BETA
        variants[TRL] = call(lambda h, w: oracles.trl_divergence(h, w, *teacher, beta))
    return Problem(
        variants,
        "matmul ×6" if backward else "matmul ×2",
        HEADS[shape]._asdict(),
        memory_of=frozenset({"rlkern", "eager", TRL}),
    )


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
