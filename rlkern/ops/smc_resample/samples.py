"""Inputs of `smc_resample`: even, peaked, without weight, of one row, of many."""

from collections.abc import Iterator

import torch


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same at every call; float32 for any dtype."""
    random = torch.Generator().manual_seed(0)

    def case(lengths: list[int], spread: float, threshold: float, offset: float = 0.0) -> tuple:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        weights = spread * torch.randn(int(bounds[-1]), generator=random) + offset
        u = torch.rand(len(lengths), generator=random)
        return weights.to(device), u.to(device), bounds.to(device), threshold

    yield "some", case([8, 8, 16, 5], 1.0, 0.5)
    yield "peaked", case([8, 3, 16, 1, 300], 30.0, 0.5)
    yield "all", case([32, 7, 33], 0.5, 1.0)
    yield "none", case([6, 9], 2.0, 0.0)
    yield "long", case([1500], 1.5, 0.9)
    yield "far below", case([12, 20], 3.0, 0.7, -5e3)
    yield "empty groups", case([0, 4, 0], 3.0, 0.8)
    yield "no groups", case([], 1.0, 0.5)
    weights, u, bounds, _ = case([4, 4, 4, 4], 2.0, 0.5)
    weights[:4] = -float("inf")
    weights[5:8] = -float("inf")
    yield "without weight", (weights, u, bounds, 1.0)
    equal = torch.zeros(5, device=device)
    edge = torch.zeros(1, device=device)
    yield "equal", (equal, edge, torch.tensor([0, 5], device=device), 1.0)


def bytes_and_flops(rows: int, groups: int) -> tuple[int, int]:
    """Log-weights in and out, parents out, offsets and sizes of groups."""
    return rows * 16 + groups * 16, 10 * rows
