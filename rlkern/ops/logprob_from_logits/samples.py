"""Inputs of `logprob_from_logits`: small, odd, empty, masked, peaked, permuted."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkern.ops._logprob import Rows, Scalars

IGNORE = -100


def options(
    rows: int,
    vocab: int,
    random: torch.Generator,
    device: str,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    row_temperature: Tensor | None = None,
    scale: float = 1.0,
    cap: float = 0.0,
    ids: int = 0,
    mask: Tensor | None = None,
    size: int | None = None,
    rounding: bool = False,
    topk: int = 0,
) -> tuple:
    """What follows the logits in forward: (*Rows, *Scalars, topk); random targets and ids."""
    size = vocab if size is None else size

    def tokens(*shape: int) -> Tensor:
        return torch.randint(max(size, 1), shape, generator=random).to(device)

    targets = tokens(rows) if targets is None else targets
    wanted = tokens(rows, ids) if ids else None
    inputs = Rows(targets, wanted, mask, row_temperature)
    return *inputs, *Scalars(temperature, scale, cap, IGNORE, size, rounding), topk


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 3.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

    def case(logits: Tensor, **how) -> tuple:
        return logits, *options(*logits.shape, random, device, **how)

    yield "plain", case(normal(5, 40))
    yield "odd vocabulary", case(normal(3, 2049), temperature=0.7)
    yield "one token", case(normal(1, 1))
    yield "no rows", case(normal(0, 17), ids=2, topk=3)
    yield "large vocabulary", case(normal(2, 50257), temperature=1.3, ids=3, topk=5)
    temperatures = torch.linspace(0.5, 2.0, 6).to(device)
    yield "row temperatures", case(normal(6, 100), row_temperature=temperatures, topk=2)
    yield "all equal", case(torch.full((2, 33), -7.5, device=device, dtype=dtype))
    yield "far below zero", case(normal(3, 300) - 5000.0, ids=4, topk=1)
    huge = normal(3, 70)
    huge[0, 3], huge[1, 69], huge[2, 0] = 1e4, -1e4, 1e4
    yield "logits of 1e4", case(huge)
    peaked = normal(4, 1000, scale=1.0)
    peaked[:, 17] += 40.0
    top = torch.tensor([17, 3, 17, 999]).to(device)
    yield "peaked", case(peaked, targets=top, ids=3, topk=7)
    masked = normal(4, 64)
    masked[:, ::3] = float("-inf")
    chosen = torch.tensor([1, 62, 31, 44]).to(device)
    yield "masked tokens", case(masked, targets=chosen)
    chosen = torch.randint(48, (6,), generator=random).to(device)
    chosen[::2] = IGNORE
    yield "ignored rows", case(normal(6, 48), targets=chosen, ids=2)
    yield "permuted", case(normal(40, 2, 9).permute(1, 0, 2)[1])
    yield "rows with a gap", case(normal(7, 130)[::2, :100])
    yield "scaled", case(normal(4, 90), temperature=0.9, scale=0.25, ids=90)
    yield (
        "soft cap",
        case(normal(5, 2100, scale=20.0), temperature=0.8, scale=1.5, cap=30.0, ids=5, topk=4),
    )
    allowed = (torch.arange(300) % 3 != 1).to(device)
    yield (
        "masked vocabulary",
        case(normal(5, 300), targets=(torch.arange(5) * 3).to(device), mask=allowed, topk=40),
    )
    padded = normal(5, 200)
    padded[:, 150:] = float("nan")
    mask = (torch.arange(200) < 120).to(device)
    low = torch.arange(5).to(device)
    yield "padded vocabulary", case(padded, targets=low, size=150, mask=mask, cap=9.0, topk=3)
    yield "rounded", case(normal(5, 400), temperature=0.7, scale=1.1, rounding=True, ids=3, topk=9)


def backward_inputs(args: tuple, outputs: tuple, seed: int = 1) -> tuple:
    """Arguments of backward for random upstream gradients of either sign."""
    logits, targets, ids, mask, rows, *scalars, _topk = args
    logprob, logsumexp, entropy, _, _, id_logprob, *_ = outputs
    grads = upstream(logprob, id_logprob, ids, seed)
    return (*grads, logits, targets, ids, mask, rows, logsumexp, entropy, *scalars)


def upstream(logprob: Tensor, id_logprob: Tensor, ids: Tensor | None, seed: int) -> list:
    """Random gradients of logprob, logsumexp, entropy and id_logprob."""
    random = torch.Generator().manual_seed(seed)
    grads = [torch.randn(logprob.shape, generator=random).to(logprob) for _ in range(3)]
    at_ids = None if ids is None else torch.randn(id_logprob.shape, generator=random)
    return [*grads, None if ids is None else at_ids.to(id_logprob)]


def bytes_and_flops(rows: int, vocab: int, itemsize: int) -> tuple[int, int]:
    """What a forward must move and compute: every logit once, some 20 flops each."""
    return rows * vocab * itemsize, 20 * rows * vocab
