"""Schema, fake and owners of `gae`; no gradient goes through it."""

from rlkern import _library
from rlkern.ops.gae import reference


def _fake(rewards, values, cu_seqlens, mask, gamma, lam, whiten):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


_library.define(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, float gamma, float lam, "
    "bool whiten) -> (Tensor, Tensor)",
    _fake,
)
_library.fill("gae", reference.forward, "rlkern.ops.gae.triton:forward")
