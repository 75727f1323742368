"""Argument checks of the public functions: one wording, raised before any work.

<op>: expected <argument> <what>, got <what>
"""

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: expected {argument} {expected}, got {got}")


def tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {argument} to be a Tensor, got {type(value).__name__}")


def shape(op: str, argument: str, value: Tensor, expected: Sequence[int], symbols: str) -> None:
    """`symbols` names the sizes, e.g. "(T,)"."""
    if tuple(value.shape) != tuple(expected):
        sizes = tuple(expected)
        fail(op, argument, f"of shape {symbols} = {sizes}", tuple(value.shape))


def ndim(op: str, argument: str, value: Tensor, symbols: str) -> None:
    if value.ndim != symbols.count(",") + (not symbols.endswith(",)")):
        fail(op, argument, f"of shape {symbols}", tuple(value.shape))


def dtype(op: str, argument: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: expected {argument} of dtype {names}, got {got}")


def same_device(op: str, argument: str, value: Tensor, other: str, device: torch.device) -> None:
    if value.device != device:
        fail(op, argument, f"on {device} like {other}", value.device)


def one_of(op: str, argument: str, value: object, known: Collection[str]) -> None:
    if value not in known:
        fail(op, argument, f"to be one of {', '.join(sorted(known))}", repr(value))


def positive(op: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: expected {argument} to be a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        fail(op, argument, "to be positive and finite", value)


def offsets(op: str, value: Tensor | None, other: str, packed: Tensor) -> None:
    """`cu_seqlens` of a packed tensor; the values only where reading them stalls nothing."""
    if value is None:
        fail(op, "cu_seqlens", f"of shape (S + 1,) with packed {other}", None)
    tensor(op, "cu_seqlens", value)
    dtype(op, "cu_seqlens", value, INTEGERS)
    ndim(op, "cu_seqlens", value, "(S+1,)")
    if value.shape[0] == 0:
        fail(op, "cu_seqlens", "of shape (S + 1,), S >= 0", (0,))
    same_device(op, "cu_seqlens", value, other, packed.device)
    if value.is_cpu and not torch.compiler.is_compiling():
        tokens, bounds = packed.shape[0], value.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            got = bounds if len(bounds) <= 8 else f"{str(bounds[:4])[:-1]}, ..., {bounds[-1]}]"
            fail(op, "cu_seqlens", f"to rise from 0 to T = {tokens}", got)
