"""Schema, fake and owners of `branch_select`; it has no gradient."""

import torch

from rlkern import _library
from rlkern.ops.branch_select import reference


def _fake(log_probs, ids, entropy, embedding, m, top, tau_abs, tau_rel):
    rows = log_probs.shape[0]
    return (
        log_probs.new_empty((rows, m), dtype=torch.bool),
        log_probs.new_empty((0 if embedding is None else rows,)),
    )


_library.define(
    "branch_select(Tensor log_probs, Tensor ids, Tensor entropy, Tensor? embedding, int m, "
    "int top, float tau_abs, float tau_rel) -> (Tensor, Tensor)",
    _fake,
)
_library.fill("branch_select", reference.forward, "rlkern.ops.branch_select.triton:forward")
