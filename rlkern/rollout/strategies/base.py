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

    greedy: bool | None = None  # None: as `generate` was asked
    needs_hidden = False  # Step.hidden is there
    keeps_pages = False  # sequences that have ended can be forked until their group is done
    keeps_root = False  # `spawn` may be called until the group is done
    acts_on_steps = False  # on_logits and on_step are called

    def begin(self, group_size: int) -> None:
        """A call of `generate` begins."""
        self.group_size = group_size

    def rows(self, group_size: int) -> int:
        """How many branches of a group there are at once, at most."""
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

    def on_logits(self, run: Run, step: Step) -> None:
        """Tokens are drawn and not appended yet: forks with `forced` tokens stand beside them."""

    def on_step(self, run: Run, step: Step) -> None:
        """The drawn tokens are appended; `run.rows` are the branches."""

    def on_finish(self, run: Run, group: Group, done: Done) -> None:
        """A sequence has ended."""

    def on_group_done(self, run: Run, group: Group) -> None:
        """No branch of the group is left: fork or spawn, or it ends."""

    def select(self, group: Group) -> list[Done]:
        """The sequences that are returned, of those of a group that has ended."""
        return sorted(group.done, key=lambda done: done.stream)

    # For strategies that carry groups over from one call to the next.

    def enough(self, ended: int) -> bool:
        """Whether to stop after this many groups."""
        return False

    def num_prompts(self, new: int) -> int:
        """The number of the first of this call's prompts."""
        return 0

    def take_kept(self) -> list[tuple[Group, Rows]]:
        """What `keep` was given by the call before."""
        return []

    def keep(self, groups: list[tuple[Group, Rows]]) -> None:
        """What a call that had enough leaves over: their branches are suspended."""

    def kept_numbers(self) -> set[int]:
        return set()
