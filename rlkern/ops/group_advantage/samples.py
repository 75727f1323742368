"""Inputs of `group_advantage`: shuffled, ragged, empty, masked, constant.

None has a NaN as its result, since opcheck takes two NaNs for different.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkern.ops.group_advantage.reference import KINDS


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return (torch.randn(rows, generator=random) * scale + offset).to(device, dtype)

    def ids(rows: int, groups: int) -> Tensor:
        return torch.randint(groups, (rows,), generator=random).to(device)

    for kind, name in enumerate(KINDS):
        blocks = torch.arange(6, device=device).repeat_interleave(8)
        yield f"{name}, groups in blocks", (normal(48), blocks, None, None, kind, 6, 1e-6)
        yield f"{name}, shuffled", (normal(101), ids(101, 13), None, None, kind, 13, 1e-4)
        binary = (torch.rand(64, generator=random) < 0.3).to(device, dtype)
        yield f"{name}, binary", (binary, ids(64, 8), None, None, kind, 64, 1e-6)
        single = torch.arange(5, device=device)
        yield f"{name}, groups of one", (normal(5), single, None, None, kind, 5, 1e-6)
        yield f"{name}, one group", (normal(700), ids(700, 1), None, None, kind, 1, 1e-6)
        yield (
            f"{name}, large offset",
            (normal(40, 1.0, 300.0), ids(40, 4), None, None, kind, 4, 1e-6),
        )
        yield f"{name}, no rows", (normal(0), ids(0, 3), None, None, kind, 3, 1e-6)
        yield f"{name}, empty groups", (normal(20), ids(20, 3) * 5 + 2, None, None, kind, 40, 1e-6)
        equal = torch.full((12,), 0.1, device=device, dtype=dtype)
        yield f"{name}, equal, no epsilon", (equal, ids(12, 3), None, None, kind, 3, 0.0)
        mask = (torch.rand(50, generator=random) < 0.7).to(device)
        masked = torch.where(mask, normal(50), float("nan"))
        yield f"{name}, masked", (masked, ids(50, 7), mask, None, kind, 7, 1e-6)
        # tokens of each row; the last group has none
        tokens = torch.randint(1, 2000, (50,), generator=random).double().to(device)
        groups = ids(50, 6)
        tokens[groups == 5] = 0
        yield f"{name}, weighted", (normal(50), groups, None, tokens, kind, 6, 1e-6)
        unused = torch.where(mask, tokens, float("nan"))
        yield f"{name}, weighted, masked", (masked, ids(50, 7), mask, unused, kind, 7, 1e-6)


def bytes_and_flops(rows: int, itemsize: int) -> tuple[int, int]:
    """What a call must move and compute: reward and id in, advantage out; some 8 flops a row."""
    return rows * (itemsize + 8 + 4), 8 * rows
