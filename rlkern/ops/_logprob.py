"""What `logprob_from_logits` and `linear_logprob` share: their output and their checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check

OUTPUTS = ("logprob", "entropy", "logsumexp", "sum_sq_prob", "is_top1")


class LogprobOutput(NamedTuple):
    """float32 tensors of shape (T,), is_top1 bool; None for an output that was not asked for."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    sum_sq_prob: Tensor | None = None
    is_top1: Tensor | None = None
    topk_values: Tensor | None = None
    topk_ids: Tensor | None = None
    id_logprob: Tensor | None = None


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


def check_vocab_size(op: str, vocab_size: int | None, vocab: int) -> int:
    """The number of columns that exist; the others are padding and are not read."""
    if vocab_size is None:
        return vocab
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        kind = type(vocab_size).__name__
        raise TypeError(f"{op}: expected vocab_size to be an int, got {kind}")
    if not 0 < vocab_size <= vocab:
        _check.fail(op, "vocab_size", f"in [1, V] = [1, {vocab}]", vocab_size)
    return vocab_size


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


def scalars_of(
    op: str, temperature: float, logit_scale: float, softcap: float | None, ignore_index: int
) -> tuple[float, float, float, int]:
    """The schemas' (temperature, logit_scale, softcap, ignore_index); a softcap of 0 is none."""
    _check.positive(op, "logit_scale", logit_scale)
    if softcap is not None:
        _check.positive(op, "softcap", softcap)
    return temperature, float(logit_scale), float(softcap or 0.0), ignore_index


def select(
    outputs: Sequence[str], logprob: Tensor, logsumexp: Tensor, entropy: Tensor
) -> LogprobOutput:
    return LogprobOutput(
        logprob if "logprob" in outputs else None,
        entropy if "entropy" in outputs else None,
        logsumexp if "logsumexp" in outputs else None,
    )
