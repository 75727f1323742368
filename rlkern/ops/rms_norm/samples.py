"""Inputs of `rms_norm`: odd widths, large and tiny rows, heads turned whole, in part, or not."""

from collections.abc import Iterator

import torch
from torch import Tensor


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    def case(*shape: int, half: int | None = None, weighted: bool = True, scale: float = 1.0):
        cos = sin = None
        if half is not None:
            angle = 6.3 * torch.rand(shape[0], half, generator=random)
            # such as a model of this dtype holds them
            cos, sin = (f.to(dtype).float().to(device) for f in (angle.cos(), angle.sin()))
        weight = 1 + normal(shape[-1]) / 4 if weighted else None
        return normal(*shape) * scale, weight, 1e-6, cos, sin

    yield "tokens", case(9, 128)
    yield "wide", case(3, 4096)
    yield "odd", case(5, 33)
    yield "large", case(4, 48, scale=100.0)
    yield "tiny", case(4, 48, scale=1e-3)
    yield "zeros", case(2, 16, scale=0.0)
    yield "heads", case(7, 3, 64)
    yield "turned", case(7, 3, 64, half=32)
    yield "turned in part", case(5, 2, 80, half=16)
    yield "odd heads", case(6, 5, 33, half=7)
    yield "turned alone", case(6, 4, 32, half=16, weighted=False)
    yield "many heads", case(3, 40, 128, half=64)
    yield "no tokens", case(0, 2, 16, half=8)


def bytes_and_flops(numel: int, itemsize: int) -> tuple[int, int]:
    """What must be moved: x in, and out."""
    return 2 * numel * itemsize, 0
