"""Inputs of `sparse_linear_logprob`: small, odd, everything kept, one kept, empty, peaked, capped.

None has a NaN as its result, since opcheck takes two NaNs for different.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

IGNORE = -100


def kept_sets(
    rows: int, vocab: int, sizes: list[int], random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(targets, kept_ids, kept_offsets): distinct ids in random order, one of them the target."""
    parts = [torch.randperm(vocab, generator=random)[:size] for size in sizes]
    targets = [
        int(part[torch.randint(len(part), (), generator=random)]) if len(part) else IGNORE
        for part in parts
    ]
    ids = torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    assert len(sizes) == rows
    return torch.tensor(targets, dtype=torch.int64), ids, offsets


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

    def case(
        hidden: Tensor,
        weight: Tensor,
        sizes: list[int],
        temperature: float = 1.0,
        rows: Tensor | None = None,
        scale: float = 1.0,
        cap: float = 0.0,
        bias: Tensor | None = None,
        rounded: bool = False,
    ) -> tuple:
        sets = kept_sets(len(hidden), len(weight), sizes, random)
        moved = (tensor.to(device) for tensor in sets)
        scalars = (temperature, scale, cap, IGNORE)
        return hidden, weight, bias, *moved, rows, *scalars, rounded, True

    def halves(*shape: int) -> Tensor:
        """Sums of their products are exact, and no kernel rounds them to another side."""
        return (torch.randint(-8, 9, shape, generator=random) / 2).to(device, dtype)

    yield "plain", case(normal(5, 16), normal(40, 16), [7, 3, 12, 1, 20])
    yield "odd sizes", case(normal(6, 13), normal(51, 13), [1, 2, 3, 4, 5, 33], 0.7)
    yield "no rows", case(normal(0, 8), normal(17, 8), [])
    yield "one row", case(normal(1, 32), normal(64, 32), [40], 1.5)
    yield "everything kept", case(normal(4, 24), normal(90, 24), [90] * 4)
    # several blocks of slots; of columns; of columns that are no multiple of 16
    yield "large sets", case(normal(3, 80), normal(150, 80, scale=0.2), [145, 40, 131])
    yield "wide", case(normal(3, 272), normal(20, 272, scale=0.2), [20, 3, 17])
    yield "wide and odd", case(normal(3, 301), normal(20, 301, scale=0.2), [20, 3, 17])
    yield "empty sets", case(normal(5, 16), normal(30, 16), [0, 4, 0, 0, 9])
    temperatures = torch.linspace(0.5, 2.0, 6).to(device)
    sizes = [8, 2, 19, 30, 5, 11]
    yield "row temperatures", case(normal(6, 20), normal(100, 20), sizes, 1.0, temperatures)
    large = normal(3, 16, scale=20.0), normal(70, 16, scale=20.0)
    yield "large logits", case(*large, [30, 2, 9])
    hidden, weight = normal(4, 64), normal(120, 64)
    weight[17] = hidden[0] * 40 / hidden[0].square().sum()
    yield "peaked", case(hidden, weight, [120, 30, 4, 100])
    hidden, weight, bias, targets, ids, *rest = case(normal(6, 16), normal(48, 16), [9] * 6)
    targets[::2] = IGNORE
    yield "ignored rows, int32", (hidden, weight, bias, targets, ids.int(), *rest)
    options = (1.0, None, 1.0, 5.0)
    args = case(normal(4, 16), normal(48, 16), [9] * 4, *options)
    hidden, weight, bias, targets, ids, *rest = args
    ids[::4] = torch.tensor([-1, 48, 2**40, -(2**50), 49, -7, 48, 100, 1000]).to(device)
    targets[:] = ids.view(4, 9)[:, 1:3].amax(1).clamp(0, 47)
    yield "ids out of range", (hidden, weight, bias, targets, ids, *rest)
    hidden, weight, bias, targets, ids, *rest = case(normal(4, 16), normal(48, 16), [9] * 4)
    targets[1] = next(i for i in range(48) if i not in ids.view(4, 9)[1].tolist())
    yield "a target that was not kept", (hidden, weight, bias, targets, ids, *rest)
    strided = normal(7, 40)[::2, :25], normal(90, 50)[::3, :25]
    yield "rows with a gap", case(*strided, [4, 30, 1, 17])
    # few tokens of the vocabulary, kept by every row
    yield "shared sets", case(normal(40, 24), normal(9, 24), [6] * 40)
    bias = normal(60, scale=3.0)
    yield "bias", case(normal(4, 20), normal(60, 20), [12, 60, 1, 33], 0.8, bias=bias)
    bias = normal(60)
    bias[::2] = float("-inf")
    args = case(normal(4, 16), normal(60, 16), [30, 60, 9, 44], bias=bias)
    args[3].bitwise_or_(1)
    yield "a bias of -inf", args
    yield "scaled", case(normal(4, 16), normal(90, 16), [5, 60, 2, 8], 0.9, None, 0.25)
    hidden, bias = normal(5, 16, scale=3.0), normal(90)
    yield "soft cap", case(hidden, normal(90, 16), [5, 60, 2, 90, 8], 0.8, None, 1.5, 10.0, bias)
    options = (1.0, temperatures[:4], 0.25, 7.0, halves(60), True)
    yield "rounded", case(halves(4, 40), halves(60, 40), [5, 57, 2, 30], *options)


def backward_inputs(args: tuple, outputs: tuple, seed: int = 1) -> tuple:
    """Arguments of backward for random upstream gradients of either sign."""
    hidden, weight, bias, _, kept_ids, kept_offsets, rows, *scalars, _, _, _ = args
    logprob, logsumexp, entropy, _, _, logits, target_slot = outputs
    random = torch.Generator().manual_seed(seed)
    grads = [torch.randn(logprob.shape, generator=random).to(logprob) for _ in range(3)]
    saved = (kept_ids, kept_offsets, logits, target_slot, logsumexp, entropy, rows, *scalars)
    return (*grads, hidden, weight, *saved, True, True, bias is not None)


def bytes_and_flops(slots: int, rows: int, hidden: int, itemsize: int) -> tuple[int, int]:
    """A forward reads a row of the weight and an id per slot, and takes a dot product of them."""
    return (slots + rows) * hidden * itemsize + 8 * slots, 2 * slots * hidden
