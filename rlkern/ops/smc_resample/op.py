"""Schema, fake and owners of `smc_resample`; it has no gradient."""

import torch

from rlkern import _library
from rlkern.ops.smc_resample import reference


def _fake(log_weights, u, cu_seqlens, ess_threshold):
    rows, groups = log_weights.shape[0], cu_seqlens.shape[0] - 1
    return (
        log_weights.new_empty((rows,), dtype=torch.int64),
        log_weights.new_empty((groups,)),
        log_weights.new_empty((rows,)),
    )


_library.define(
    "smc_resample(Tensor log_weights, Tensor u, Tensor cu_seqlens, float ess_threshold) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
)
_library.fill("smc_resample", reference.forward, "rlkern.ops.smc_resample.triton:forward")
