"""Trees that fork where the sampled tokens were least likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlkern.rollout.state import Rows
from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Done, Group


class TreeRL(Strategy):
    """EPTree of TreeRL (THUDM/TreeRL): num_trees samples of a prompt; then num_rounds times, in
    each of those trees, num_children answers from before each of its num_forks tokens of smallest
    log-prob, which stands for the entropy. That makes

        num_trees (num_forks num_rounds num_children + 1)

    sequences, of which group_size, drawn uniformly, are returned. The first token of a response and
    end tokens are no places to fork at, and a place serves once.

    Published: 6, 2, 1, 2, so 30 sequences of which 16 are used, at temperature 1.2; how those 16
    are chosen was not available.
    """

    multi_turn = False
    keeps_pages = True

    def __init__(
        self,
        *,
        num_trees: int = 6,
        num_forks: int = 2,
        num_rounds: int = 1,
        num_children: int = 2,
    ) -> None:
        self.num_trees, self.num_forks = num_trees, num_forks
        self.num_rounds, self.num_children = num_rounds, num_children

    def begin(self, group_size: int) -> None:
        most = self.rows(group_size)
        if group_size > most:
            raise ValueError(f"TreeRL: makes {most} sequences a prompt, got {group_size=}")
        super().begin(group_size)

    def rows(self, group_size: int) -> int:
        return self.num_trees * (self.num_forks * self.num_rounds * self.num_children + 1)

    def first(self, group: Group) -> int:
        group.notes |= {"rounds": 0, "used": set(), "chosen": None}
        return self.num_trees

    def on_group_done(self, run: Run, group: Group) -> None:
        if group.notes["rounds"] < self.num_rounds:
            group.notes["rounds"] += 1
            self._grow(run, group)
        done = super().select(group)
        size = min(self.group_size, len(done))
        chosen = run.random(group).choice(len(done), size, replace=False)
        group.notes["chosen"] = [done[i] for i in sorted(chosen.tolist())]

    def _grow(self, run: Run, group: Group) -> None:
        trees: dict[int, list[tuple[float, int, int]]] = {}  # (log-prob, stream, position)
        by_stream = {one.stream: one for one in group.done}
        for stream in sorted(by_stream):
            trees.setdefault(self._tree(group, stream), [])
            trees[self._tree(group, stream)] += self._places(run, group, by_stream[stream])
        for places in trees.values():
            for _, stream, position in sorted(places)[: self.num_forks]:
                group.notes["used"].add((stream, position))
                run.fork(Rows.of([by_stream[stream]]), self.num_children, at=position)

    def select(self, group: Group) -> list[Done]:
        return group.notes["chosen"]

    def _tree(self, group: Group, stream: int) -> int:
        while group.lineage[stream][0] >= 0:
            stream = group.lineage[stream][0]
        return stream

    def _places(self, run: Run, group: Group, done: Done) -> list[tuple[float, int, int]]:
        """Of the tokens that this sequence itself has drawn."""
        history = run.cache.history(done.branch)
        start = run.prompt_length(group.number)
        tokens, logprob = history.tokens[start:].numpy(), history.logprob[start:].tolist()
        own = group.drawn_by(done.stream, done.length) == done.stream
        own &= ~np.isin(tokens, run.engine.eos)
        # a fork's first token stands where its parent's was
        own[: group.lineage[done.stream][1] + 1] = False
        places = [(logprob[i], done.stream, i) for i in np.flatnonzero(own).tolist()]
        return [place for place in places if place[1:] not in group.notes["used"]]
