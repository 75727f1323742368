"""A picture of a rollout tree."""

from typing import Any

from matplotlib.axes import Axes


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
