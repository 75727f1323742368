"""Critical-token re-generation: more answers from where the policy was least sure."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from rlkern.rollout.state import Rows
from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Done, Group


class CURE(Strategy):
    """CURE, first stage (bytedance/CURE): num_first samples; then, of each, num_regenerated
    answers from the response before one of its top_k most uncertain tokens, drawn uniformly. That
    token itself is drawn anew. group_size must be num_first (1 + num_regenerated).

    Entropies are those of the decode: no pass of their own. The first token of a response, end
    tokens and `skip` are never chosen; a response without any other begins again at its prompt.

    Args:
        skip: token ids that are no branch points. Published: special tokens, and those that show
            at most one character; that takes the tokenizer, so the default is none.

    Defaults as published, with temperature 1.
    """

    multi_turn = False
    keeps_pages = True

    def __init__(
        self,
        *,
        num_first: int = 4,
        num_regenerated: int = 3,
        top_k: int = 20,
        skip: Collection[int] = (),
    ) -> None:
        self.num_first, self.num_regenerated, self.top_k = num_first, num_regenerated, top_k
        self.skip = np.asarray(list(skip), np.int64)

    def begin(self, group_size: int) -> None:
        size = self.num_first * (1 + self.num_regenerated)
        if group_size != size:
            raise ValueError(f"CURE: makes {size} sequences a prompt, got group_size={group_size}")
        super().begin(group_size)

    def first(self, group: Group) -> int:
        return self.num_first

    def on_group_done(self, run: Run, group: Group) -> None:
        if len(group.done) > self.num_first:
            return
        done = sorted(group.done, key=lambda one: one.stream)
        at = [self._critical(run, group, one) for one in done]
        run.fork(Rows.of(done), self.num_regenerated, at=at)

    def _critical(self, run: Run, group: Group, done: Done) -> int:
        history = run.cache.history(done.branch)
        start = run.prompt_length(group.number)
        tokens, entropy = history.tokens[start:].numpy(), history.entropy[start:].numpy()
        fits = ~np.isin(tokens, run.engine.eos) & ~np.isin(tokens, self.skip)
        fits[: group.given + 1] = False
        places = np.flatnonzero(fits)
        if not len(places):
            return group.given
        best = places[np.argsort(-entropy[places], kind="stable")][: self.top_k]
        return int(run.random(group, done.stream).choice(best))
