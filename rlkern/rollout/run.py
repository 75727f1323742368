"""One call of the engine: who is decoded, what is fed, and what becomes of each branch.

Read `all`, then `step`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import rlkern
from rlkern.kv import OutOfPages, TreeExport, Work
from rlkern.rollout.engine import Rollouts, first_place, offsets
from rlkern.rollout.state import Done, Group, Rows, Step

if TYPE_CHECKING:
    from rlkern.rollout.native import NativeEngine
    from rlkern.rollout.strategies.base import Strategy

Numbers = np.ndarray | list[int] | int


class Ended(NamedTuple):
    """A group's sequences, as rows of the tokens of its tree."""

    group: Group
    done: list[Done]
    at: list[np.ndarray]  # of each sequence, rows of `tree`, without the prompt
    tree: TreeExport


class Run:
    """The state of `NativeEngine.generate`, and what strategies do to it."""

    def __init__(
        self,
        engine: NativeEngine,
        strategy: Strategy,
        max_new_tokens: int,
        temperature: float,
        sampling: dict[str, Any],
        seed: int,
    ) -> None:
        self.engine, self.cache, self.strategy = engine, engine.cache, strategy
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        greedy = {} if strategy.greedy is None else {"greedy": strategy.greedy}
        self.sampling, self.seed = sampling | greedy, seed
        self.groups: dict[int, Group] = {}  # begun, not ended
        self.rows = Rows.empty()  # decoded by the next step
        self.queue: deque[Group] = deque()  # not begun
        self.aside: deque[tuple[Group, Rows]] = deque()  # begun, without pages
        self.touched: set[int] = set()  # groups that a branch has left
        self.ended: list[Ended] = []
        self.fed, self.read, self.paths = 0, 0, torch.zeros((), dtype=torch.int64)

    def all(self, prompts: list[list[int]]) -> Rollouts:
        """Decodes until every group has ended, or the strategy has enough of them."""
        strategy = self.strategy
        for group, rows in strategy.take_kept():
            self.groups[group.number] = group
            self.aside.append((group, rows))
        for number, prompt in enumerate(prompts, strategy.num_prompts(len(prompts))):
            given = strategy.given(number, prompt)
            group = Group(number, [*prompt, *given], len(given))
            group.waiting = strategy.first(group)
            self.queue.append(group)
        while (self.queue or self.groups) and not strategy.enough(len(self.ended)):
            self.step()
        strategy.keep(self._leave_over())
        return self._rollouts()

    def close(self) -> None:
        """Frees what a call that was broken off has left behind."""
        kept = self.strategy.kept_numbers()
        for group in self.groups.values():
            if group.number not in kept:
                self.cache.prune(self.cache.export_tree(group.number).branches)

    def step(self) -> None:
        """Feeds what is due, and gives every branch its next token."""
        logits, hidden = self._spawn(*self._feed(self._admit()))
        rows = self.rows
        temperature = self.strategy.temperature(rows.length, self.temperature)
        if isinstance(temperature, np.ndarray):
            temperature = torch.from_numpy(temperature).to(logits.device, torch.float32)
        drawn = rlkern.sample_tokens(
            logits,
            seed=self.seed,
            branch_ids=torch.from_numpy((rows.group << 32) + rows.stream).to(logits.device),
            positions=torch.from_numpy(rows.length).to(logits.device),
            temperature=temperature,
            **self.sampling,
        )
        tokens, logprob = drawn.token, drawn.logprob
        if self.engine.score is not None:
            logprob = self.engine.score(hidden, tokens, temperature)
        step = Step(rows, logits, tokens, logprob, drawn.entropy, hidden)
        if self.strategy.acts_on_steps:
            self.strategy.on_logits(self, step)
        self._append(step)
        if self.strategy.acts_on_steps:
            self.strategy.on_step(self, step)
        self._finish()

    # What strategies do.

    def fork(
        self,
        rows: Rows,
        n: Numbers = 1,
        *,
        at: Numbers | None = None,
        forced: Tensor | None = None,
        logprob: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> Rows:
        """n children of each branch, which are decoded from now on.

        at: of the first `at` response tokens, at least 1 together with the prompt; the last of them
            is fed again. Default: of all there is.
        forced: a token of each child after those, its log-prob and its entropy. In `on_logits` the
            drawn tokens do not count: a forced one stands in the place of such a token.
        """
        counts = np.broadcast_to(np.asarray(n, np.int64), len(rows))
        length, where = rows.length, None
        if at is not None:
            length = np.broadcast_to(np.asarray(at, np.int64), len(rows))
            where = length + [self.prompt_length(g) for g in rows.group.tolist()]
        born = self.cache.fork(
            rows.branch, counts, at=where, forced=forced, logprob=logprob, entropy=entropy
        ).numpy()
        of = np.repeat(np.arange(len(rows)), counts)
        if forced is not None:
            last, length = forced.cpu().numpy().astype(np.int64), length + 1
        elif where is None:
            last = rows.last[of]
        else:
            ends = (where - 1)[of].tolist()
            pairs = zip(born.tolist(), ends, strict=True)
            last = np.array([int(self.cache.tokens(b)[p]) for b, p in pairs], np.int64)
        return self._decode(born, rows.group[of], length[of], last)

    def spawn(self, group: Group, n: int) -> None:
        """n more samples of the prompt; see Strategy.keeps_root."""
        group.waiting += n

    def prune(self, branches: Numbers, *, subtree: bool = False) -> None:
        """Ends branches and forgets them; subtree: with all that was forked from them."""
        before = self.cache.branches()
        self.cache.prune(branches, subtree=subtree)
        gone = np.setdiff1d(before, self.cache.branches())
        self._leave(np.isin(self.rows.branch, gone))
        for group in self.groups.values():
            group.done = [done for done in group.done if done.branch not in gone]
            group.parked = [branch for branch in group.parked if branch not in gone]

    def park(self, branches: Numbers) -> Rows:
        """Stops decoding branches, whose pages stay -> their rows, to fork them later."""
        leaves = np.isin(self.rows.branch, branches)
        rows = self.rows[leaves]
        for number, branch in zip(rows.group.tolist(), rows.branch.tolist(), strict=True):
            self.groups[number].parked.append(branch)
        self._leave(leaves)
        return rows

    def prompt_length(self, number: int) -> int:
        """Tokens before the response."""
        group = self.groups[number]
        return len(group.prompt) - group.given

    # The parts of a step.

    def _admit(self) -> list[Group]:
        """Takes up groups that were put aside -> those whose prompt is to be fed now."""
        begun = []
        while self.aside and len(self.rows) < self.engine.max_sequences:
            group, rows = self.aside[0]
            branches = [*rows.branch.tolist(), *group.parked, *([group.root] * (group.root >= 0))]
            try:
                self.cache.resume(branches)
            except OutOfPages as error:
                if not len(self.rows) and not begun:
                    raise self._too_small(error) from error
                break
            self.aside.popleft()
            if group.waiting:  # the logits after the prompt are of older weights
                self.cache.truncate(group.root, len(group.prompt))
                begun.append(group)
            self._recompute(branches)
            self.rows += rows
        room = self.engine.max_sequences - len(self.rows)
        room -= sum(group.waiting for group in self.groups.values())
        while self.queue and not self.aside and (room > 0 or not (begun or len(self.rows))):
            group = self.queue.popleft()
            group.root = int(self.cache.new(group.prompt, group=group.number))
            self.groups[group.number] = group
            begun.append(group)
            room -= group.waiting
        return begun

    def _feed(self, begun: list[Group]) -> tuple[Tensor | None, Tensor | None]:
        """-> logits and hidden states after each row; those after prompts go to their groups."""
        while True:
            roots = np.array([group.root for group in begun], np.int64)
            branches = np.concatenate([self.rows.branch, roots])
            if not len(branches):
                return None, None  # samples of prompts that were fed before
            try:
                work = self.cache.append_slots(branches)
                break
            except OutOfPages as error:
                self._make_room(begun, error)
        counts = work.cu_seqlens.diff()
        logits, hidden = self._forward(work, branches, counts, work.cu_seqlens[1:] - 1)
        first = len(self.rows)
        for i, group in enumerate(begun, first):
            group.logits = logits[i : i + 1]
            group.hidden = None if hidden is None else hidden[i : i + 1]
        return logits[:first], None if hidden is None else hidden[:first]

    def _recompute(self, branches: list[int]) -> None:
        """Keys and values that were dropped, or that older weights computed."""
        work = self.cache.recompute(branches)
        if not len(work.slots):
            return
        lengths = np.zeros(len(branches), np.int64)
        place = {branch: i for i, branch in enumerate(branches)}
        for branch, n in zip(work.branches.tolist(), work.cu_seqlens.diff().tolist(), strict=True):
            lengths[place[branch]] += n
        # the segments of one branch are the end of its path, one after another
        self._forward(work, np.asarray(branches), lengths, torch.tensor([0]))

    def _forward(
        self, work: Work, branches: np.ndarray, counts: Numbers, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        plan = self.cache.plan(branches, counts, share=self.engine.share)
        self.fed += len(work.tokens)
        self.read += len(plan.slots)
        self.paths = self.paths.to(work.positions.device) + (work.positions + 1).sum()
        return self.engine.forward(work, plan, rows, self.strategy.needs_hidden)

    def _spawn(self, logits: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Begins samples of prompts -> logits and hidden states of all rows, with theirs."""
        parts, states = [logits], [hidden]
        for group in self.groups.values():
            room = self.engine.max_sequences - len(self.rows)
            if not group.waiting or group.logits is None or room <= 0:
                continue
            n = min(group.waiting, room)
            born = self.cache.fork(group.root, n).numpy()
            length, last = np.full(n, group.given), np.full(n, -1)
            self._decode(born, np.full(n, group.number), length, last)
            parts.append(group.logits.expand(n, -1))
            states.append(None if group.hidden is None else group.hidden.expand(n, -1))
            group.waiting -= n
            if group.waiting or self.strategy.keeps_root:  # not with the logits of all prompts
                group.logits = group.logits.clone()
                group.hidden = None if group.hidden is None else group.hidden.clone()
            else:
                self.cache.prune(group.root)
                group.root, group.logits, group.hidden = -1, None, None
        if len(parts) > 1:
            logits = torch.cat([part for part in parts if part is not None])
            states = [state for state in states if state is not None]
            hidden = torch.cat(states) if states else None
        return logits, hidden

    def _append(self, step: Step) -> None:
        """The drawn tokens, to those rows that are still there: they come first."""
        rows, here = self.rows, slice(None)
        if rows is not step.rows:
            here = np.flatnonzero(np.isin(step.rows.branch, rows.branch))
        drawn = [x[here].cpu() for x in (step.tokens, step.logprob, step.entropy)]
        count = len(drawn[0])
        self.cache.append(rows.branch[:count], drawn[0], logprob=drawn[1], entropy=drawn[2])
        grown = np.arange(len(rows)) < count
        last = np.concatenate([drawn[0].numpy(), rows.last[count:]])
        self.rows = Rows(rows.branch, rows.group, rows.stream, rows.length + grown, last)

    def _finish(self) -> None:
        """Takes out sequences that have ended, and then groups."""
        while True:
            rows = self.rows
            stop = np.isin(rows.last, self.engine.eos)
            ended = stop | (rows.length >= self.max_new_tokens)
            if ended.any():
                self._leave(ended)
                fresh = []
                for i in np.flatnonzero(ended).tolist():
                    group = self.groups[int(rows.group[i])]
                    branch, stream, length = (
                        int(x[i]) for x in (rows.branch, rows.stream, rows.length)
                    )
                    done = Done(group.number, branch, stream, length, not stop[i])
                    group.done.append(done)
                    fresh.append((group, done))
                for group, done in fresh:
                    self.strategy.on_finish(self, group, done)
                if not self.strategy.keeps_pages:
                    self.cache.suspend(rows.branch[ended], drop=True)
            elif not self.touched:
                return
            live = set(self.rows.group.tolist())
            for number in sorted(self.touched - live):
                group = self.groups[number]
                if not group.waiting:
                    self.strategy.on_group_done(self, group)
            live = set(self.rows.group.tolist())
            for number in sorted(self.touched - live):
                if not self.groups[number].waiting:
                    self._end(self.groups.pop(number))
            self.touched.clear()

    def _end(self, group: Group) -> None:
        tree = self.cache.export_tree(group.number)
        self.cache.prune(tree.branches)
        first = np.concatenate([[0], tree.length.cumsum(0).numpy()])
        node_of = dict(zip(tree.branches.tolist(), tree.branch_node.tolist(), strict=True))
        parent, done, at = tree.parent.tolist(), self.strategy.select(group), []
        for one in done:
            path, node = [], node_of[one.branch]
            while node >= 0:
                path.append(np.arange(first[node], first[node + 1]))
                node = parent[node]
            at.append(np.concatenate(path[::-1])[len(group.prompt) - group.given :])
        self.ended.append(Ended(group, done, at, tree))

    def stats(self, rollouts: Rollouts) -> dict[str, float]:
        """What the call took.

        rollout/computed: tokens that went through the model; rollout/used: those of the sequences
        and their prompts, each shared one once; rollout/kv_saved: the share of reads of keys that
        sharing has saved.
        """
        own = 0 if rollouts.origin is None else len(rollouts.origin.unique())
        paths = int(self.paths)
        return {
            "rollout/computed": float(self.fed),
            "rollout/used": float(own + len(rollouts.prompt_tokens)),
            "rollout/kv_saved": 1 - self.read / paths if paths else 0.0,
        }

    def _decode(
        self, born: np.ndarray, numbers: np.ndarray, length: np.ndarray, last: np.ndarray
    ) -> Rows:
        stream = []
        for number in numbers.tolist():
            group = self.groups[number]
            stream.append(group.streams)
            group.streams += 1
        rows = Rows(born, numbers, np.array(stream, np.int64), length, last)
        self.rows = self.rows + rows
        return rows

    def _leave(self, leaves: np.ndarray) -> None:
        self.touched.update(self.rows.group[leaves].tolist())
        self.rows = self.rows[~leaves]

    def _make_room(self, begun: list[Group], error: OutOfPages) -> None:
        """Puts the group that began last aside."""
        if begun and (len(begun) > 1 or len(self.rows)):
            group = begun.pop()
            self.cache.prune(group.root)
            self.queue.appendleft(self.groups.pop(group.number))
            return
        numbers = [n for n in self.groups if (self.rows.group == n).any()]
        if len(numbers) + len(begun) < 2:
            raise self._too_small(error) from error
        self.aside.append(self._put_aside(self.groups[numbers[-1]]))

    def _put_aside(self, group: Group) -> tuple[Group, Rows]:
        mine = self.rows.group == group.number
        rows, self.rows = self.rows[mine], self.rows[~mine]
        root = [group.root] * (group.root >= 0)
        self.cache.suspend([*rows.branch.tolist(), *group.parked, *root], drop=True)
        group.logits = group.hidden = None
        return group, rows

    def _leave_over(self) -> list[tuple[Group, Rows]]:
        """Groups that have not ended."""
        left = [self._put_aside(g) for n, g in self.groups.items() if (self.rows.group == n).any()]
        return [*self.aside, *left, *((group, Rows.empty()) for group in self.queue)]

    def _too_small(self, error: OutOfPages) -> RuntimeError:
        size = self.cache.page_size
        return RuntimeError(
            f"NativeEngine.generate: one group needs {error.needed} more pages of {size} tokens "
            f"where {error.free} of {self.cache.num_pages} are free. Raise max_cached_tokens, or "
            "lower max_sequences, max_new_tokens or the size of a group"
        )

    def _rollouts(self) -> Rollouts:
        device, ended = self.engine.model.device, sorted(self.ended, key=lambda e: e.group.number)
        prompts = [e.group.prompt[: len(e.group.prompt) - e.group.given] for e in ended]
        trees, first = [e.tree for e in ended], 0
        at, mask, group_ids = [], [], []
        for i, one in enumerate(ended):
            for rows in one.at:
                at.append(rows + first)
                mask.append(np.arange(len(rows)) >= one.group.given)
                group_ids.append(i)
            first += len(one.tree.tokens)
        lengths = torch.tensor([len(rows) for rows in at], dtype=torch.int64)
        rows = torch.from_numpy(np.concatenate(at)) if at else lengths

        def of_tokens(name: str, dtype: torch.dtype) -> Tensor:
            parts = [getattr(tree, name) for tree in trees]
            return (torch.cat(parts)[rows] if parts else rows).to(device, dtype)

        return Rollouts(
            prompt_tokens=torch.tensor([t for p in prompts for t in p], device=device),
            prompt_cu_seqlens=offsets(torch.tensor([len(p) for p in prompts], device=device)),
            tokens=of_tokens("tokens", torch.int64),
            cu_seqlens=offsets(lengths).to(device),
            logprob=of_tokens("logprob", torch.float32),
            group_ids=torch.tensor(group_ids, device=device),
            truncated=torch.tensor([d.truncated for e in ended for d in e.done], device=device),
            entropy=of_tokens("entropy", torch.float32),
            versions=of_tokens("versions", torch.int64),
            origin=first_place(rows).to(device),
            mask=torch.from_numpy(np.concatenate(mask)).to(device) if mask else None,
            prompt_ids=torch.tensor([e.group.number for e in ended], device=device),
        )
