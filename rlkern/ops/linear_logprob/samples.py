"""Inputs of `linear_logprob`: small, odd, empty, peaked, permuted, off every tile."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkern.ops.logprob_from_logits.samples import IGNORE, options, upstream


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

    def case(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        batch_invariant: bool = False,
        chunk_size: int = 0,
        **how,
    ) -> tuple:
        rest = options(len(hidden), len(weight), random, device, **how)
        return hidden, weight, bias, *rest, batch_invariant, chunk_size

    yield "plain", case(normal(5, 16), normal(40, 16))
    yield "odd sizes", case(normal(7, 13), normal(51, 13), temperature=0.7, ids=2, topk=3)
    yield "no rows", case(normal(0, 8), normal(17, 8), normal(17), ids=2, topk=3)
    yield "one row", case(normal(1, 32), normal(64, 32), temperature=1.5)
    # several chunks of the vocabulary, and panels of tokens
    yield "large vocabulary", case(normal(50, 24), normal(2087, 24), ids=9, topk=5)
    temperatures = torch.linspace(0.5, 2.0, 6).to(device)
    yield "row temperatures", case(normal(6, 20), normal(100, 20), row_temperature=temperatures)
    yield "zero hidden states", case(torch.zeros(2, 8, device=device, dtype=dtype), normal(33, 8))
    yield "large logits", case(normal(3, 16, scale=20.0), normal(70, 16, scale=20.0), topk=1)
    hidden, weight = normal(4, 64), normal(300, 64)
    weight[17] = hidden[0] * 40 / hidden[0].square().sum()
    top = torch.tensor([17, 3, 17, 299]).to(device)
    yield "peaked", case(hidden, weight, targets=top, ids=3, topk=7)
    chosen = torch.randint(48, (6,), generator=random).to(device)
    chosen[::2] = IGNORE
    yield "ignored rows", case(normal(6, 16), normal(48, 16), targets=chosen, ids=2)
    yield "rows with a gap", case(normal(7, 40)[::2, :25], normal(90, 50)[::3, :25])
    yield "scaled", case(normal(4, 16), normal(90, 16), temperature=0.9, scale=0.25, ids=90)
    yield (
        "soft cap",
        case(normal(20, 16, scale=3.0), normal(90, 16), temperature=0.8, scale=1.5, cap=10.0),
    )
    yield "bias", case(normal(9, 16), normal(75, 16), normal(75, scale=2.0), temperature=1.2)
    hidden, weight, bias = normal(60, 32), normal(700, 32), normal(700)
    yield "bias and soft cap", case(hidden, weight, bias, cap=4.0, scale=0.8, ids=3, topk=3)
    allowed = (torch.arange(300) % 3 != 1).to(device)
    own = (torch.arange(5) * 3).to(device)
    yield (
        "masked vocabulary",
        case(normal(5, 16), normal(300, 16), targets=own, mask=allowed, topk=40, cap=20.0),
    )
    weight, bias = normal(200, 16), normal(200)
    weight[150:], bias[150:] = float("nan"), float("nan")
    mask = (torch.arange(200) < 120).to(device)
    low = torch.arange(5).to(device)
    yield (
        "padded vocabulary",
        case(normal(5, 16), weight, bias, targets=low, size=150, mask=mask, topk=3),
    )
    hidden, weight, bias = normal(30, 32), normal(500, 32), normal(500)
    how = {"temperature": 0.7, "scale": 1.1, "rounding": True, "ids": 3, "topk": 9}
    yield "rounded", case(hidden, weight, bias, **how)
    hidden, weight, bias = normal(40, 32), normal(900, 32), normal(900)
    how = {"batch_invariant": True, "chunk_size": 256, "ids": 3, "topk": 5}
    yield "batch invariant, in chunks", case(hidden, weight, bias, **how)
    how = {"batch_invariant": True, "temperature": 0.8}
    yield "batch invariant, odd sizes", case(normal(7, 13), normal(51, 13), **how)
    # a chunk_size that small asks the Triton kernels for no buffer at all
    yield "no buffer", case(normal(70, 32), normal(304, 32), chunk_size=1)
    hidden, weight, bias = normal(40, 13), normal(201, 13), normal(201)
    how = {"mask": (torch.arange(201) % 4 != 1).to(device), "size": 200, "rounding": True}
    targets = (torch.arange(40) * 4).to(device)
    how |= {
        "targets": targets,
        "cap": 5.0,
        "row_temperature": torch.linspace(0.5, 2, 40).to(device),
    }
    yield "no buffer, odd sizes", case(hidden, weight, bias, chunk_size=1, **how)


def backward_inputs(args: tuple, outputs: tuple, seed: int = 1) -> tuple:
    """Arguments of backward for random upstream gradients of either sign."""
    hidden, weight, bias, targets, ids, mask, rows, *scalars, _topk, invariant, chunk = args
    logprob, logsumexp, entropy, _, _, id_logprob, *_ = outputs
    grads = upstream(logprob, id_logprob, ids, seed)
    saved = (targets, ids, mask, rows, logsumexp, entropy, *scalars, invariant, chunk)
    return (*grads, hidden, weight, bias, *saved, True, True, bias is not None)


def bytes_and_flops(rows: int, hidden: int, vocab: int, itemsize: int) -> tuple[int, int]:
    """A forward reads both matrices once and takes one matmul."""
    return (rows + vocab) * hidden * itemsize, 2 * rows * hidden * vocab
