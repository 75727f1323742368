"""Inputs of `segment_reduce`: ragged, empty, long, masked, strided by their sequences."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkern.ops.segment_reduce.reference import KINDS


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(count: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return (torch.randn(count, generator=random) * scale + offset).to(device, dtype)

    def bounds(lengths: list[int], integer: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, integer)

    for name in KINDS:
        mean = name == "mean"
        yield f"{name}, ragged", (normal(60), bounds([7, 1, 33, 19]), None, mean)
        yield f"{name}, int32", (normal(48), bounds([16, 32], torch.int32), None, mean)
        yield f"{name}, empty sequences", (normal(5), bounds([0, 2, 0, 0, 3, 0]), None, mean)
        yield f"{name}, no sequences", (normal(0), bounds([]), None, mean)
        yield f"{name}, no values", (normal(0), bounds([0, 0]), None, mean)
        yield f"{name}, long", (normal(5000, 3.0, -2.0), bounds([4300, 700]), None, mean)
        lengths = torch.randint(40, (150,), generator=random).tolist()
        yield f"{name}, many", (normal(sum(lengths)), bounds(lengths), None, mean)
        yield f"{name}, cancelling", (normal(1000, 300.0), bounds([999, 1]), None, mean)
        mask = (torch.rand(90, generator=random) < 0.6).to(device)
        mask[70:] = False
        masked = torch.where(mask, normal(90), float("nan"))
        yield f"{name}, masked", (masked, bounds([13, 0, 50, 7, 20]), mask, mean)


def backward_inputs(args: tuple, outputs: tuple, seed: int = 1) -> tuple:
    """Arguments of backward for a random upstream gradient of either sign."""
    values, cu_seqlens, mask, mean = args
    out, count = outputs
    random = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=random).to(out)
    return grad, values, cu_seqlens, mask, count, mean


def bytes_and_flops(tokens: int, sequences: int, itemsize: int) -> tuple[int, int]:
    """What a forward must move and compute: every value once, bounds in, results out."""
    return tokens * itemsize + sequences * (8 + 4), tokens
