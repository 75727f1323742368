"""Partial rollouts: nobody waits for the longest responses."""

from rlkern.rollout.strategies.base import Strategy


class APRIL(Strategy):
    """APRIL (RLsys-Foundation/APRIL): a call returns the first num_groups groups that are complete
    and leaves the others, with their tokens, log-probs and versions, to the next call, which goes
    on with them before it begins prompts of its own. Hand in more prompts than num_groups:
    published are 64 for 32.

    `Rollouts.prompt_ids` numbers the prompts through all calls, `Rollouts.versions` says which
    weights drew each token, and `NativeEngine(stale=)` whether keys and values of older weights are
    computed again. A call that asks for all groups (any other strategy) completes what is left.
    `len(engine.kept.groups)` groups are left over; which ones depends on what is decoded at once.
    """

    def __init__(self, num_groups: int = 32) -> None:
        if num_groups < 1:
            raise ValueError(f"APRIL: expected num_groups >= 1, got {num_groups}")
        self.num_groups = num_groups
