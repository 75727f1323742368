"""`linear_policy_loss`, forward and backward, against the three bare matmuls and its composition.

`composed` is policy_loss of linear_logprob, which multiplies the logits out twice; `keep-256m` is
ours with fewer logits kept, `keep-all` with all of them where the default does not; `half` is ours
with every other sequence at advantage 0, whose tokens drop out of two of the matmuls; `eager` is
torch with its logits in the inputs' dtype, then the loss as TRL and verl write it.
"""

import inspect

import pytest
import torch
from torch import Tensor

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from bench.shapes import HEADS

OP = "linear_policy_loss"
SEQUENCE = 128
CASES = [
    Case("smoke", "bfloat16", "forward+backward", memory=True),
    *(
        Case(shape, "bfloat16", "forward+backward", "cpu", memory=True)
        for shape in ("cpu-64k", "cpu-qwen3-0.6b-2k")
    ),
    Case("qwen3-8b", "bfloat16", "forward+backward", "cuda", memory=True),
]
VARIANTS = [harness.LIMIT, "rlkern", "keep-256m", "keep-all", "half", "composed", "eager"]


def eager(
    hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    """DAPO: token-mean, clip-higher; metrics left out."""
    logprob, _ = peers.linear_logprob_entropy(hidden, weight, targets)
    ratio = (logprob - old).clamp(-20, 20).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)).mean()


def problem(case: Case, device: str) -> Problem:
    tokens, width, vocab = HEADS[case.shape]
    dtype = getattr(torch, case.dtype)
    length = min(SEQUENCE, tokens)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype).mul_(width**-0.5)
    targets = torch.randint(vocab, (tokens,), device=device)
    cu_seqlens = torch.arange(0, tokens + 1, length, device=device)
    advantages = torch.randn(len(cu_seqlens) - 1, device=device)
    old = rlkern.linear_logprob(hidden, weight, targets).logprob
    old = old + 0.1 * torch.randn_like(old)
    half = advantages.clone()
    half[::2] = 0.0
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    packed = {"cu_seqlens": cu_seqlens, "objective": "dapo"}

    def matmuls():
        h, w = hidden.detach(), weight.detach()
        logits = h @ w.T
        return logits, logits @ w, logits.T @ h

    def ours(a: Tensor, **options: int):
        return rlkern.linear_policy_loss(*leaves, targets, old, a, **packed, **options).loss

    def composed():
        logprob = rlkern.linear_logprob(*leaves, targets).logprob
        return rlkern.policy_loss(logprob, old, advantages, **packed).loss

    def call(function, *args, **options):
        return lambda: torch.autograd.grad(function(*args, **options), leaves)

    variants = {
        harness.LIMIT: matmuls,
        "rlkern": call(ours, advantages),
        "keep-256m": call(ours, advantages, keep_bytes=2**28),
        "keep-all": call(ours, advantages, keep_bytes=4 * tokens * vocab),
        "half": call(ours, half),
        "composed": call(composed),
        "eager": call(eager, *leaves, targets, old, advantages.repeat_interleave(length)),
    }
    default = inspect.signature(rlkern.linear_policy_loss).parameters["keep_bytes"].default
    if 2.5 * tokens * vocab <= default:
        del variants["keep-all"]
    # a fresh process for every figure on CPU: those that say something
    told = frozenset({"rlkern", "keep-256m", "composed", "eager"})
    return Problem(
        variants,
        "matmul ×3",
        HEADS[case.shape]._asdict(),
        memory_of=told if device == "cpu" else None,
        returned_bytes=sum(leaf.numel() * leaf.element_size() for leaf in leaves),
    )


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
