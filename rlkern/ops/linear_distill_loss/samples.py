"""Inputs of `linear_distill_loss`: small, odd, empty, peaked, one-sided, off every tile."""

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
        student: tuple,
        teacher: tuple,
        beta: float,
        targets: Tensor | None = None,
        row_temperature: Tensor | None = None,
        temperature: float = 1.0,
        scales: tuple[float, float] = (1.0, 1.0),
        caps: tuple[float, float] = (0.0, 0.0),
        size: int | None = None,
    ) -> tuple:
        """A model is (hidden, weight) or (hidden, weight, bias)."""
        heads = (*student, None)[:3] + (*teacher, None)[:3]
        (scale, teacher_scale), (cap, teacher_cap) = scales, caps
        size = len(student[1]) if size is None else size
        scalars = (beta, temperature, scale, cap, teacher_scale, teacher_cap, size)
        return *heads, targets, row_temperature, *scalars, IGNORE

    def tokens(rows: int, vocab: int) -> Tensor:
        return torch.randint(vocab, (rows,), generator=random).to(device)

    for beta in (0.0, 1.0, 0.5, 0.1):
        student, teacher = (normal(5, 16), normal(40, 16)), (normal(5, 16), normal(40, 16))
        yield f"plain, beta {beta}", case(student, teacher, beta)
    for beta in (0.0, 1.0, 0.3):
        student = normal(7, 13), normal(51, 13), normal(51)
        teacher = normal(7, 21), normal(51, 21), normal(51, scale=2.0)
        how = {"targets": tokens(7, 51), "temperature": 0.7}
        yield f"odd sizes, beta {beta}", case(student, teacher, beta, **how)
        # several chunks of the vocabulary; several panels of tokens once
        rows = 50 if beta == 0.3 else 3
        student = normal(rows, 24), normal(2087, 24, scale=0.4)
        teacher = normal(rows, 40), normal(2087, 40, scale=0.4)
        yield f"large vocabulary, beta {beta}", case(student, teacher, beta)
        student = normal(6, 20), normal(100, 20), normal(100)
        how = {"row_temperature": torch.linspace(0.5, 2.0, 6).to(device)}
        how |= {"caps": (9.0, 4.0), "scales": (1.5, 0.8)}
        yield (
            f"capped, row temperatures, beta {beta}",
            case(student, (normal(6, 8), normal(100, 8)), beta, **how),
        )
        hidden, weight = normal(4, 64), normal(300, 64)
        weight[17] = hidden[0] * 40 / hidden[0].square().sum()
        student, teacher = (hidden, weight), (normal(4, 32), normal(300, 32, scale=3.0))
        targets = torch.tensor([17, IGNORE, 299, IGNORE]).to(device)
        yield f"peaked, beta {beta}", case(student, teacher, beta, targets)
    yield "no rows", case((normal(0, 8), normal(17, 8)), (normal(0, 9), normal(17, 9)), 1.0)
    student = normal(1, 32), normal(64, 32)
    yield "one row", case(student, (normal(1, 32), normal(64, 32)), 1.0, temperature=1.5)
    student = normal(9, 16), normal(70, 16)
    yield "itself", case(student, student, 0.2, scales=(0.5, 0.5))
    # of one side, the other, and both
    bias, teacher_bias = normal(60), normal(60)
    bias[5:9], teacher_bias[7:12] = float("-inf"), float("-inf")
    student, teacher = (normal(6, 16), normal(60, 16), bias), (normal(6, 16), normal(60, 16))
    yield "student without tokens, reverse", case(student, teacher, 1.0)
    yield "both without tokens, JSD", case(student, (*teacher, teacher_bias), 0.5)
    student = (*student[:2], None)
    yield "teacher without tokens, forward", case(student, (*teacher, teacher_bias), 0.0)
    student = normal(7, 40)[::2, :25], normal(90, 50)[::3, :25]
    yield "rows with a gap", case(student, (normal(4, 8), normal(60, 8)[::2]), 0.6)
    student = normal(5, 16), normal(200, 16, scale=0.5), normal(200)
    teacher = normal(5, 16), normal(160, 16, scale=0.5)
    for part in (*student[1:], teacher[1]):
        part[150:] = float("nan")
    yield "padded vocabularies", case(student, teacher, 1.0, tokens(5, 150), size=150)


def backward_inputs(args: tuple, outputs: tuple, seed: int = 1) -> tuple:
    """Arguments of backward for random upstream gradients of either sign."""
    *heads, _targets, row_temperature = args[:8]
    divergence, _, _, stats = outputs
    random = torch.Generator().manual_seed(seed)
    upstream = torch.randn(divergence.shape, generator=random).to(divergence)
    saved = (row_temperature, stats, *args[8:15])
    return (upstream, *heads, *saved, True, True, heads[2] is not None)


def bytes_and_flops(rows: int, hidden: int, vocab: int, itemsize: int) -> tuple[int, int]:
    """A forward reads the matrices of two heads of one size once, and takes a matmul of each."""
    return 2 * (rows + vocab) * hidden * itemsize, 4 * rows * hidden * vocab
