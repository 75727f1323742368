"""Groups that go on from the beginning of an answer that is known to be right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Group, Step


class PrefixRL(Strategy):
    """PrefixRL (2601.18795): samples after the prompt and the first h tokens of a given trace.

    Those h tokens are part of the responses and False in `Rollouts.mask`. With several h the group
    is divided evenly among them, longer ones first; the trace is computed once, up to the longest.
    A trace without more than h tokens, and one token is always left to draw, goes without that h;
    a prompt without any is sampled as usual.

    Args:
        traces: (number of the prompt, its tokens) -> response tokens, off-policy and right.
        lengths: the values of h, which the paper chooses so that success is neither rare nor sure.
            Its list was not available: there is no default.
    """

    multi_turn = False
    acts_on_steps = True
    together = True
    keeps_root = True

    def __init__(
        self, traces: Callable[[int, list[int]], Sequence[int]], lengths: Sequence[int]
    ) -> None:
        if not lengths or min(lengths) < 0:
            raise ValueError(f"PrefixRL: expected lengths of at least 0, got {list(lengths)}")
        self.traces, self.lengths = traces, sorted(set(lengths), reverse=True)

    def given(self, number: int, prompt: list[int]) -> list[int]:
        trace = list(self.traces(number, prompt))
        longest = max((h for h in self.lengths if h < len(trace)), default=0)
        return trace[:longest]

    def first(self, group: Group) -> int:
        lengths = [h for h in self.lengths if h <= group.given] or [group.given]
        even, more = divmod(self.group_size, len(lengths))
        counts = [even + (i < more) for i in range(len(lengths))]
        group.notes["shorter"] = dict(zip(lengths[1:], counts[1:], strict=True))
        return counts[0]

    def on_step(self, run: Run, step: Step) -> None:
        for group in run.groups.values():
            if group.lineage:
                shorter, group.notes["shorter"] = group.notes["shorter"], {}
                for h, n in shorter.items():
                    run.fork(group.stem(), n, at=h)
