"""Annealed temperature: explore at the beginning of a response, settle towards its end."""

from __future__ import annotations

import numpy as np

from rlkern.rollout.strategies.base import Strategy


class EAD(Strategy):
    """EAD (2510.05251): the t-th token of a response, from 0, is drawn at temperature times

        1 if t < hold, else max(1 + tau_max - exp(t / d), tau_min)
        d = min(d_first + d_grows training_step, d_most)

    `temperature` is what the trainer's log-probs use as well: positions go in, temperatures of the
    same shape come out. (The public sampler has 20 d in the place of d, which its log-probs lack.)
    Positions count from the beginning of the response, through forks. Defaults as published.
    """

    # the trainer's temperature goes by places among trained tokens
    multi_turn = False

    def __init__(
        self,
        *,
        tau_max: float = 1.2,
        tau_min: float = 0.1,
        hold: int = 10,
        d_first: float = 25,
        d_grows: float = 5,
        d_most: float = 40000,
    ) -> None:
        self.tau_max, self.tau_min, self.hold = tau_max, tau_min, hold
        self.d_first, self.d_grows, self.d_most = d_first, d_grows, d_most

    def temperature(self, length: np.ndarray, temperature: float) -> np.ndarray:
        d = min(self.d_first + self.d_grows * self.training_step, self.d_most)
        # exp of more would be infinite; tau_min is reached long before
        fallen = 1 + self.tau_max - np.exp(np.minimum(length / d, 700.0))
        tau = np.where(length < self.hold, 1.0, np.maximum(fallen, self.tau_min))
        return temperature * tau
