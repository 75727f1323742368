"""What `logprob_from_logits` and `linear_logprob` share: their output and their checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check

OUTPUTS = ("logprob", "entropy", "logsumexp")


class LogprobOutput(NamedTuple):
    """float32 tensors of shape (T,); None for an output that was not asked for."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None


def check_outputs(op: str, outputs: Sequence[str]) -> None:
    if isinstance(outputs, str) or not outputs:
        _check.fail(op, "outputs", f"to be a non-empty tuple of {OUTPUTS}", repr(outputs))
    for name in outputs:
        _check.one_of(op, "outputs", name, OUTPUTS)


def check_rows(op: str, rows: Tensor, name: str, targets: Tensor) -> None:
    _check.tensor(op, "targets", targets)
    _check.dtype(op, "targets", targets, _check.INTEGERS)
    _check.shape(op, "targets", targets, (rows.shape[0],), "(T,)")
    _check.same_device(op, "targets", targets, name, rows.device)


def split_temperature(
    op: str, temperature: float | Tensor, rows: Tensor, name: str
) -> tuple[Tensor | None, float]:
    """The (row_temperature, temperature) pair of the schemas."""
    if not isinstance(temperature, Tensor):
        _check.positive(op, "temperature", temperature)
        return None, float(temperature)
    _check.shape(op, "temperature", temperature, (rows.shape[0],), "(T,)")
    _check.same_device(op, "temperature", temperature, name, rows.device)
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return temperature.detach().to(kind).contiguous(), 1.0


def select(
    outputs: Sequence[str], logprob: Tensor, logsumexp: Tensor, entropy: Tensor
) -> LogprobOutput:
    return LogprobOutput(
        logprob if "logprob" in outputs else None,
        entropy if "entropy" in outputs else None,
        logsumexp if "logsumexp" in outputs else None,
    )
