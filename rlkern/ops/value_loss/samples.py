"""Inputs of `value_loss`: every aggregation; packed, padded, masked with NaN, empty, long."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkern.ops.value_loss.reference import ALL_SEQUENCES, FILLED_SEQUENCES, NOTHING, TOKENS


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call.

    The op itself computes in float32: `dtype` rounds the values.
    """
    random = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        return torch.randn(tokens, generator=random).to(dtype).float().to(device)

    def args(
        lengths: tuple[int, ...],
        mask: Tensor | None = None,
        width: float = 0.5,
        denominator: int = TOKENS,
        divide_by_length: bool = False,
        scale: float = 1.0,
        want_grad: bool = True,
    ) -> tuple:
        tokens = sum(lengths)
        old = normal(tokens)
        # a critic that has moved, and returns that some of it overshot
        tensors = [old + normal(tokens), normal(tokens), old]
        if mask is not None:
            mask = mask.to(device)
            tensors = [torch.where(mask, x, float("nan")) for x in tensors]
        if width == float("inf"):
            tensors[2] = None
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device)
        rest = (width, denominator, divide_by_length, scale, want_grad)
        return (*tensors, offsets, mask, *rest)

    yield "packed", args((3, 17, 1, 40))
    yield "several blocks", args((700, 2049, 5, 1500), divide_by_length=True)
    yield "empty sequences", args((0, 0, 5, 0, 9, 0), denominator=FILLED_SEQUENCES)
    yield "count empty", args((8, 0, 24), denominator=ALL_SEQUENCES, scale=0.125)
    yield "all empty", args((0, 0, 0), denominator=FILLED_SEQUENCES, divide_by_length=True)
    yield "no sequences", args(())
    yield "one token", args((1,))
    yield "token sum", args((8, 24), denominator=NOTHING, scale=0.375)
    mask = torch.rand(5 * 37, generator=random) < 0.6
    mask[37:74] = False
    for denominator in (TOKENS, FILLED_SEQUENCES, ALL_SEQUENCES):
        more = {"denominator": denominator, "divide_by_length": denominator != TOKENS}
        yield f"padded with holes, {denominator}", args((37,) * 5, mask, **more)
    none = torch.zeros(40, dtype=torch.bool)
    yield "everything masked", args((20, 20), none, denominator=FILLED_SEQUENCES)
    yield "not clipped", args((30, 4, 61), width=float("inf"))
    yield "narrow", args((30, 4, 61), width=1e-3)
    yield "no gradient", args((12, 20), want_grad=False)
    wide = list(args((12, 20)))
    wide[3] = wide[3].int()
    yield "int32 cu_seqlens", tuple(wide)


def bytes_and_flops(tokens: int) -> tuple[int, int]:
    """What forward and backward must move and compute: three tensors read, a gradient written."""
    return 4 * 4 * tokens, 12 * tokens
