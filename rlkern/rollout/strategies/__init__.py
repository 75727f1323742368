"""How branches of a rollout fork and end."""

from rlkern.rollout.strategies.base import Strategy

STRATEGIES: dict[str, type[Strategy]] = {"": Strategy}
"""By the names that recipes use; "": plain groups."""

__all__ = ["STRATEGIES", "Strategy"]
