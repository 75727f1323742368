"""What a rollout strategy may decide, and when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Done, Group, Rows, Step


class Strategy:
    """Plain groups: `group_size` samples of every prompt. Others override what differs.

    A strategy acts through the `Run` that it is handed: `fork`, `prune`, `park`, `spawn`. It keeps
    what it must remember of a group in `group.notes`.
    """

    needs_hidden = False  # Step.hidden is there
    keeps_pages = False  # sequences that have ended can be forked until their group is done
    keeps_root = False  # `spawn` may be called until the group is done
    acts_on_steps = False  # on_logits and on_step are called
    # samples of a prompt begin at the same step, though they may be more than max_sequences: where
    # a strategy compares branches, or forks them before all have begun
    together = False
    multi_turn = True  # no forks inside responses, and an environment may answer
    num_groups: int | None = None  # to return; the others go on in the next call. None: all
    training_step = 0  # for schedules: whoever calls `generate` sets it

    def begin(self, group_size: int) -> None:
        """A call of `generate` begins."""
        self.group_size = group_size

    def rows(self, group_size: int) -> int:
        """How many branches of a group have pages at once, at most."""
        return group_size

    def first(self, group: Group) -> int:
        """How many samples of the prompt to begin with."""
        return self.group_size

    def given(self, number: int, prompt: list[int]) -> list[int]:
        """Response tokens that every sample of this prompt begins with: not drawn, not trained."""
        return []

    def temperature(self, length: np.ndarray, temperature: float) -> np.ndarray | float:
        """Of the draws that make responses of length + 1 tokens."""
        return temperature

    def greedy(self, run: Run, rows: Rows, greedy: bool) -> np.ndarray | bool:
        """Which rows take the most likely token instead of a draw."""
        return greedy

    def on_logits(self, run: Run, step: Step) -> None:
        """Tokens are drawn and not appended yet: forks with `forced` tokens stand beside them."""

    def on_step(self, run: Run, step: Step) -> None:
        """The drawn tokens are appended; `run.rows` are the branches."""

    def on_finish(self, run: Run, group: Group, done: Done) -> None:
        """A sequence has ended; without keeps_pages this is the last moment to fork it."""

    def on_group_done(self, run: Run, group: Group) -> None:
        """No branch of the group is left: fork or spawn, or it ends."""

    def select(self, group: Group) -> list[Done]:
        """The sequences that are returned, of those of a group that has ended."""
        return sorted(group.done, key=lambda done: done.stream)
