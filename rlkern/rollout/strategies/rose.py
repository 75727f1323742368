"""Restarts where the policy is unsure between tokens that mean different things."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rlkern
from rlkern.rollout.state import Rows
from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Group, Step


class ROSE(Strategy):
    """ROSE (2601.05053): group_size rounds of one sequence each. A round begins at the prompt
    with probability epsilon, else before the token, of all that the group has written, of largest

        H (sum_i p_i^2 - || sum_i p_i e_i ||^2)

    with H the entropy, p the top_k probabilities and e the normalised input embeddings of those
    tokens: entropy times minus the mass that different tokens share in meaning. A place serves
    once; the public code may take the same one again and again.

    Probabilities are at temperature 1, not normalised over the top_k. Defaults as published.
    """

    multi_turn = False
    acts_on_steps = True
    keeps_pages = True
    keeps_root = True

    def __init__(self, *, epsilon: float = 0.5, top_k: int = 20) -> None:
        self.epsilon, self.top_k = epsilon, top_k

    def first(self, group: Group) -> int:
        group.notes["places"] = {}  # (stream, position) -> score
        return 1

    def on_logits(self, run: Run, step: Step) -> None:
        embeddings = run.engine.model.get_input_embeddings().weight
        found = rlkern.branch_select(step.logits, m=1, embedding=embeddings, top=self.top_k)
        scores = found.diversity.tolist()
        rows = step.rows
        which = (rows.group.tolist(), rows.stream.tolist(), rows.length.tolist(), scores)
        for number, stream, position, score in zip(*which, strict=True):
            group = run.groups[number]
            if position > group.lineage[stream][1]:  # there its parent, or the prompt, goes on
                group.notes["places"][stream, position] = score

    def on_group_done(self, run: Run, group: Group) -> None:
        if len(group.done) >= self.group_size:
            return
        places = group.notes["places"]
        restarts = run.random(group, len(group.done)).random() < self.epsilon
        if restarts or not places:
            run.spawn(group, 1)
            return
        stream, position = max(places, key=places.get)
        del places[stream, position]
        run.fork(Rows.of([one for one in group.done if one.stream == stream]), at=position)
