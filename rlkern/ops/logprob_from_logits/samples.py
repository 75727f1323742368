"""Inputs of `logprob_from_logits`: small, odd, empty, masked, peaked, permuted."""

from collections.abc import Iterator

import torch
from torch import Tensor

IGNORE = -100


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 3.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

    def targets(rows: int, vocab: int) -> Tensor:
        return torch.randint(vocab, (rows,), generator=random).to(device)

    def case(
        logits: Tensor,
        temperature: float = 1.0,
        rows: Tensor | None = None,
        scale: float = 1.0,
        cap: float = 0.0,
    ) -> tuple:
        chosen = targets(*logits.shape) if logits.shape[1] else torch.zeros(0, dtype=torch.int64)
        return logits, chosen.to(device), rows, temperature, scale, cap, IGNORE, True

    yield "plain", case(normal(5, 40))
    yield "odd vocabulary", case(normal(3, 2049), 0.7)
    yield "one token", case(normal(1, 1))
    yield "no rows", case(normal(0, 17))
    yield "large vocabulary", case(normal(2, 50257), 1.3)
    temperatures = torch.linspace(0.5, 2.0, 6).to(device)
    yield "row temperatures", case(normal(6, 100), 1.0, temperatures)
    yield "all equal", case(torch.full((2, 33), -7.5, device=device, dtype=dtype))
    yield "far below zero", case(normal(3, 300) - 5000.0)
    huge = normal(3, 70)
    huge[0, 3], huge[1, 69], huge[2, 0] = 1e4, -1e4, 1e4
    yield "logits of 1e4", case(huge)
    peaked = normal(4, 1000, scale=1.0)
    peaked[:, 17] += 40.0
    yield "peaked", case(peaked)
    masked = normal(4, 64)
    masked[:, ::3] = float("-inf")
    logits, chosen, *rest = case(masked)
    yield "masked tokens", (logits, chosen // 3 * 3 + 1 - (chosen > 61).long() * 3, *rest)
    logits, chosen, *rest = case(normal(6, 48))
    chosen[::2] = IGNORE
    yield "ignored rows", (logits, chosen, *rest)
    yield "permuted", case(normal(40, 2, 9).permute(1, 0, 2)[1])
    yield "rows with a gap", case(normal(7, 130)[::2, :100])
    yield "scaled", case(normal(4, 90), 0.9, None, 0.25)
    yield "soft cap", case(normal(5, 2100, scale=20.0), 0.8, None, 1.5, 30.0)
    yield "no entropy", (*case(normal(4, 90), 0.9)[:-1], False)


def backward_inputs(args: tuple, outputs: tuple, seed: int = 1) -> tuple:
    """Arguments of backward for random upstream gradients of either sign."""
    logits, targets, rows, *scalars, want_entropy = args
    logprob, logsumexp, entropy = outputs
    random = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(logprob.shape, generator=random).to(logprob) if wanted else None
        for wanted in (True, True, want_entropy)
    ]
    return (*grads, logits, targets, logsumexp, entropy, rows, *scalars)


def bytes_and_flops(rows: int, vocab: int, itemsize: int) -> tuple[int, int]:
    """What a forward must move and compute: every logit once, some 20 flops each."""
    return rows * vocab * itemsize, 20 * rows * vocab
