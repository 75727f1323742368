"""What a rollout tree looks like: who forked from whom, and a picture of it."""

from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from rlkern.rollout import Rollouts


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


def draw(axes: Axes, tree: dict[str, Any]) -> None:
    """Time to the right; a line for each sequence's own tokens, coloured by its reward."""
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(tree["parent"]):
        children.setdefault(parent, []).append(i)
    height: dict[int, int] = {}
    stack = children.get(-1, [])[::-1]
    while stack:  # depth first: a fork lies below what it left, the latest fork nearest
        i = stack.pop()
        height[i] = len(height)
        stack += sorted(children.get(i, []), key=lambda child: tree["at"][child])
    low, high = min(tree["reward"]), max(tree["reward"])
    for i, y in height.items():
        parent, at = tree["parent"][i], tree["at"][i]
        share = (tree["reward"][i] - low) / (high - low) if high > low else 0.5
        color = (0.8 - 0.7 * share, 0.2 + 0.4 * share, 0.3)
        axes.plot([at, tree["length"][i]], [y, y], color=color, lw=2, solid_capstyle="round")
        top = height[parent] if parent >= 0 else 0
        axes.plot([at, at], [top, y], color="0.6", lw=1, zorder=0)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel("response tokens")
