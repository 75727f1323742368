"""`policy_loss`, forward and backward, against the copy of its bytes and what trainers write.

`eager` returns what ours does: the loss and all metrics, once each. `eager-loss` leaves the metrics
out. Both are verl's token losses and aggregation on a padded batch, as is `rlkern`;
`rlkern-packed` holds the same tokens without padding.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.policy_loss.samples import bytes_and_flops

OP = "policy_loss"


class Batch(NamedTuple):
    objective: str
    rows: int
    columns: int
    kl_coef: float = 0.0


BATCHES = {
    "smoke": Batch("grpo", 4, 16),
    # 65,536 slots: two CPU cores
    "grpo-64k": Batch("grpo", 64, 1024),
    "grpo-kl-64k": Batch("grpo", 64, 1024, kl_coef=0.04),
    "gspo-64k": Batch("gspo", 64, 1024),
    "cispo-64k": Batch("cispo", 64, 1024),
    # 131,072 slots: the families that differ in work
    "dapo-128k": Batch("dapo", 64, 2048),
    "minpro-128k": Batch("minpro", 64, 2048),
    "mhpo-128k": Batch("mhpo", 64, 2048),
    "gspo-128k": Batch("gspo", 64, 2048),
    "icepop-128k": Batch("icepop", 64, 2048),
    # a large step of one GPU
    "grpo-kl-2m": Batch("grpo", 256, 8192, kl_coef=0.04),
    "gspo-2m": Batch("gspo", 256, 8192),
}
CASES = [
    Case("smoke", passes="forward+backward"),
    *(
        Case(shape, passes="forward+backward")
        for shape in ("grpo-64k", "grpo-kl-64k", "gspo-64k", "cispo-64k")
    ),
    *(
        Case(f"{objective}-128k", passes="forward+backward")
        for objective in ("dapo", "minpro", "mhpo", "gspo", "icepop")
    ),
    *(
        Case(shape, passes="forward+backward", device="cuda", memory=True)
        for shape in ("grpo-kl-2m", "gspo-2m")
    ),
]
VARIANTS = [harness.LIMIT, "rlkern", "rlkern-packed", "eager", "eager-loss", "compile"]


def least_before(x: Tensor, mask: Tensor) -> Tensor:
    """Of each token the least x of the tokens before it in its row, 0 for the first."""
    held = torch.where(mask, x, float("inf")).cummin(1).values
    held = torch.nn.functional.pad(held[:, :-1], (1, 0), value=float("inf"))
    return torch.where(held.isinf(), 0.0, held)


def eager_loss(
    batch: Batch, live: Tensor, old: Tensor, a: Tensor, ref: Tensor, rollout: Tensor, mask: Tensor
):
    """Loss, and the tensors that the metrics are made of."""
    x = (live - old).clamp(-20, 20)
    counts = mask.to(live.dtype)
    n = counts.sum(-1)
    name = batch.objective
    low, high = {"gspo": (1 - 3e-4, 1 + 4e-4), "dapo": (0.8, 1.28)}.get(name, (0.8, 1.2))
    if name == "gspo":
        mean = ((live - old) * counts).sum(-1) / n.clamp(min=1)
        r = (live - live.detach() + mean.detach()[:, None]).clamp(max=10).exp()
    elif name == "minpro":
        held = (live - old).detach()
        r = (least_before(held, mask) + held).clamp(-20, 20).exp()
    else:
        r = x.exp()
    if name in ("cispo", "minpro"):
        low, high = 0.0, 5.0
        losses1 = losses2 = loss = -a * r.clamp(max=high).detach() * live
    elif name == "mhpo":
        low, high = 0.0, float("inf")
        softplus = torch.nn.functional.softplus
        psi = 1.5 * torch.tanh(x / 1.5)
        held = psi.detach()
        hazard = softplus(held) ** 1.5 + (softplus(-held) / 0.8) ** 2
        losses1 = losses2 = loss = -a * (psi - hazard).exp()
    else:
        losses1, losses2 = -a * r, -a * r.clamp(low, high)
        loss = torch.maximum(losses1, losses2)
    if name == "icepop":
        weight = (old - rollout).clamp(-20, 20).exp()
        loss = loss * torch.where((weight < 0.5) | (weight > 5), 0.0, weight)
    kl = None
    if batch.kl_coef:
        d = (ref - live).clamp(-20, 20)
        kl = d.exp() - d - 1
        loss = loss + batch.kl_coef * kl
    if name in ("cispo", "minpro", "dapo"):
        total = (loss * counts).sum() / counts.sum()
    else:
        total = ((loss * counts).sum(-1) / (n + 1e-8)).sum() / (n > 0).sum()
    return total, (x, r, losses1, losses2, kl, counts, low, high)


@torch.no_grad()
def eager_metrics(a: Tensor, x, r, losses1, losses2, kl, counts, low, high) -> dict[str, Tensor]:
    tokens = counts.sum()

    def mean(value: Tensor) -> Tensor:
        return (value * counts).sum() / tokens

    out = {
        "num_tokens": tokens,
        "pg_clipfrac": mean((losses2 > losses1).float()),
        "clip_ratio/low_mean": mean(((r < low) & (a < 0)).float()),
        "clip_ratio/high_mean": mean(((r > high) & (a > 0)).float()),
        "ppo_kl": mean(-x),
        "ratio_mean": mean(r),
        "ratio_min": torch.where(counts > 0, r, float("inf")).min(),
        "ratio_max": torch.where(counts > 0, r, float("-inf")).max(),
    }
    if kl is not None:
        out["kl"] = mean(kl)
    return out


def problem(case: Case, device: str) -> Problem:
    batch = BATCHES[case.shape]
    rows, columns = batch.rows, batch.columns
    live = (torch.randn(rows, columns, device=device) - 2).requires_grad_()
    old = live.detach() + 0.1 * torch.randn(rows, columns, device=device)
    ref = live.detach() + 0.1 * torch.randn(rows, columns, device=device)
    rollout = old + 0.05 * torch.randn(rows, columns, device=device)
    advantages = torch.randn(rows, device=device)
    lengths = torch.randint(columns // 2, columns + 1, (rows,), device=device)
    mask = torch.arange(columns, device=device) < lengths[:, None]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed = {"live": live.detach()[mask].requires_grad_(), "old": old[mask]}
    packed |= {"ref": ref[mask], "rollout": rollout[mask]}
    objective = rlkern.PolicyObjective.preset(batch.objective, kl_coef=batch.kl_coef)
    a = advantages[:, None]

    def ours():
        out = rlkern.policy_loss(
            live,
            old,
            advantages,
            mask=mask,
            objective=objective,
            ref_logprob=ref if batch.kl_coef else None,
            rollout_logprob=rollout if objective.needs_rollout else None,
        )
        return torch.autograd.grad(out.loss, live), out.metrics

    def ours_packed():
        out = rlkern.policy_loss(
            packed["live"],
            packed["old"],
            advantages,
            cu_seqlens=cu_seqlens,
            objective=objective,
            ref_logprob=packed["ref"] if batch.kl_coef else None,
            rollout_logprob=packed["rollout"] if objective.needs_rollout else None,
        )
        return torch.autograd.grad(out.loss, packed["live"]), out.metrics

    def whole():
        loss, parts = eager_loss(batch, live, old, a, ref, rollout, mask)
        return loss, eager_metrics(a, *parts)

    def eager():
        loss, metrics = whole()
        return torch.autograd.grad(loss, live), metrics

    def eager_alone():
        return torch.autograd.grad(eager_loss(batch, live, old, a, ref, rollout, mask)[0], live)

    compiled = peers.compiled(whole)

    def with_compile():
        loss, metrics = compiled()
        return torch.autograd.grad(loss, live), metrics

    variants = {
        "rlkern": ours,
        "rlkern-packed": ours_packed,
        "eager": eager,
        "eager-loss": eager_alone,
        "compile": with_compile,
    }
    inputs = 2 + (batch.kl_coef != 0) + objective.needs_rollout
    num_bytes, _ = bytes_and_flops(rows * columns, inputs)
    sizes = {"rows": rows, "columns": columns, "tokens": int(mask.sum())}
    return Problem(variants, "copy", sizes, num_bytes)


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
