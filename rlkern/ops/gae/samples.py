"""Inputs of `gae`: packed and padded sequences, short, long, empty, masked with NaN, constant."""

from collections.abc import Iterator

import torch
from torch import Tensor


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call.

    The op itself computes in float32 or float64: `dtype` rounds the values.
    """
    random = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        return torch.randn(tokens, generator=random).to(dtype).float().to(device)

    def offsets(*lengths: int) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device)

    def masked(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, float("nan"))

    for whiten in (False, True):
        name = "whitened, " if whiten else ""
        rest = (0.95, 0.9, whiten)
        for what, lengths in (
            ("packed", (3, 17, 1, 40)),
            ("several blocks", (700, 2049, 5, 1100)),
            ("empty sequences", (0, 0, 5, 0, 9, 0)),
            ("all empty", (0, 0, 0)),
            ("no sequences", ()),
            ("one token", (1,)),
        ):
            tokens = sum(lengths)
            yield name + what, (normal(tokens), normal(tokens), offsets(*lengths), None, *rest)
        rows, columns = 5, 37
        tokens = rows * columns
        lengths = torch.randint(columns + 1, (rows,), generator=random)
        # holes, as tool output leaves them
        holes = torch.rand(rows, columns, generator=random) < 0.3
        mask = ((torch.arange(columns) < lengths[:, None]) & ~holes).flatten().to(device)
        inputs = masked(normal(tokens), mask), masked(normal(tokens), mask)
        padded = (offsets(*[columns] * rows), mask)
        yield name + "padded with holes", (*inputs, *padded, *rest)
        mask = (torch.rand(1500, generator=random) < 0.1).to(device)
        inputs = masked(normal(1500), mask), masked(normal(1500), mask)
        yield name + "far between", (*inputs, offsets(900, 600).int(), mask, *rest)
        none = torch.zeros(30, dtype=torch.bool, device=device)
        inputs = masked(normal(30), none), masked(normal(30), none)
        yield name + "everything masked", (*inputs, offsets(10, 20), none, *rest)
        last = torch.zeros(64, device=device)
        last[[23, 63]] = 1.0
        ends = (offsets(24, 40), None)
        yield name + "outcome reward", (last, normal(64), *ends, 1.0, 1.0, whiten)
        yield name + "one step", (normal(64), normal(64), *ends, 0.5, 0.0, whiten)
        equal = torch.ones(64, device=device)
        yield name + "constant", (equal, equal, *ends, 0.0, 1.0, whiten)


def bytes_and_flops(tokens: int) -> tuple[int, int]:
    """What a call must move and compute: rewards and values in, advantages and returns out."""
    return 4 * 4 * tokens, 6 * tokens
