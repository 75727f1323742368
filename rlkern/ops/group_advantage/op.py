"""Schema, fake and owners of `group_advantage`; no gradient goes through it."""

import torch

from rlkern import _library
from rlkern.ops.group_advantage import reference


def _fake(rewards, group_ids, mask, kind, num_groups, epsilon):
    double = rewards.dtype == torch.float64
    return rewards.new_empty((rewards.shape[0],), dtype=torch.float64 if double else torch.float32)


_library.define(
    "group_advantage(Tensor rewards, Tensor group_ids, Tensor? mask, int kind, int num_groups, "
    "float epsilon) -> Tensor",
    _fake,
)
_library.fill("group_advantage", reference.forward, "rlkern.ops.group_advantage.triton:forward")
