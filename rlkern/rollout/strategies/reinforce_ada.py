"""Rounds of samples until a group has something to learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Done, Group


class ReinforceAda(Strategy):
    """Reinforce-Ada (2510.04996): up to max_rounds rounds of round_size samples of a prompt, of
    which group_size are returned. A sample is positive if its reward is above threshold. A prompt
    is done when it has

        "balanced": group_size / 2 positive and as many negative samples,
        "positive_focused": at least one positive sample.

    Returned are group_size / 2 of each kind, earlier ones first; where one kind has too few, the
    other fills up. `rewards` has those of all samples of each prompt, by its number: the baseline
    is meant to be over all of them, not only over those that are returned.

    Args:
        reward: (number of the prompt, response tokens) -> reward.

    Published: round_size 8, 4 rounds, threshold 0.7, and 4 samples returned.
    """

    keeps_root = True

    def __init__(
        self,
        reward: Callable[[int, Tensor], float],
        *,
        round_size: int = 8,
        max_rounds: int = 4,
        threshold: float = 0.7,
        until: str = "balanced",
    ) -> None:
        if until not in ("balanced", "positive_focused"):
            raise ValueError(
                f"ReinforceAda: expected until to be balanced or positive_focused, got {until!r}"
            )
        self.reward, self.round_size, self.max_rounds = reward, round_size, max_rounds
        self.threshold, self.until = threshold, until
        self.rewards: dict[int, list[float]] = {}

    def begin(self, group_size: int) -> None:
        if group_size > self.round_size * self.max_rounds:
            most = self.round_size * self.max_rounds
            raise ValueError(f"ReinforceAda: makes at most {most} samples, got {group_size=}")
        super().begin(group_size)
        self.rewards = {}

    def rows(self, group_size: int) -> int:
        return self.round_size

    def first(self, group: Group) -> int:
        group.notes |= {"rounds": 1, "rewards": {}}  # rewards by stream
        return self.round_size

    def on_finish(self, run: Run, group: Group, done: Done) -> None:
        tokens = run.cache.tokens(done.branch)[run.prompt_length(group.number) :]
        group.notes["rewards"][done.stream] = self.reward(group.number, tokens)

    def on_group_done(self, run: Run, group: Group) -> None:
        positive, negative = self._kinds(group)
        half = self.group_size / 2
        balanced = len(positive) >= half and len(negative) >= half
        enough = balanced if self.until == "balanced" else len(positive) > 0
        lacks = len(group.done) < self.group_size
        if group.notes["rounds"] < self.max_rounds and (lacks or not enough):
            group.notes["rounds"] += 1
            run.spawn(group, self.round_size)

    def select(self, group: Group) -> list[Done]:
        rewards = group.notes["rewards"]
        self.rewards[group.number] = [rewards[stream] for stream in sorted(rewards)]
        positive, negative = self._kinds(group)
        half = self.group_size // 2
        take = max(self.group_size - len(negative), min(half, len(positive)))
        chosen = positive[:take] + negative[: self.group_size - take]
        return sorted(chosen, key=lambda done: done.stream)

    def _kinds(self, group: Group) -> tuple[list[Done], list[Done]]:
        done, rewards = super().select(group), group.notes["rewards"]
        positive = [one for one in done if rewards[one.stream] > self.threshold]
        return positive, [one for one in done if rewards[one.stream] <= self.threshold]
