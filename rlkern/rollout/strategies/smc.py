"""Sequential Monte Carlo: particles that are resampled by weight while they grow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import rlkern
from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Done, Group, Step


class SMC(Strategy):
    """SMC decoding ("Sampling for Quality", 2604.16453; with a process reward, its_hub).

    num_particles samples of a prompt grow together. Every `every` tokens a particle's log-weight
    grows by what its potential has grown, and if the effective sample size is below min_ess
    num_particles, all are resampled systematically and have equal weights again. Particles that
    have ended take part. When all have, group_size sequences are drawn from them by weight, also
    systematically: a sequence may come more than once, and `Rollouts.origin` says so.

    Args:
        potential: (number of the prompt, response tokens so far) -> log of the target's density
            relative to the policy's, up to a constant; 0 at the start.

    The defaults are Power-SMC's; those of 2604.16453 were not available. Not here: its look-ahead
    weights and its Metropolis-Hastings moves.
    """

    multi_turn = False
    acts_on_steps = True
    together = True

    def __init__(
        self,
        potential: Callable[[int, Tensor], float],
        *,
        num_particles: int = 32,
        every: int = 128,
        min_ess: float = 0.5,
    ) -> None:
        self.potential = potential
        self.num_particles, self.every, self.min_ess = num_particles, every, min_ess

    def begin(self, group_size: int) -> None:
        if group_size > self.num_particles:
            raise ValueError(f"SMC: has {self.num_particles} particles, got {group_size=}")
        super().begin(group_size)

    def rows(self, group_size: int) -> int:
        return self.num_particles

    def first(self, group: Group) -> int:
        # by stream: log-weight, and what it is made from; settled: streams that have ended
        group.notes |= {"weight": {}, "value": {}, "settled": set(), "chosen": None}
        return self.num_particles

    def on_step(self, run: Run, step: Step) -> None:
        self.weigh(run, step)
        for number in np.unique(run.rows.group).tolist():
            group, rows = run.groups[number], run.rows[run.rows.group == number]
            t = int(rows.length[0]) - group.given
            if t % self.every == 0:
                self.settle(run, group, t)
                self._resample(run, group, t)

    def on_group_done(self, run: Run, group: Group) -> None:
        self.settle(run, group, None)
        done = sorted(group.done, key=lambda one: one.stream)
        weights = self._weights(group, [one.stream for one in done])
        random = run.random(group, 0)
        parents = rlkern.smc_resample(weights, uniform(random), ess_threshold=1.0).parents.numpy()
        # equal weights now: evenly spaced ones of them
        chosen = (np.arange(self.group_size) + random.random()) * len(done) / self.group_size
        group.notes["chosen"] = [done[i] for i in parents[chosen.astype(np.int64)].tolist()]

    def select(self, group: Group) -> list[Done]:
        return group.notes["chosen"]

    def weigh(self, run: Run, step: Step) -> None:
        """After every step."""

    def settle(self, run: Run, group: Group, t: int | None) -> None:
        """Brings weights up to date, at t tokens or, None, at the end."""
        weight, value = group.notes["weight"], group.notes["value"]
        start = run.prompt_length(group.number)
        for stream, branch in self._particles(run, group):
            if stream in group.notes["settled"] or weight.get(stream) == -math.inf:
                continue
            now = self.potential(group.number, run.cache.tokens(branch)[start:])
            weight[stream] = weight.get(stream, 0.0) + now - value.get(stream, 0.0)
            value[stream] = now
        group.notes["settled"] |= {one.stream for one in group.done}

    def _particles(self, run: Run, group: Group) -> list[tuple[int, int]]:
        """(stream, branch) of each, once."""
        rows = run.rows[run.rows.group == group.number]
        live = zip(rows.stream.tolist(), rows.branch.tolist(), strict=True)
        return sorted({*live, *((one.stream, one.branch) for one in group.done)})

    def _weights(self, group: Group, streams: list[int]) -> Tensor:
        weight = group.notes["weight"]
        values = torch.tensor([weight.get(s, 0.0) for s in streams], dtype=torch.float64)
        return (values - values.max().nan_to_num()).float()

    def _resample(self, run: Run, group: Group, t: int) -> None:
        rows = run.rows[run.rows.group == group.number]
        live = [(stream, i, None) for i, stream in enumerate(rows.stream.tolist())]
        ended = [(done.stream, -1, done) for done in group.done]
        particles = sorted(live + ended, key=lambda particle: particle[0])
        streams = [stream for stream, *_ in particles]
        weights, u = self._weights(group, streams), uniform(run.random(group, t))
        out = rlkern.smc_resample(weights, u, ess_threshold=self.min_ess)
        if torch.equal(out.log_weights, weights):
            return
        counts = torch.bincount(out.parents, minlength=len(particles)).tolist()
        done = [
            one for (_, _, one), n in zip(particles, counts, strict=True) if one for _ in range(n)
        ]
        copies = np.zeros(len(rows), np.int64)
        for (_, i, one), n in zip(particles, counts, strict=True):
            if one is None:
                copies[i] = n
        gone = {one.branch for one in group.done} - {one.branch for one in done}
        gone |= set(rows.branch[copies == 0].tolist())
        more = np.flatnonzero(copies > 1)
        value = group.notes["value"]
        if len(more):
            born = run.fork(rows[more], copies[more] - 1)
            of = np.repeat(rows.stream[more], copies[more] - 1)
            for stream, parent in zip(born.stream.tolist(), of.tolist(), strict=True):
                value[stream] = value.get(parent, 0.0)
        if gone:
            run.prune(list(gone))
        group.done = done
        group.notes["weight"] = {}


class PowerSMC(SMC):
    """Power-SMC (2602.10273): samples of p(response)^alpha, p the policy at temperature 1.

    A token drawn from q adds alpha_t log p - log q to its particle's log-weight, and

        alpha_t = 1 + (alpha - 1) min(t / ramp, 1),

    whose growth also adds (alpha_t - alpha_(t-1)) log p(tokens before), to particles that have
    ended as well; at the end every particle is weighed at alpha. q is what `generate` was asked
    for; published are temperature 0.25 and top_p 0.9 beside these defaults, and 3072 tokens.
    """

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        ramp: int = 400,
        num_particles: int = 32,
        every: int = 128,
        min_ess: float = 0.5,
    ) -> None:
        super().__init__(lambda *_: 0.0, num_particles=num_particles, every=every, min_ess=min_ess)
        self.alpha, self.ramp = alpha, ramp

    def first(self, group: Group) -> int:
        group.notes["alpha"] = self._alpha(0)
        return super().first(group)

    def weigh(self, run: Run, step: Step) -> None:
        logp = rlkern.logprob_from_logits(step.logits, step.tokens).logprob.tolist()
        which = (step.rows.group.tolist(), step.rows.stream.tolist(), step.rows.length.tolist())
        for number, stream, length, p, q in zip(*which, logp, step.logprob.tolist(), strict=True):
            group = run.groups[number]
            weight, value = group.notes["weight"], group.notes["value"]
            before = value.get(stream, 0.0)
            a, b = (self._alpha(length - group.given + i) for i in (0, 1))
            weight[stream] = weight.get(stream, 0.0) + b * p + (b - a) * before - q
            value[stream] = before + p
            group.notes["alpha"] = b
        for number in np.unique(step.rows.group).tolist():
            self._lift(run.groups[number], run)

    def settle(self, run: Run, group: Group, t: int | None) -> None:
        if t is None and group.notes["alpha"] < self.alpha:
            for stream in {one.stream for one in group.done}:
                self._add(group, stream, self.alpha - group.notes["alpha"])
            group.notes["alpha"] = self.alpha

    def _lift(self, group: Group, run: Run) -> None:
        """What the ramp adds to those that have ended."""
        t = int(run.rows.length[run.rows.group == group.number].max()) - group.given
        for stream in {one.stream for one in group.done}:
            self._add(group, stream, self._alpha(t) - self._alpha(t - 1))

    def _add(self, group: Group, stream: int, alpha: float) -> None:
        weight, value = group.notes["weight"], group.notes["value"]
        weight[stream] = weight.get(stream, 0.0) + alpha * value.get(stream, 0.0)

    def _alpha(self, t: int) -> float:
        return 1 + (self.alpha - 1) * min(t / self.ramp, 1.0) if self.ramp else self.alpha


def uniform(random: np.random.Generator) -> Tensor:
    return torch.from_numpy(random.random(1, dtype=np.float32))
