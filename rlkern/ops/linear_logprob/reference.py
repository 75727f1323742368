"""Log-prob, logsumexp and entropy from hidden states in plain torch: the specification.

    logits = hidden @ weight^T, then as logprob_from_logits

The product is taken in float32, or in float64 for float64 inputs: logits are never rounded to
16 bits.
"""

import torch
from torch import Tensor

from rlkern.ops.logprob_from_logits import reference as from_logits


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits(hidden, weight)
    rest = (row_temperature, temperature, logit_scale, softcap, ignore_index, want_entropy)
    return from_logits.forward(logits, targets, *rest)


def backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """grad_hidden = d_logits @ weight, grad_weight = d_logits^T @ hidden; empty if not needed."""
    d_logits = from_logits.backward(
        grad_logprob,
        grad_logsumexp,
        grad_entropy,
        _logits(hidden, weight),
        targets,
        logsumexp,
        entropy,
        row_temperature,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
    )
    grad_hidden = hidden.new_empty((0, hidden.shape[1]))
    grad_weight = weight.new_empty((0, weight.shape[1]))
    if need_hidden:
        grad_hidden = (d_logits @ weight.to(d_logits.dtype)).to(hidden.dtype)
    if need_weight:
        grad_weight = (d_logits.T @ hidden.to(d_logits.dtype)).to(weight.dtype)
    return grad_hidden, grad_weight


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.to(kind) @ weight.to(kind).T
