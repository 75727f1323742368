"""Pruning of samples under way, so that a group keeps both good and bad ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Step


class ARRoL(Strategy):
    """ARRoL (2603.24840): when the branches of a group have `at` tokens, `quality` says from their
    last hidden states how likely each will be right; one after another is pruned, until `keep` of
    the group are left, so that the mean of those left comes closest to `ratio` each time. Sequences
    that have ended by then stay, and count as part of what is kept.

    Groups come out smaller than group_size. ratio 0.5 is published. The quality head, which the
    paper trains during the run, is the caller's; the lengths at which it is asked, the share that
    is kept and the rule that picks were not available: at and keep have no default, the rule is
    ours.

    Args:
        quality: hidden states [R, H] -> [R] in [0, 1].
        at: response lengths, rising.
        keep: share of group_size that is left after each of them.
    """

    multi_turn = False  # the branches of a group have equal lengths here
    acts_on_steps = True
    needs_hidden = True
    together = True

    def __init__(
        self,
        quality: Callable[[Tensor], Tensor],
        at: Sequence[int],
        keep: Sequence[float],
        *,
        ratio: float = 0.5,
    ) -> None:
        if len(at) != len(keep) or not at:
            raise ValueError(f"ARRoL: expected a share for each length, got {at} and {keep}")
        self.quality, self.ratio = quality, ratio
        self.keep = dict(zip(at, keep, strict=True))

    def on_logits(self, run: Run, step: Step) -> None:
        rows = step.rows
        for number in np.unique(rows.group[np.isin(rows.length, list(self.keep))]).tolist():
            mine = np.flatnonzero(rows.group == number)
            left = round(self.keep[int(rows.length[mine[0]])] * self.group_size)
            left = max(left, 1) - len(run.groups[number].done)
            quality = self.quality(step.hidden[mine]).float().cpu().numpy()
            gone = too_many(quality, left, self.ratio)
            if len(gone):
                run.prune(rows.branch[mine[gone]])


def too_many(quality: np.ndarray, keep: int, ratio: float) -> np.ndarray:
    """Which to drop so that `keep` are left, with a mean near `ratio`; earlier ones at a tie."""
    left = np.arange(len(quality))
    while len(left) > max(keep, 0):
        rest = quality[left].sum() - quality[left]
        mean = rest / max(len(left) - 1, 1)
        left = np.delete(left, np.argmin(np.abs(mean - ratio)))
    return np.setdiff1d(np.arange(len(quality)), left)
