"""Inputs of `linear_logprob`: small, odd, empty, peaked, permuted, off every tile."""

from collections.abc import Iterator

import torch
from torch import Tensor

IGNORE = -100


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

    def case(
        hidden: Tensor,
        weight: Tensor,
        temperature: float = 1.0,
        rows: Tensor | None = None,
        scale: float = 1.0,
        cap: float = 0.0,
    ) -> tuple:
        targets = torch.randint(weight.shape[0], (hidden.shape[0],), generator=random).to(device)
        return hidden, weight, targets, rows, temperature, scale, cap, IGNORE, True

    yield "plain", case(normal(5, 16), normal(40, 16))
    yield "odd sizes", case(normal(7, 13), normal(51, 13), 0.7)
    yield "no rows", case(normal(0, 8), normal(17, 8))
    yield "one row", case(normal(1, 32), normal(64, 32), 1.5)
    # several chunks of the vocabulary, and panels of tokens
    yield "large vocabulary", case(normal(50, 24), normal(2087, 24))
    temperatures = torch.linspace(0.5, 2.0, 6).to(device)
    yield "row temperatures", case(normal(6, 20), normal(100, 20), 1.0, temperatures)
    yield "zero hidden states", case(torch.zeros(2, 8, device=device, dtype=dtype), normal(33, 8))
    yield "large logits", case(normal(3, 16, scale=20.0), normal(70, 16, scale=20.0))
    hidden, weight = normal(4, 64), normal(300, 64)
    weight[17] = hidden[0] * 40 / hidden[0].square().sum()
    yield "peaked", case(hidden, weight)
    hidden, weight, targets, *rest = case(normal(6, 16), normal(48, 16))
    targets[::2] = IGNORE
    yield "ignored rows", (hidden, weight, targets, *rest)
    yield "rows with a gap", case(normal(7, 40)[::2, :25], normal(90, 50)[::3, :25])
    yield "scaled", case(normal(4, 16), normal(90, 16), 0.9, None, 0.25)
    yield "soft cap", case(normal(20, 16, scale=3.0), normal(90, 16), 0.8, None, 1.5, 10.0)
    yield "no entropy", (*case(normal(4, 16), normal(90, 16), 0.9)[:-1], False)


def backward_inputs(args: tuple, outputs: tuple, seed: int = 1) -> tuple:
    """Arguments of backward for random upstream gradients of either sign."""
    hidden, weight, targets, rows, *scalars, want_entropy = args
    logprob, logsumexp, entropy = outputs
    random = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(logprob.shape, generator=random).to(logprob) if wanted else None
        for wanted in (True, True, want_entropy)
    ]
    saved = (hidden, weight, targets, logsumexp, entropy, rows, *scalars)
    return (*grads, *saved, True, True)


def bytes_and_flops(rows: int, hidden: int, vocab: int, itemsize: int) -> tuple[int, int]:
    """A forward reads both matrices once and takes one matmul."""
    return (rows + vocab) * hidden * itemsize, 2 * rows * hidden * vocab
