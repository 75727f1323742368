"""Look-ahead tree rollouts: branch where two tokens are about as likely, keep what diverges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

import rlkern
from rlkern.rollout.strategies.base import Strategy

if TYPE_CHECKING:
    from rlkern.rollout.run import Run
    from rlkern.rollout.state import Group, Rows, Step


class LATR(Strategy):
    """LATR (2510.24302). A group begins as one branch; at every step each of its branches forks

        to the j-th likely token, 2 <= j <= top_m, if p_j > tau_abs and p_1 - p_j < tau_rel

    (probabilities at temperature 1), while there are fewer than its share of group_size; lower
    ranks go without first. A branch that is r in `ages` tokens old is compared with what its parent
    wrote in the same r places, and pruned with all that was forked from it if edit distance / r <
    tau_ed, or suffix match > suffix, or ROUGE-L > rouge, unless one of the two has ended.

    The tree phase ends when the tree has full - decay t / tree_tokens of its share at its t-th
    token and no branch younger than max(ages), or at tree_tokens. What is left of group_size are
    then plain samples of the prompt, and the branches go on, drawing as `generate` was asked to.

    Args:
        sample: draw in the tree phase, too; published default: its branches are greedy.
        share: of group_size for the tree, as a number or {training_step: share from there on}.
            Published for mathematics {0: 1, 100: .75, 200: .5, 300: .25}, for countdown
            {0: 1, 10: .75, 20: .5, 80: .25, 200: 0}.

    Published defaults; the script for mathematics has tau_abs 0.15, tau_rel 0.25, suffix 0.2, rouge
    0.5, and tree_tokens is 512 or 1024. Not here: the filter by cumulative probability and the
    scheduler of tau.
    """

    multi_turn = False
    acts_on_steps = True
    together = True
    keeps_root = True

    def __init__(
        self,
        *,
        top_m: int = 2,
        tau_abs: float = 0.25,
        tau_rel: float = 0.15,
        ages: Sequence[int] = (20, 30, 50),
        tau_ed: float | None = 0.4,
        suffix: float | None = None,
        rouge: float | None = None,
        full: float = 0.98,
        decay: float = 0.05,
        tree_tokens: int = 512,
        sample: bool = False,
        share: float | dict[int, float] = 1.0,
    ) -> None:
        self.select_by = {"m": top_m, "tau_abs": tau_abs, "tau_rel": tau_rel}
        self.ages, self.limits = tuple(ages), {"edit": tau_ed, "suffix": suffix, "rouge": rouge}
        self.full, self.decay, self.tree_tokens = full, decay, tree_tokens
        self.sample = sample
        self.share = share if isinstance(share, dict) else {0: share}

    def first(self, group: Group) -> int:
        share = [s for step, s in sorted(self.share.items()) if step <= self.training_step][-1]
        cap = round(share * self.group_size)
        # forked branch -> its parent, and how many response tokens they share
        group.notes |= {"cap": cap, "grows": cap > 0, "parent": {}}
        return 1 if cap else self.group_size

    def greedy(self, run: Run, rows: Rows, greedy: bool) -> np.ndarray | bool:
        return greedy if self.sample or greedy else self._grows(run, rows)

    def on_logits(self, run: Run, step: Step) -> None:
        at = np.flatnonzero(self._grows(run, step.rows))
        if not len(at):
            return
        numbers = step.rows.group[at].tolist()
        room = {n: run.groups[n].notes["cap"] - self._size(run, run.groups[n]) for n in {*numbers}}
        if not any(room.values()):
            return
        index = torch.from_numpy(at).to(step.logits.device)
        found = rlkern.branch_select(step.logits[index], **self.select_by)
        # a token that was drawn has its branch already
        wanted = found.branch & (found.ids != step.tokens[index, None])
        chosen = []
        for rank, i in wanted.T.nonzero().tolist():
            if room[numbers[i]] > 0:
                room[numbers[i]] -= 1
                chosen.append((int(at[i]), int(found.ids[i, rank])))
        if not chosen:
            return
        chosen.sort(key=lambda pair: pair[0])
        rows, tokens = (np.array(x, np.int64) for x in zip(*chosen, strict=True))
        forced = torch.from_numpy(tokens).to(step.logits.device)
        logprob, entropy = run.logprob_of(step, rows, forced)
        parents, counts = np.unique(rows, return_counts=True)
        born = run.fork(step.rows[parents], counts, forced=forced, logprob=logprob, entropy=entropy)
        for i, row in enumerate(rows.tolist()):
            note = run.groups[int(born.group[i])].notes["parent"]
            note[int(born.branch[i])] = int(step.rows.branch[row]), int(step.rows.length[row])

    def on_step(self, run: Run, step: Step) -> None:
        rows = run.rows
        grows = self._grows(run, rows)
        if not grows.any():
            return
        going = grows & ~np.isin(rows.last, run.engine.eos)
        live = dict(zip(rows.branch[going].tolist(), np.flatnonzero(going).tolist(), strict=True))
        pairs: dict[int, list[tuple[int, int]]] = {}
        for branch, i in live.items():
            parent, shared = run.groups[int(rows.group[i])].notes["parent"].get(branch, (-1, 0))
            age = int(rows.length[i]) - shared
            if age in self.ages and parent in live:
                pairs.setdefault(age, []).append((branch, parent))
        alike = [b for age, which in pairs.items() for b in self._alike(run, age, which)]
        if alike:
            run.prune(alike, subtree=True)
        for number in np.unique(rows.group[grows]).tolist():
            if self._is_grown(run, run.groups[number]):
                self._fill(run, run.groups[number])

    def on_group_done(self, run: Run, group: Group) -> None:
        if group.notes["grows"]:
            self._fill(run, group)

    def _alike(self, run: Run, age: int, pairs: list[tuple[int, int]]) -> list[int]:
        """Of (branch, parent) pairs, the branches that say what their parents say."""
        last = [[run.cache.tokens(b)[-age:] for b in side] for side in zip(*pairs, strict=True)]
        a, b = (torch.stack(tokens) for tokens in last)
        bad = torch.zeros(len(pairs), dtype=torch.bool)
        for mode, limit in self.limits.items():
            if limit is not None:
                share = rlkern.suffix_similarity(a, b, mode=mode)
                bad |= share < limit if mode == "edit" else share > limit
        return [pairs[i][0] for i in bad.nonzero()[:, 0].tolist()]

    def _grows(self, run: Run, rows: Rows) -> np.ndarray:
        return np.array([run.groups[n].notes["grows"] for n in rows.group.tolist()], bool)

    def _size(self, run: Run, group: Group) -> int:
        return int((run.rows.group == group.number).sum()) + len(group.done)

    def _is_grown(self, run: Run, group: Group) -> bool:
        rows = run.rows[run.rows.group == group.number]
        if not len(rows):
            return True
        t = int(rows.length.max()) - group.given
        shared = [group.notes["parent"].get(b, (-1, -np.inf))[1] for b in rows.branch.tolist()]
        young = (rows.length - np.array(shared) < max(self.ages)).any()
        enough = self.full - self.decay * t / self.tree_tokens
        filled = self._size(run, group) >= enough * group.notes["cap"]
        return t >= self.tree_tokens or (filled and not young)

    def _fill(self, run: Run, group: Group) -> None:
        group.notes["grows"] = False
        run.spawn(group, self.group_size - self._size(run, group))
