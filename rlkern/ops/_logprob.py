"""What `logprob_from_logits` and `linear_logprob` share: their arguments, outputs and checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check

OUTPUTS = ("logprob", "entropy", "logsumexp", "sum_sq_prob", "is_top1")
ROUNDINGS = (None, "bf16")

# Parts of the two ops' schemas, in this order everywhere.
ROWS = "Tensor targets, Tensor? ids, Tensor? vocab_mask, Tensor? row_temperature"
SCALARS = (
    "float temperature, float logit_scale, float softcap, int ignore_index, int vocab_size, "
    "bool round_logits"
)
RETURNS = "(" + ", ".join(["Tensor"] * 8) + ")"
GRADS = (
    "Tensor? grad_logprob, Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor? grad_id_logprob"
)


class LogprobOutput(NamedTuple):
    """What was asked for, and None for the rest. float32; (T,) where no shape is given."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    sum_sq_prob: Tensor | None = None
    is_top1: Tensor | None = None
    """bool"""
    topk_values: Tensor | None = None
    """(T, topk) log-probs, largest first"""
    topk_ids: Tensor | None = None
    """(T, topk) int64"""
    id_logprob: Tensor | None = None
    """(T, K)"""


class Rows(NamedTuple):
    """The schemas' per-row inputs, checked and converted."""

    targets: Tensor
    ids: Tensor | None
    vocab_mask: Tensor | None
    row_temperature: Tensor | None


class Scalars(NamedTuple):
    temperature: float
    logit_scale: float
    softcap: float  # 0: none
    ignore_index: int
    vocab_size: int
    round_logits: bool


class Stats(NamedTuple):
    """What the forward ops return."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    sum_sq_prob: Tensor
    is_top1: Tensor
    id_logprob: Tensor
    topk_values: Tensor
    topk_ids: Tensor

    # Positions without a gradient.
    CONSTANTS = (3, 4, 7)


def empty_stats(like: Tensor, rows: int, ids: Tensor | None, topk: int) -> Stats:
    """Unfilled, on the device of `like`: the fakes' results, and what launchers fill."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    return Stats(
        *(new(rows) for _ in range(4)),
        new(rows, dtype=torch.bool),
        new(rows, 0 if ids is None else ids.shape[1]),
        new(rows, topk),
        new(rows, topk, dtype=torch.int64),
    )


def check_outputs(op: str, outputs: Sequence[str], others: bool = False) -> None:
    """`others`: whether something else was asked for, so that `outputs` may be empty."""
    if isinstance(outputs, str) or not (outputs or others):
        _check.fail(op, "outputs", f"to be a non-empty tuple of {OUTPUTS}", repr(outputs))
    for name in outputs:
        _check.one_of(op, "outputs", name, OUTPUTS)


def check_rows(op: str, rows: Tensor, name: str, targets: Tensor) -> None:
    _check.tensor(op, "targets", targets)
    _check.dtype(op, "targets", targets, _check.INTEGERS)
    _check.shape(op, "targets", targets, (rows.shape[0],), "(T,)")
    _check.same_device(op, "targets", targets, name, rows.device)


def check_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> None:
    """`prefix`: of the three arguments' names."""
    at, of, plus = (prefix + name for name in ("hidden", "weight", "bias"))
    _check.tensor(op, at, hidden)
    _check.tensor(op, of, weight)
    _check.dtype(op, at, hidden, _check.FLOATS)
    _check.dtype(op, of, weight, (hidden.dtype,))
    _check.ndim(op, at, hidden, "(T, H)")
    _check.ndim(op, of, weight, "(V, H)")
    _check.shape(op, of, weight, (weight.shape[0], hidden.shape[1]), "(V, H)")
    _check.same_device(op, of, weight, at, hidden.device)
    if bias is not None:
        _check.tensor(op, plus, bias)
        _check.dtype(op, plus, bias, (hidden.dtype,))
        _check.shape(op, plus, bias, (weight.shape[0],), "(V,)")
        _check.same_device(op, plus, bias, at, hidden.device)


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


def check_topk(op: str, topk: int, vocab_size: int) -> int:
    if isinstance(topk, bool) or not isinstance(topk, int):
        raise TypeError(f"{op}: expected topk to be an int, got {type(topk).__name__}")
    if not 0 <= topk <= vocab_size:
        _check.fail(op, "topk", f"in [0, vocab_size] = [0, {vocab_size}]", topk)
    return topk


def rows_of(
    op: str,
    rows: Tensor,
    name: str,
    targets: Tensor,
    ids: Tensor | None,
    vocab_mask: Tensor | None,
    vocab: int,
    row_temperature: Tensor | None,
) -> Rows:
    """`rows` is the tensor called `name` that has the rows; `vocab` the length of vocab_mask."""
    check_rows(op, rows, name, targets)
    if ids is not None:
        _check.tensor(op, "ids", ids)
        _check.dtype(op, "ids", ids, _check.INTEGERS)
        _check.ndim(op, "ids", ids, "(T, K)")
        _check.shape(op, "ids", ids, (rows.shape[0], ids.shape[1]), "(T, K)")
        _check.same_device(op, "ids", ids, name, rows.device)
        ids = ids.long().contiguous()
    if vocab_mask is not None:
        _check.tensor(op, "vocab_mask", vocab_mask)
        _check.dtype(op, "vocab_mask", vocab_mask, (torch.bool,))
        _check.shape(op, "vocab_mask", vocab_mask, (vocab,), "(V,)")
        _check.same_device(op, "vocab_mask", vocab_mask, name, rows.device)
        vocab_mask = vocab_mask.contiguous()
    return Rows(targets.long().contiguous(), ids, vocab_mask, row_temperature)


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


def check_rounding(op: str, logits_rounding: str | None) -> bool:
    if logits_rounding not in ROUNDINGS:
        _check.fail(op, "logits_rounding", 'to be None or "bf16"', repr(logits_rounding))
    return logits_rounding == "bf16"


def scalars_of(
    op: str, temperature: float, logit_scale: float, softcap: float | None, ignore_index: int
) -> tuple[float, float, float, int]:
    """The schemas' (temperature, logit_scale, softcap, ignore_index); a softcap of 0 is none."""
    _check.positive(op, "logit_scale", logit_scale)
    if softcap is not None:
        _check.positive(op, "softcap", softcap)
    return temperature, float(logit_scale), float(softcap or 0.0), ignore_index


def with_topk(
    grad_ids: Tensor | None, ids: Tensor | None, grad_topk: Tensor | None, topk_ids: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_id_logprob, ids) with the row's own top tokens among the ids.

    Slots of topk_ids that are -1 hold a constant.
    """
    # compiled, autograd passes zeros for what nobody asked the gradient of
    if ids is None:
        grad_ids = None
    if grad_topk is None or topk_ids.shape[1] == 0:
        return grad_ids, ids
    grad_topk = torch.where(topk_ids < 0, 0.0, grad_topk)
    if grad_ids is None:
        return grad_topk, topk_ids
    return torch.cat([grad_ids, grad_topk], 1), torch.cat([ids, topk_ids], 1)


def select(outputs: Sequence[str], ids: Tensor | None, topk: int, stats: Stats) -> LogprobOutput:
    chosen = {name: getattr(stats, name) for name in outputs}
    if topk:
        chosen |= {"topk_values": stats.topk_values, "topk_ids": stats.topk_ids}
    if ids is not None:
        chosen["id_logprob"] = stats.id_logprob
    return LogprobOutput(**chosen)
