"""Inputs of `branch_select`: the top log-probs of peaked, even, short and masked rows."""

from collections.abc import Iterator

import torch
from torch import Tensor


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs; `dtype` is the embedding's."""
    random = torch.Generator().manual_seed(0)

    def case(rows: int, vocab: int, count: int, m: int, top: int, width: int = 0, **taus) -> tuple:
        logits = 3 * torch.randn(rows, vocab, generator=random)
        log_p = logits.log_softmax(-1)
        values, ids = log_p.topk(count)
        entropy = -(log_p.exp() * log_p).sum(-1)
        embedding: Tensor | None = None
        if width:
            embedding = torch.randn(vocab, width, generator=random) + 0.3
            embedding = embedding.to(device, dtype)
        tau = {"tau_abs": 0.1, "tau_rel": 0.3} | taus
        where = (t.to(device) for t in (values, ids, entropy))
        return *where, embedding, m, top, tau["tau_abs"], tau["tau_rel"]

    inf = float("inf")
    yield "two", case(40, 50, 2, 2, 0)
    yield "one", case(4, 9, 1, 1, 0)
    yield "no test", case(5, 60, 6, 6, 0, tau_abs=-inf, tau_rel=inf)
    yield "diversity", case(7, 100, 20, 2, 20, 64)
    yield "odd width", case(3, 80, 5, 3, 5, 77)
    yield "more candidates than top", case(3, 80, 8, 8, 3, 33)
    yield "wide", case(2, 60, 20, 2, 20, 600)
    yield "no rows", case(0, 30, 4, 2, 4, 16)
    values, ids, *rest = case(4, 40, 6, 4, 6, 20)
    values[1, 1:], ids[1, 1:] = -inf, -1
    ids[2, 0] = 4000
    rest[1][ids[3, 2]] = 0.0
    yield "missing tokens", (values, ids, *rest)


def bytes_and_flops(rows: int, vocab: int, itemsize: int, gathered: int = 0) -> tuple[int, int]:
    """Of the public function: every logit once, and `gathered` bytes of embeddings."""
    return rows * vocab * itemsize + gathered, 4 * rows * vocab
