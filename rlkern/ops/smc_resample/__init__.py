"""Which particles of a sequential Monte Carlo decode live on, and with what weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.smc_resample import op as _op  # noqa: F401

_OP = "smc_resample"
KINDS = ("systematic",)


class ResampleOutput(NamedTuple):
    parents: Tensor
    """(N,) int64, the row that each row continues"""
    ess: Tensor
    """(S,) float32, the effective sample size of each group before it was resampled"""
    log_weights: Tensor
    """(N,) float32"""


def smc_resample(
    log_weights: Tensor,
    u: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ess_threshold: float = 0.5,
    kind: str = "systematic",
) -> ResampleOutput:
    """Resamples the groups whose weights have degenerated.

        W = softmax of a group's n log-weights;  ess = 1 / sum_j W_j^2
        where ess < ess_threshold n:
            parents[i] = the first j with W_0 + ... + W_j > (i + u) / n,  i = 0 .. n - 1
            log_weights[i] = logsumexp - log n: the mean weight of the group, which stays the same
        elsewhere: parents[i] = i, and the log-weights as they were

    A particle has floor(n W_j) or ceil(n W_j) children. Power-SMC (arXiv 2602.10273) resamples at
    ess < 0.5 n; its weights grow by (alpha - 1) full_logprob + (full_logprob - logprob) a token,
    both from `sample_tokens`, and need no op. `parents` is what `TreeKVCache.resample` takes.

    Args:
        log_weights: (N,) float32, unnormalised; -inf is a particle without weight.
        u: (S,) float32 in [0, 1), one for each group.
        cu_seqlens: (S + 1,) int64 or int32, the groups' bounds, from 0 to N; one group without it.
        ess_threshold: in [0, 1]; 1 resamples all groups but those of equal weights.
        kind: "systematic".

    Returns:
        ResampleOutput. A group whose weights are all -inf has ess 0, one with NaN or inf has ess
        NaN, one without rows has ess 0; none of these is resampled.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or number that does not fit.

    Sums run in float64. Two runs give the same bits; a group's result is its own.
    """
    _check.tensor(_OP, "log_weights", log_weights)
    _check.dtype(_OP, "log_weights", log_weights, (torch.float32,))
    _check.ndim(_OP, "log_weights", log_weights, "(N,)")
    rows = log_weights.shape[0]
    if cu_seqlens is None:
        cu_seqlens = log_weights.new_zeros((2,), dtype=torch.int64)
        cu_seqlens[1] = rows
    else:
        _check.offsets(_OP, cu_seqlens, "log_weights", log_weights)
    _check.tensor(_OP, "u", u)
    _check.dtype(_OP, "u", u, (torch.float32,))
    _check.shape(_OP, "u", u, (cu_seqlens.shape[0] - 1,), "(S,)")
    _check.same_device(_OP, "u", u, "log_weights", log_weights.device)
    if u.is_cpu and not torch.compiler.is_compiling():
        outside = ~((u >= 0) & (u < 1))
        if bool(outside.any()):
            _check.fail(_OP, "u", "in [0, 1)", u[outside][0].item())
    if isinstance(ess_threshold, bool) or not isinstance(ess_threshold, int | float):
        kind_of = type(ess_threshold).__name__
        raise TypeError(f"{_OP}: expected ess_threshold to be a number, got {kind_of}")
    if not 0 <= ess_threshold <= 1:
        _check.fail(_OP, "ess_threshold", "in [0, 1]", ess_threshold)
    _check.one_of(_OP, "kind", kind, KINDS)
    return ResampleOutput(
        *torch.ops.rlkern.smc_resample(
            log_weights.detach().contiguous(),
            u.contiguous(),
            cu_seqlens.long().contiguous(),
            float(ess_threshold),
        )
    )
