"""The clipped value loss of PPO's critic: loss, gradient and metrics in one pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.value_loss.op import METRICS, ValueLoss
from rlkern.ops.value_loss.reference import ALL_SEQUENCES, FILLED_SEQUENCES, NOTHING, TOKENS

_OP = "value_loss"

# mode -> what token losses are divided by, and whether by their sequence's length too
_MODES = {
    "token-mean": (TOKENS, False),
    "token-sum": (NOTHING, False),
    "seq-mean-token-mean": (FILLED_SEQUENCES, True),
    "seq-mean-token-sum": (FILLED_SEQUENCES, False),
    "seq-mean-token-sum-norm": (FILLED_SEQUENCES, False),
}


class ValueLossOutput(NamedTuple):
    """A float32 scalar to minimise, and float32 scalars on the same device to look at."""

    loss: Tensor
    metrics: dict[str, Tensor]


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    cliprange: float | None = 0.2,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    count_empty: bool = False,
    normalizer: float | Tensor | None = None,
) -> ValueLossOutput:
    """Squared error of a critic, which may not move further than cliprange in its favour.

        L = 1/2 max((V - R)^2, (clip(V, V_old - cliprange, V_old + cliprange) - R)^2)
        loss = aggregate(L)

    Equivalent torch program, padded form::

        clipped = values.clamp(old_values - cliprange, old_values + cliprange)
        L = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        loss = (L * mask).sum() / mask.sum()

    Args:
        values: of the critic that is trained. Packed (T,) with cu_seqlens, or padded (B, L) with
            mask. Packed without cu_seqlens is one run of tokens, for "token-mean" and "token-sum".
        returns: same shape; what `gae` returns.
        old_values: same shape; the critic's values that `gae` was given. Needed with a cliprange.
        cliprange: half the width of the range, positive; None for the plain squared error.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to T, not decreasing. The values are checked on
            the CPU only; on other devices tokens outside of all sequences are ignored.
        mask: (B, L) bool, True where a token counts; all count without it. Masked slots may hold
            anything, NaN included, and get a gradient of exactly 0.
        loss_agg_mode, loss_scale_factor, count_empty: how token losses are averaged, as in
            PolicyObjective.
        normalizer: as in policy_loss, the count of tokens or sequences of the whole batch, in place
            of the count in this call.

    Returns:
        ValueLossOutput(loss, metrics). Differentiable with respect to values: V - R, and 0 where
        the clipped error is the larger one. metrics, means over the tokens of this call, 0 where it
        has none:
            num_tokens
            vf_clipfrac   tokens where the clipped error is the larger one (verl)
            vpred_mean    of values

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or number that does not fit.

    Inputs in bfloat16 or float16 are computed in float32; float64 by the reference, in float64.
    Two runs give the same bits, whatever the number of threads. PPO; verl's compute_value_loss.
    """
    _check.tensor(_OP, "values", values)
    _check.dtype(_OP, "values", values, _check.FLOATS)
    if values.ndim not in (1, 2):
        _check.fail(_OP, "values", "of shape (T,) or (B, L)", tuple(values.shape))
    padded = values.ndim == 2
    for name, value in (("returns", returns), ("old_values", old_values)):
        if value is not None or name == "returns":
            _check.tensor(_OP, name, value)
            _check.dtype(_OP, name, value, _check.FLOATS)
            _check.shape(_OP, name, value, values.shape, "(B, L)" if padded else "(T,)")
            _check.same_device(_OP, name, value, "values", values.device)
    if cliprange is not None:
        _check.positive(_OP, "cliprange", cliprange)
        if old_values is None:
            _check.fail(_OP, "old_values", f"of shape {tuple(values.shape)} with a cliprange", None)
    denominator, divide_by_length, scale = _aggregation(
        loss_agg_mode, loss_scale_factor, count_empty
    )
    if normalizer is not None:
        if denominator == NOTHING:
            reason = "to be None with loss_agg_mode='token-sum' ('token-mean' divides by it)"
            _check.fail(_OP, "normalizer", reason, normalizer)
        denominator = NOTHING
        if isinstance(normalizer, Tensor):
            _check.shape(_OP, "normalizer", normalizer, (), "()")
            _check.same_device(_OP, "normalizer", normalizer, "values", values.device)
        else:
            _check.positive(_OP, "normalizer", normalizer)
            scale = scale / normalizer
    if padded:
        cu_seqlens, mask = _rows(values, cu_seqlens, mask)
    else:
        cu_seqlens = _packed(values, cu_seqlens, mask, loss_agg_mode)

    kind = torch.float64 if values.dtype == torch.float64 else torch.float32

    def plain(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.reshape(-1).to(kind).contiguous()

    old_values = None if cliprange is None else plain(old_values)
    tensors = (plain(returns), old_values, cu_seqlens.contiguous(), mask)
    width = float("inf") if cliprange is None else float(cliprange)
    constants = (width, denominator, divide_by_length, scale)
    loss, metrics = ValueLoss.apply(plain(values), tensors, constants)
    if isinstance(normalizer, Tensor):
        loss = loss / normalizer
    return ValueLossOutput(loss, dict(zip(METRICS, metrics.unbind())))


def _aggregation(mode: str, factor: float | None, count_empty: bool) -> tuple[int, bool, float]:
    _check.one_of(_OP, "loss_agg_mode", mode, _MODES)
    if not isinstance(count_empty, bool):
        raise TypeError(f"{_OP}: expected count_empty to be a bool, got {count_empty!r}")
    if count_empty and mode.startswith("token"):
        reason = f"to be False with loss_agg_mode={mode!r}: it counts tokens"
        _check.fail(_OP, "count_empty", reason, True)
    if mode == "seq-mean-token-sum-norm":
        _check.positive(_OP, "loss_scale_factor", factor)
    elif factor is not None:
        reason = f"to be None with loss_agg_mode={mode!r}, which ignores it"
        _check.fail(_OP, "loss_scale_factor", reason, factor)
    denominator, divide_by_length = _MODES[mode]
    if count_empty:
        denominator = ALL_SEQUENCES
    return denominator, divide_by_length, 1.0 if factor is None else 1.0 / factor


def _rows(
    values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens is not None:
        _check.fail(_OP, "values", "of shape (T,) with cu_seqlens", tuple(values.shape))
    if mask is not None:
        _check.tensor(_OP, "mask", mask)
        _check.dtype(_OP, "mask", mask, (torch.bool,))
        _check.shape(_OP, "mask", mask, values.shape, "(B, L)")
        _check.same_device(_OP, "mask", mask, "values", values.device)
        mask = mask.reshape(-1).contiguous()
    rows, columns = values.shape
    return torch.arange(rows + 1, device=values.device) * columns, mask


def _packed(values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mode: str) -> Tensor:
    if mask is not None:
        reason = "to be None with packed values: pack the tokens that count"
        _check.fail(_OP, "mask", reason, tuple(getattr(mask, "shape", ())))
    if cu_seqlens is None and mode.startswith("token"):
        return torch.arange(2, device=values.device) * values.shape[0]
    _check.offsets(_OP, cu_seqlens, "values", values)
    return cu_seqlens
