"""`linear_logprob` with entropy against the bare matmuls that it cannot avoid, torch and peers.

A backward that recomputes the logits takes four matmuls: the logits, the logits again, the gradient
of the hidden states and that of the weight. Those are its limit. `three matmuls` is without the
second: what an implementation takes that keeps all (T, V) logits from its forward.
"""

import pytest
import torch

import rlkern
from bench import harness, oracles, peers
from bench.harness import Case, Problem
from bench.shapes import HEADS

OP = "linear_logprob"
BOTH = ("forward", "forward+backward")
THREE = "three matmuls"
PEERS = TRL, VERL, LIGER = (
    "TRL ChunkedLogProbFunction",
    "verl FusedLinearForPPO",
    "Liger scaled cross entropy",
)
# Minutes a round: what is already timed at the other shapes is left out.
HUGE = "cpu-qwen3-0.6b-2k"
CASES = [
    *(Case("smoke", "bfloat16", passes, memory=True) for passes in BOTH),
    *(
        # a second process for every figure: at the shapes that take longest, in one dtype
        Case(shape, dtype, passes, "cpu", memory=shape == "cpu-64k" or dtype == "bfloat16")
        for shape in ("cpu-64k", "cpu-32k", HUGE)
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
VARIANTS = [harness.LIMIT, THREE, "rlkern", "eager", "compile", *PEERS]


def left_out(case: Case) -> set[str]:
    """What would take longer than all the rest together."""
    if case.shape == HUGE:
        return {VERL} if case.passes == "forward" else {THREE, *PEERS}
    return {VERL} if case.shape == "cpu-32k" else set()


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

    def forward_matmul():
        return hidden @ weight.T

    def three_matmuls():
        logits = hidden @ weight.T
        return logits, logits @ weight, logits.T @ hidden

    def four_matmuls():
        forward_matmul()
        return three_matmuls()

    def call(function):
        if not backward:
            return lambda: function(hidden, weight, targets)
        leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
        return lambda: torch.autograd.grad(function(*leaves, targets), leaves, upstream)

    def peer(function):
        return call(lambda hidden, weight, targets: function(hidden, weight, targets, 1.0))

    variants = {
        harness.LIMIT: four_matmuls if backward else forward_matmul,
        "rlkern": call(ours),
        "eager": call(peers.linear_logprob_entropy),
        "compile": call(peers.compiled(peers.linear_logprob_entropy)),
    }
    if backward:
        variants[THREE] = three_matmuls
    # the other peers there have no entropy
    installed = oracles.linear_peers()
    variants |= {name: peer(installed[name].call) for name in PEERS if name in installed}
    return Problem(
        {name: variants[name] for name in variants if name not in left_out(case)},
        "matmul ×4" if backward else "matmul",
        HEADS[case.shape]._asdict(),
        memory_of=frozenset({"rlkern", "eager", "compile"}) if device == "cpu" else None,
    )


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
