"""What a rollout tree looks like: who forked from whom."""

from typing import Any

import torch
from torch import Tensor

from rlkern.rollout.engine import Rollouts


def forks(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """-> of each sequence, int64 [S]: the one whose tokens it begins with, or -1; how many."""
    place = torch.arange(len(rollouts.tokens), device=rollouts.tokens.device)
    origin = place if rollouts.origin is None else rollouts.origin
    shared = torch.nn.functional.pad((origin < place).cumsum(0), (1, 0))
    first, last = rollouts.cu_seqlens[:-1], rollouts.cu_seqlens[1:]
    at = shared[last] - shared[first]  # what is shared comes first
    before = origin[(first + at - 1).clamp(min=0)] if len(place) else at
    parent = torch.searchsorted(rollouts.cu_seqlens, before, right=True) - 1
    return torch.where(at > 0, parent, -1), at


def widest(rollouts: Rollouts, rewards: Tensor) -> dict[str, Any] | None:
    """The group that shares most of its response tokens, as a record; None where none does."""
    parent, at = forks(rollouts)
    if not len(at) or int(at.max()) == 0:
        return None
    shared = at.new_zeros(int(rollouts.group_ids.max()) + 1).index_add(0, rollouts.group_ids, at)
    rows = (rollouts.group_ids == shared.argmax()).nonzero()[:, 0]
    row_of = {row: i for i, row in enumerate(rows.tolist())}
    return {
        "parent": [row_of.get(p, -1) for p in parent[rows].tolist()],
        "at": at[rows].tolist(),
        "length": rollouts.lengths[rows].tolist(),
        "reward": [round(r, 4) for r in rewards[rows].tolist()],
    }
