"""Monte Carlo tree search over segments of responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Done, Group, Rows, Step


@dataclass
class Node:
    parent: int  # of the group's nodes; -1: the prompt
    depth: int
    rows: Rows | None  # the branch that waits at its end; None: it ended, or was expanded
    entropy: float  # mean of the segment's
    q: float = 0.0
    visits: int = 0
    is_terminal: bool = False


class DeepSearch(Strategy):
    """DeepSearch (smiles724/DeepSearch). A node is `segment` tokens; expanding one forks `width`
    branches, which stop after a segment. Until one of them ends a response, the next to be expanded
    is the new one of largest q + explore sqrt(ln N_parent / N); then it is that of largest

        weights[0] tanh(q_parent) + weights[1] entropy + weights[2] sqrt(depth / max_depth)

    of all in the tree. A response adds r max((i + 1) / n, 0.1) to q of the i-th of the n nodes of
    its path, with r = 1 if its reward is above 0, and else, or if it does not end, -1. The search
    ends with num_terminals responses, or nothing left to expand. Returned are up to group_size:
    right ones first, then by mean entropy, the lowest first.

    Published: segments of 256 tokens (16384 in depth 64), width 8, explore 2, weights (0.4, 0.4,
    0.01) with the entropy term off, 8 terminals. Ours: N counts as at least 1, and equal scores go
    to the earlier node. Groups can come out smaller than group_size; a tree that needs more pages
    than 2 width whole responses wants a larger max_cached_tokens.

    Args:
        reward: (number of the prompt, response tokens) -> reward.
    """

    multi_turn = False
    acts_on_steps = True
    together = True

    def __init__(
        self,
        reward: Callable[[int, Tensor], float],
        *,
        segment: int = 256,
        width: int = 8,
        max_depth: int = 64,
        num_terminals: int = 8,
        explore: float = 2.0,
        weights: tuple[float, float, float] = (0.4, 0.0, 0.01),
    ) -> None:
        self.reward, self.segment, self.width = reward, segment, width
        self.max_depth, self.num_terminals = max_depth, num_terminals
        self.explore, self.weights = explore, weights

    def rows(self, group_size: int) -> int:
        return 2 * self.width

    def first(self, group: Group) -> int:
        root = Node(-1, 0, None, 0.0)
        # expanding: the node whose children grow; ended: stream -> (is wrong, mean entropy)
        group.notes |= {"nodes": [root], "expanding": 0, "ended": {}}
        return self.width

    def on_step(self, run: Run, step: Step) -> None:
        rows = run.rows
        given = np.array([run.groups[n].given for n in rows.group.tolist()])
        stops = (rows.length - given) % self.segment == 0
        stops &= ~np.isin(rows.last, run.engine.eos) & (rows.length < run.max_new_tokens)
        if not stops.any():
            return
        parked = run.park(rows.branch[stops])
        for i in range(len(parked)):
            row = parked[np.array([i])]
            self._add(run, run.groups[int(row.group[0])], row, int(row.branch[0]))

    def on_finish(self, run: Run, group: Group, done: Done) -> None:
        history = run.cache.history(done.branch)
        start = run.prompt_length(group.number)
        right = not done.truncated and self.reward(group.number, history.tokens[start:]) > 0
        node = self._add(run, group, None, done.branch)
        node.is_terminal = True
        group.notes["ended"][done.stream] = not right, float(history.entropy[start:].mean())
        nodes, path = group.notes["nodes"], [node]
        while path[-1].parent >= 0:
            path.append(nodes[path[-1].parent])
        for i, one in enumerate(reversed(path)):
            one.q += (1 if right else -1) * max((i + 1) / len(path), 0.1)
            one.visits += 1

    def on_group_done(self, run: Run, group: Group) -> None:
        nodes, expanded = group.notes["nodes"], group.notes["expanding"]
        new = [i for i, node in enumerate(nodes) if node.parent == expanded]
        open_ = [i for i, n in enumerate(nodes) if n.rows is not None and n.depth < self.max_depth]
        if len(group.done) >= self.num_terminals or not open_:
            return
        local = [i for i in new if i in open_]
        if local and not any(nodes[i].is_terminal for i in new):
            best = max(local, key=lambda i: self._local(nodes, nodes[i]))
        else:
            best = max(open_, key=lambda i: self._frontier(nodes, nodes[i]))
        group.notes["expanding"] = best
        rows, nodes[best].rows = nodes[best].rows, None
        run.fork(rows, self.width)
        run.prune(rows.branch)  # its forks keep what they share with it

    def select(self, group: Group) -> list[Done]:
        rank = group.notes["ended"]
        return sorted(group.done, key=lambda one: (*rank[one.stream], one.stream))[
            : self.group_size
        ]

    def _add(self, run: Run, group: Group, rows: Rows | None, branch: int) -> Node:
        nodes, parent = group.notes["nodes"], group.notes["expanding"]
        entropy = run.cache.history(branch).entropy[run.prompt_length(group.number) :]
        last = (len(entropy) - group.given - 1) % self.segment + 1
        mean = float(entropy[len(entropy) - last :].mean())
        nodes.append(Node(parent, nodes[parent].depth + 1, rows, mean))
        return nodes[-1]

    def _local(self, nodes: list[Node], node: Node) -> float:
        above = np.log(max(nodes[node.parent].visits, 1))
        return node.q + self.explore * float(np.sqrt(above / max(node.visits, 1)))

    def _frontier(self, nodes: list[Node], node: Node) -> float:
        quality, entropy, depth = self.weights
        score = quality * np.tanh(nodes[node.parent].q) + entropy * node.entropy
        return float(score + depth * np.sqrt(node.depth / self.max_depth))
