"""Megatron's linear_cross_entropy: in one process, and over two halves of a vocabulary."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from integrations.stubs import install

from rlkern.integrations import megatron

TOKENS, HIDDEN, VOCAB, RANKS = 12, 16, 26, 2


def problem():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=random)
    weight = torch.randn(VOCAB, HIDDEN, generator=random)
    labels = torch.randint(VOCAB, (TOKENS,), generator=random)
    labels[3] = -100
    up = torch.randn(TOKENS, generator=random)
    return hidden, weight, labels, up


def test_it_is_cross_entropy_in_one_process(monkeypatch):
    def linear_cross_entropy(
        hidden,
        weight,
        labels,
        tp_group=None,
        reduction="mean",
        ignore_index=-100,
        sequence_parallel=False,
    ):
        raise AssertionError("theirs")

    path = "megatron.core.fusions.fused_linear_cross_entropy"
    theirs = {"linear_cross_entropy": linear_cross_entropy}
    install(monkeypatch, path, **theirs)
    caller = install(monkeypatch, "megatron.core.models.gpt.gpt_model", **theirs)
    hidden, weight, labels, _ = problem()
    logits = hidden @ weight.T
    with megatron.enable():
        for reduction in ("none", "sum", "mean"):
            got = caller.linear_cross_entropy(hidden, weight, labels, None, reduction)
            want = torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)
            assert got.shape == want.shape
            assert (got - want).abs().max() < 1e-5
    assert caller.linear_cross_entropy is linear_cross_entropy


def _rank(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS)
    hidden, weight, labels, up = problem()
    part, rows = VOCAB // RANKS, TOKENS // RANKS
    found = {}
    for parallel in (False, True):
        h = hidden[rank * rows :][:rows].clone() if parallel else hidden.clone()
        w = weight[rank * part :][:part].clone()
        h.requires_grad_()
        w.requires_grad_()
        out = megatron.linear_cross_entropy(
            h, w, labels, dist.group.WORLD, "none", sequence_parallel=parallel
        )
        found[parallel] = (out.detach(), *torch.autograd.grad((out * up).sum(), (h, w)))
    results[rank] = found
    dist.destroy_process_group()


def test_two_ranks_and_their_parts_of_the_tokens(tmp_path):
    hidden, weight, labels, up = problem()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="none")
    by_hidden, by_weight = torch.autograd.grad((want * up).sum(), (h, w))
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (str(tmp_path / "store"), results), nprocs=RANKS)
        found = dict(results)
    rows, part = TOKENS // RANKS, VOCAB // RANKS
    for rank in range(RANKS):
        for parallel in (False, True):
            out, dh, dw = found[rank][parallel]
            assert (out - want).abs().max() < 1e-5
            expected = by_hidden[rank * rows :][:rows] if parallel else by_hidden
            assert (dh - expected).abs().max() < 1e-5
            assert (dw - by_weight[rank * part :][:part]).abs().max() < 1e-5
