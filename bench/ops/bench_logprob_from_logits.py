"""`logprob_from_logits` with entropy against the copy of its bytes, eager torch and TRL."""

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from bench.shapes import HEADS

OP = "logprob_from_logits"
BOTH = ("forward", "forward+backward")
CASES = [
    *(Case("smoke", "bfloat16", passes) for passes in BOTH),
    *(
        Case("cpu-64k", dtype, passes, "cpu", memory=True)
        for dtype in ("bfloat16", "float32")
        for passes in BOTH
    ),
    *(Case("cpu-qwen3-0.6b", "bfloat16", passes, "cpu") for passes in BOTH),
    *(
        Case(shape, "bfloat16", passes, "cuda", memory=True)
        for shape in ("qwen3-8b", "llama-3.1-8b")
        for passes in BOTH
    ),
]
VARIANTS = [harness.LIMIT, "rlkern", "eager", "compile", "trl"]


def problem(case: Case, device: str) -> Problem:
    tokens, _, vocab = HEADS[case.shape]
    dtype = getattr(torch, case.dtype)
    backward = case.passes == "forward+backward"
    logits = torch.randn(tokens, vocab, device=device, dtype=dtype).mul_(2).requires_grad_(backward)
    targets = torch.randint(vocab, (tokens,), device=device)
    upstream = (torch.randn(tokens, device=device), torch.full((tokens,), 0.01, device=device))

    def ours() -> tuple:
        out = rlkern.logprob_from_logits(logits, targets, outputs=("logprob", "entropy"))
        return out.logprob, out.entropy

    compiled, trl = peers.compiled(peers.logprob_entropy), peers.trl_logprob_entropy()
    outputs = {
        "rlkern": ours,
        "eager": lambda: peers.logprob_entropy(logits, targets),
        "compile": lambda: compiled(logits, targets),
    }
    if trl is not None:
        outputs["trl"] = lambda: trl(logits, targets)

    def with_gradient(run):
        return lambda: torch.autograd.grad(run(), logits, upstream)

    if backward:
        outputs = {name: with_gradient(run) for name, run in outputs.items()}
    # forward reads the logits; backward reads them again and writes as many
    passes = 3 if backward else 1
    num_bytes = passes * logits.numel() * logits.element_size()
    return Problem(outputs, "copy", HEADS[case.shape]._asdict(), num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
