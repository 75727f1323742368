"""The LM head as trainers call it: any leading shape, mixed dtypes, autocast."""

from typing import Any

import torch
from torch import Tensor

import rlkern


def head(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> rlkern.LogprobOutput:
    """linear_logprob of (..., H) hidden states and (...) ids; outputs have their shape.

    Computed in the dtype of autocast, or else in `dtype`, or else that of weight: what is of
    another is converted, a copy of weight each call.
    """
    device = hidden.device.type
    dtype = dtype or weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature.expand(ids.shape).reshape(-1)
    bias = options.pop("bias", None)
    with torch.autocast(device, enabled=False):
        out = rlkern.linear_logprob(
            hidden.reshape(-1, hidden.shape[-1]).to(dtype),
            weight.to(dtype),
            ids.reshape(-1),
            bias=None if bias is None else bias.to(dtype),
            temperature=temperature,
            **options,
        )
    return _shaped(out, ids.shape)


def from_logits(logits: Tensor, targets: Tensor, **options: Any) -> rlkern.LogprobOutput:
    """logprob_from_logits of (..., V) logits and (...) targets; outputs have their shape."""
    flat = logits.reshape(-1, logits.shape[-1])
    return _shaped(rlkern.logprob_from_logits(flat, targets.reshape(-1), **options), targets.shape)


def _shaped(out: rlkern.LogprobOutput, shape: torch.Size) -> rlkern.LogprobOutput:
    values = (None if x is None else x.view(*shape, *x.shape[1:]) for x in out)
    return rlkern.LogprobOutput(*values)
