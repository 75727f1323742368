"""Inputs of `sample_tokens`: small, odd, long, tied, peaked, masked, without a distribution."""

from collections.abc import Iterator

import torch
from torch import Tensor

INF = float("inf")


def arguments(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    greedy: Tensor | None = None,
    seed: int = 7,
    size: int | None = None,
    count: bool = True,
) -> tuple:
    """Arguments of forward; a filter that is a number and keeps all is not there."""
    rows, where = logits.shape[0], logits.device

    def spread(value, dtype=torch.float32) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=where).expand(rows).contiguous()

    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    on = {n: isinstance(v, Tensor) or v != off[n] for n, v in given.items()}
    return (
        logits,
        torch.arange(rows, device=where) * 7919 + 5,
        torch.arange(rows, device=where) * 3 + (1 << 33),
        1.0 / spread(temperature),
        greedy,
        spread(top_k, torch.int64) if on["top_k"] else None,
        spread(top_p) if on["top_p"] else None,
        spread(min_p).double().log().float() if on["min_p"] else None,
        seed,
        logits.shape[1] if size is None else size,
        count,
    )


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, vocab: int, scale: float = 2.0) -> Tensor:
        return (scale * torch.randn(rows, vocab, generator=random)).to(device, dtype)

    yield "small", arguments(normal(5, 50))
    yield "one column", arguments(normal(3, 1))
    yield "one row, two chunks", arguments(normal(1, 2049), 0.7, count=False)
    yield "long", arguments(normal(3, 5000, 3.0), seed=-(2**62) - 3)
    yield "no rows", arguments(normal(0, 30), top_k=3)
    yield "top-k", arguments(normal(2, 3001), 0.9, top_k=20)
    yield "top-p", arguments(normal(2, 4100), 0.8, top_p=0.9)
    yield "min-p", arguments(normal(3, 700), 1.3, min_p=0.05)
    yield "all filters", arguments(normal(3, 2500), 1.2, top_k=64, top_p=0.8, min_p=0.02)
    yield "a large k", arguments(normal(2, 4200), top_k=4100, top_p=0.99)
    yield "nearly all of p", arguments(normal(2, 2100, 8.0), top_p=1 - 2.0**-24)
    yield "little p", arguments(normal(2, 400), top_p=1e-20)
    yield "peaked", arguments(normal(2, 2300, 60.0), 0.5, top_p=0.95, min_p=0.001)
    yield "large", arguments(normal(2, 900) + 1e4, top_k=50, top_p=0.7)
    ties = torch.randint(0, 4, (3, 2600), generator=random).to(device, dtype)
    yield "ties", arguments(ties, top_k=700, top_p=0.6)
    yield "ties, top-p", arguments(ties, 0.4, top_p=0.87)
    yield "equal", arguments(torch.zeros(1, 2200, dtype=dtype, device=device), top_p=0.5)
    masked = normal(2, 2222)
    masked[torch.rand(masked.shape, generator=random).to(device) < 0.8] = -INF
    masked[1, :2100] = -INF
    yield "masked", arguments(masked, top_k=600, top_p=0.9)
    yield "masked, unfiltered", arguments(masked)
    odd = normal(6, 2100)
    odd[0], odd[1, 5], odd[2, 2050], odd[4] = -INF, float("nan"), INF, -INF
    odd[4, 7] = 3.0
    yield "without a distribution", arguments(odd)
    yield "without a distribution, filtered", arguments(odd, top_k=7, top_p=0.5, min_p=0.1)
    padded = normal(2, 2080)
    padded[:, 2060:] = float("nan")
    yield "padded", arguments(padded, top_p=0.9, size=2060)
    rows = 8
    by_row = {
        "temperature": torch.rand(rows, generator=random) + 0.3,
        "top_k": torch.tensor([0, 1, 5, 2500, 2400, 3000, -1, 40]),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 0.4, 0.99, 1.0, 1.0, 0.3]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.3, 0.0, 1.0]),
        "greedy": torch.arange(rows) % 3 == 0,
    }
    by_row = {name: value.to(device) for name, value in by_row.items()}
    yield "by row", arguments(normal(rows, 2500), **by_row)
    some = torch.tensor([True, False, True], device=device)
    yield "greedy", arguments(ties[:3], greedy=some)
    yield "strided", arguments(normal(4, 900)[::2, :450], top_k=9)


def bytes_and_flops(rows: int, vocab: int, itemsize: int) -> tuple[int, int]:
    """What must be moved and computed: every logit once."""
    return rows * vocab * itemsize, 4 * rows * vocab
