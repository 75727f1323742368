"""Schemas, fakes and owners of `group_advantage` and `group_moments`; neither has a gradient."""

import torch

from rlkern import _library
from rlkern.ops.group_advantage import reference


def _fake(rewards, group_ids, mask, weights, kind, num_groups, epsilon):
    double = rewards.dtype == torch.float64
    return rewards.new_empty((rewards.shape[0],), dtype=torch.float64 if double else torch.float32)


_library.define(
    "group_advantage(Tensor rewards, Tensor group_ids, Tensor? mask, Tensor? weights, int kind, "
    "int num_groups, float epsilon) -> Tensor",
    _fake,
)
_library.fill("group_advantage", reference.forward, "rlkern.ops.group_advantage.triton:forward")


def _fake_moments(rewards, group_ids, mask, weights, num_groups):
    return rewards.new_empty((3, num_groups), dtype=torch.float64)


_library.define(
    "group_moments(Tensor rewards, Tensor group_ids, Tensor? mask, Tensor? weights, "
    "int num_groups) -> Tensor",
    _fake_moments,
)
_library.fill("group_moments", reference.moments, "rlkern.ops.group_advantage.triton:moments")
