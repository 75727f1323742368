"""One call of the engine: who is decoded, what is fed, and what becomes of each branch.

Read `all`, then `step`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import rlkern
from rlkern.kv import OutOfPages, TreeExport, Work
from rlkern.rollout.engine import TURNS, Rollouts, first_place, offsets
from rlkern.rollout.environment import Turn, ask
from rlkern.rollout.state import Done, Group, Rows, Spoken, Step

if TYPE_CHECKING:
    from rlkern.rollout.environment import Environment, Reply
    from rlkern.rollout.native import NativeEngine
    from rlkern.rollout.strategies.base import Strategy

Numbers = np.ndarray | list[int] | int


class Ended(NamedTuple):
    """A group's sequences, as rows of the tokens of its tree."""

    group: Group
    done: list[Done]
    at: list[np.ndarray]  # of each sequence, rows of `tree`, without the prompt
    mask: list[np.ndarray]  # of each sequence, which of its tokens were drawn
    spoken: list[tuple[np.ndarray, ...]]  # turn, agent and reward of its tokens
    tree: TreeExport


@dataclass
class Kept:
    """What a call that had enough groups leaves to the next one."""

    groups: list[tuple[Group, Rows]] = field(default_factory=list)  # branches are suspended
    ended: list[Ended] = field(default_factory=list)
    count: int = 0  # prompts so far

    def longest(self, max_new_tokens: int) -> int:
        """Tokens that a branch of these groups may reach."""
        lengths = [
            len(group.prompt) - group.given + max(max_new_tokens, *(rows.length + 1).tolist(), 0)
            for group, rows in self.groups
        ]
        return max(lengths, default=0)


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
        environment: Environment | None = None,
    ) -> None:
        self.engine, self.cache, self.strategy = engine, engine.cache, strategy
        self.environment, self.turn_ends = environment, np.empty(0, np.int64)
        if environment is not None:
            self.turn_ends = np.union1d(engine.eos, list(environment.turn_ends))
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.sampling, self.seed = sampling, seed
        self.plain = not sampling["top_k"] and sampling["top_p"] == 1 and not sampling["min_p"]
        self.inverse: tuple = None, None  # the last temperature and number of rows; its inverses
        self.groups: dict[int, Group] = {}  # begun, not ended
        self.rows = Rows.empty()  # decoded by the next step
        self.queue: deque[Group] = deque()  # not begun
        self.aside: deque[tuple[Group, Rows]] = deque()  # begun, without pages
        self.touched: set[int] = set()  # groups that a branch has left
        self.full = False  # a group was put aside, and no branch has left since then
        self.drawing = False  # within on_logits
        self.ended: list[Ended] = []
        self.fed, self.read, self.paths = 0, 0, torch.zeros((), dtype=torch.int64)

    def all(self, prompts: list[list[int]], first: int = 0) -> Rollouts:
        """Decodes until every group has ended, or the strategy has enough of them."""
        strategy = self.strategy
        kept, self.engine.kept = self.engine.kept, Kept()
        goes_on = kept.groups or kept.ended or strategy.num_groups is not None
        first = kept.count if goes_on else first
        self.ended = kept.ended
        for group, rows in kept.groups:
            if group.begun:
                self.groups[group.number] = group
                self.aside.append((group, rows))
            else:
                self.queue.append(group)
        for number, prompt in enumerate(prompts, first):
            given = strategy.given(number, prompt)
            if len(given) >= self.max_new_tokens:
                raise ValueError(
                    f"NativeEngine.generate: {len(given)} given tokens leave nothing of "
                    f"max_new_tokens = {self.max_new_tokens}"
                )
            group = Group(number, [*prompt, *given], len(given))
            group.waiting = strategy.first(group)
            self.queue.append(group)
        enough = strategy.num_groups
        while (self.queue or self.groups) and (enough is None or len(self.ended) < enough):
            self.step()
        if enough is not None:
            self.ended, more = self.ended[:enough], self.ended[enough:]
            self.engine.kept = Kept(self._leave_over(), more, first + len(prompts))
        return self._rollouts()

    def close(self) -> None:
        """Frees what a call that was broken off has left behind."""
        kept = {group.number for group, _ in self.engine.kept.groups}
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
        greedy = self.strategy.greedy(self, rows, self.sampling["greedy"])
        if isinstance(greedy, np.ndarray):
            greedy = torch.from_numpy(greedy).to(logits.device)
        tokens, logprob, entropy = self._draw(logits, temperature, greedy)
        if self.engine.score is not None:
            logprob = self.engine.score(hidden, tokens, temperature)
        step = Step(rows, logits, tokens, logprob, entropy, hidden, temperature)
        if self.strategy.acts_on_steps:
            self.drawing = True
            self.strategy.on_logits(self, step)
            self.drawing = False
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
        if self.environment is not None:
            raise ValueError("Run.fork: with an environment a response has no forks")
        if self.drawing and at is None and forced is None:
            raise ValueError("Run.fork: expected `forced` or `at` in on_logits, got neither")
        counts = np.broadcast_to(np.asarray(n, np.int64), len(rows))
        length, where = rows.length, None
        if at is not None:
            length = np.broadcast_to(np.asarray(at, np.int64), len(rows))
            where = length + [self.prompt_length(g) for g in rows.group.tolist()]
        born = self.cache.fork(
            rows.branch, counts, at=where, forced=forced, logprob=logprob, entropy=entropy
        ).numpy()
        of = np.repeat(np.arange(len(rows)), counts)
        parents = rows.stream[of], length[of]
        if forced is not None:
            last, length = forced.cpu().numpy().astype(np.int64), length + 1
        elif where is None:
            last = rows.last[of]
        else:
            last = np.array([int(self.cache.tokens(b)[-1]) for b in born.tolist()], np.int64)
            # an end token of the prompt ends nothing
            last[length[of] <= [self.groups[g].given for g in rows.group[of].tolist()]] = -1
        return self._decode(born, rows.group[of], length[of], last, parents)

    def logprob_of(self, step: Step, rows: np.ndarray, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of other tokens than the drawn ones of these rows of a step, and entropies.

        Of the whole distribution, whatever top_k, top_p and min_p leave of it.
        """
        at = torch.from_numpy(rows).to(tokens.device)
        temperature = step.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[at]
        if self.engine.score is not None:
            return self.engine.score(step.hidden[at], tokens, temperature), step.entropy[at]
        out = rlkern.logprob_from_logits(step.logits[at], tokens, temperature=temperature)
        return out.logprob, step.entropy[at]

    def random(self, group: Group, *numbers: int) -> np.random.Generator:
        """For a strategy's choices: the same for the same numbers, whatever else is sampled."""
        return np.random.default_rng([self.seed, group.number, *numbers])

    def spawn(self, group: Group, n: int) -> None:
        """n more samples of the prompt; see Strategy.keeps_root."""
        group.waiting += n

    def prune(self, branches: Numbers, *, subtree: bool = False) -> None:
        """Ends branches and forgets them; subtree: with all that was forked from them."""
        before = self.cache.branches()
        self.cache.prune(branches, subtree=subtree)
        gone = set(before.tolist()) - set(self.cache.branches().tolist())
        self._leave(np.isin(self.rows.branch, list(gone)))
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
        while self.aside and not self.full and len(self.rows) < self.engine.max_sequences:
            group, rows = self.aside[0]
            branches = self._held(group, rows)
            try:
                self.cache.resume(branches)
            except OutOfPages as error:
                if not len(self.rows) and not begun:
                    raise self._too_small(error) from error
                break
            self.aside.popleft()
            if group.root >= 0:  # the logits after the prompt are gone, or of older weights
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
        if len(work.tokens) == len(branches):  # a token each
            logits, hidden = self._forward(work, branches, 1, None)
        else:
            ends = work.cu_seqlens[1:]
            logits, hidden = self._forward(work, branches, work.cu_seqlens.diff(), ends - 1)
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
        self, work: Work, branches: np.ndarray, counts: Numbers, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        plan = self.cache.plan(branches, counts, share=self.engine.share)
        self.fed += len(work.tokens)
        self.read += len(plan.slots)
        self.paths = self.paths.to(work.positions.device) + work.positions.sum()
        return self.engine.forward(work, plan, rows, self.strategy.needs_hidden)

    def _spawn(self, logits: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Begins samples of prompts -> logits and hidden states of all rows, with theirs."""
        parts, states = [logits], [hidden]
        for group in self.groups.values():
            room = self.engine.max_sequences - len(self.rows)
            if not group.waiting or group.logits is None or room <= 0:
                continue
            n = group.waiting if self.strategy.together else min(group.waiting, room)
            born = self.cache.fork(group.root, n).numpy()
            length, last = np.full(n, group.given), np.full(n, -1)
            self._decode(born, np.full(n, group.number), length, last, (np.full(n, -1), length))
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

    def _draw(
        self, logits: Tensor, temperature: Tensor | float, greedy: Tensor | bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> tokens, their log-probs, and entropies."""
        rows, device, sampling = self.rows, logits.device, self.sampling
        branches = torch.from_numpy((rows.group << 32) + rows.stream).to(device)
        positions = torch.from_numpy(rows.length).to(device)
        if isinstance(temperature, Tensor) or greedy is not False or not self.plain:
            drawn = rlkern.sample_tokens(
                logits,
                seed=self.seed,
                branch_ids=branches,
                positions=positions,
                temperature=temperature,
                **sampling | {"greedy": greedy},
            )
            return drawn.token, drawn.logprob, drawn.entropy
        # checks, and a number spread over the rows, take several times as long as the draw
        of, inverse = self.inverse
        if of != (temperature, len(rows)):
            warmth = logits.new_full((len(rows),), temperature, dtype=torch.float32)
            inverse = (1.0 / warmth).clamp(max=torch.finfo(torch.float32).max)
            self.inverse = (temperature, len(rows)), inverse
        draw, off = torch.ops.rlkern.sample_tokens.default, [None] * 4
        drawn = draw(logits, branches, positions, inverse, *off, self.seed, logits.shape[1], False)
        return drawn[0], drawn[1], drawn[3]

    def _append(self, step: Step) -> None:
        """The drawn tokens, to those rows that are still there: they come first."""
        rows, drawn = self.rows, [step.tokens, step.logprob, step.entropy]
        if rows is not step.rows:
            here = np.flatnonzero(np.isin(step.rows.branch, rows.branch))
            drawn = [x[here] for x in drawn]
        tokens, logprob, entropy = (x.cpu() for x in drawn)
        last, count = tokens.numpy(), len(tokens)
        if (last < 0).any():
            broken = int((last < 0).sum())
            raise ValueError(
                f"NativeEngine.generate: the logits of {broken} of {count} sequences hold NaN or "
                "+Inf, or nothing but -Inf: look at the model's weights"
            )
        self.cache.append(rows.branch[:count], last, logprob=logprob, entropy=entropy)
        length = rows.length + 1
        if count < len(rows):
            length[count:] -= 1
            last = np.concatenate([last, rows.last[count:]])
        self.rows = Rows(rows.branch, rows.group, rows.stream, length, last)

    def _reply(self) -> tuple[np.ndarray, np.ndarray]:
        """Asks the environment where turns have ended -> which rows are done, which are cut off."""
        rows, environment = self.rows, self.environment
        done, cut = np.zeros(len(rows), bool), rows.length >= self.max_new_tokens
        asked = np.flatnonzero(np.isin(rows.last, self.turn_ends)).tolist()
        if not asked:
            return done, cut
        turns = [self._turn(i) for i in asked]
        vocabulary = self.engine.model.config.get_text_config().vocab_size
        replies = ask(environment, turns, vocabulary)
        length, last = rows.length.copy(), rows.last.copy()
        branches, said, bounds = [], [], [0]
        for i, turn, reply in zip(asked, turns, replies, strict=True):
            spoken = self.groups[turn.number].turns[int(rows.stream[i])]
            self._pay(spoken, reply, len(turn.response))
            after = len(turn.response) + len(reply.tokens)
            done[i] = reply.done
            # a reply that leaves nothing to draw is not worth its place
            cut[i] |= after >= self.max_new_tokens or turn.index + 1 >= environment.max_turns
            if done[i] or cut[i]:
                continue
            spoken.append(Spoken(after, reply.agent))
            length[i], last[i] = after, -1  # an end token of a reply ends nothing
            if len(reply.tokens):
                branches.append(int(rows.branch[i]))
                said += reply.tokens
                bounds.append(len(said))
        if branches:
            self.cache.append(branches, said, torch.tensor(bounds))
        self.rows = Rows(rows.branch, rows.group, rows.stream, length, last)
        return done, cut

    def _turn(self, i: int) -> Turn:
        """The turn that row i has just ended."""
        rows = self.rows
        group, stream = self.groups[int(rows.group[i])], int(rows.stream[i])
        spoken = group.turns.setdefault(stream, [Spoken(0, self.environment.first_agent)])
        whole = self.cache.tokens(int(rows.branch[i])).tolist()
        prompt, response = whole[: len(group.prompt)], whole[len(group.prompt) :]
        last = spoken[-1]
        return Turn(group.number, prompt, response, last.begin, len(spoken) - 1, last.agent)

    def _pay(self, spoken: list[Spoken], reply: Reply, end: int) -> None:
        spoken[-1].end, spoken[-1].reward = end, float(reply.reward)
        for agent, reward in reply.others.items():
            theirs = [turn for turn in spoken if turn.agent == agent]
            if theirs:
                theirs[-1].reward += float(reward)

    def _finish(self) -> None:
        """Takes out sequences that have ended, and then groups."""
        while True:
            if self.environment is None:
                stop = (self.rows.last[:, None] == self.engine.eos).any(1)
                ended = stop | (self.rows.length >= self.max_new_tokens)
            else:
                stop, cut = self._reply()
                ended = stop | cut
            rows = self.rows
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
                    if done in group.done:  # or on_finish has pruned it
                        self.strategy.on_finish(self, group, done)
                if not self.strategy.keeps_pages:
                    left = [done.branch for group, done in fresh if done in group.done]
                    self.cache.suspend(left, drop=True)
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
        drawn_by = [group.drawn_by(one.stream, one.length) for one in done]
        if self.environment is not None:
            for one in done:  # also those that were cut off within the first turn
                first_turn = Spoken(0, self.environment.first_agent)
                group.turns.setdefault(one.stream, [first_turn])
        spoken = [group.spoken(one.stream, one.length) for one in done]
        mask = [(by >= 0) & drawn for by, (drawn, *_) in zip(drawn_by, spoken, strict=True)]
        of_turns = [rest for _, *rest in spoken]
        self.ended.append(Ended(group, done, first_rows(at, drawn_by), mask, of_turns, tree))

    def stats(self, rollouts: Rollouts) -> dict[str, float]:
        """What the call took.

        rollout/computed: tokens that went through the model; rollout/used: those of the sequences
        and their prompts, each shared one once; rollout/kv_saved: the share of reads of keys that
        sharing has saved. With an environment also rollout/turns of a sequence, rollout/replied,
        the share of its tokens that are replies, and reward/turns, the sum of its turns' rewards.
        """
        own = 0 if rollouts.origin is None else len(rollouts.origin.unique())
        paths = int(self.paths) + self.fed  # positions begin at 0
        turns = {}
        if rollouts.turns is not None and len(rollouts.tokens):
            last = rollouts.turns[rollouts.cu_seqlens[1:] - 1].float()
            turns["rollout/turns"] = float(last.mean()) + 1
            turns["rollout/replied"] = 1 - float(rollouts.mask.float().mean())
            turns["reward/turns"] = float(rollouts.turn_rewards.sum()) / len(last)
        return turns | {
            "rollout/computed": float(self.fed),
            "rollout/used": float(own + len(rollouts.prompt_tokens)),
            "rollout/kv_saved": 1 - self.read / paths if paths else 0.0,
        }

    def _decode(
        self,
        born: np.ndarray,
        numbers: np.ndarray,
        length: np.ndarray,
        last: np.ndarray,
        parents: tuple[np.ndarray, np.ndarray],
    ) -> Rows:
        """Makes rows of new branches; parents: for Group.lineage."""
        stream = []
        for number, *parent in zip(numbers.tolist(), *(x.tolist() for x in parents), strict=True):
            lineage = self.groups[number].lineage
            stream.append(len(lineage))
            lineage.append(tuple(parent))
        rows = Rows(born, numbers, np.array(stream, np.int64), length, last)
        self.rows = self.rows + rows
        return rows

    def _leave(self, leaves: np.ndarray) -> None:
        if leaves.any():
            self.touched.update(self.rows.group[leaves].tolist())
            self.rows = self.rows[~leaves]
            self.full = False

    def _make_room(self, begun: list[Group], error: OutOfPages) -> None:
        """Puts the group that began last aside."""
        live = set(self.rows.group.tolist())
        if len(live | {group.number for group in begun}) < 2:
            raise self._too_small(error) from error
        group = begun.pop() if begun else [g for n, g in self.groups.items() if n in live][-1]
        if group.lineage:
            self.aside.append(self._put_aside(group, drop=True))
            self.full = True
            return
        self.cache.prune(group.root)
        group.root = -1
        self.queue.appendleft(self.groups.pop(group.number))

    def _put_aside(self, group: Group, drop: bool | None) -> tuple[Group, Rows]:
        mine = self.rows.group == group.number
        rows, self.rows = self.rows[mine], self.rows[~mine]
        self.cache.suspend(self._held(group, rows), drop=drop)
        group.logits = group.hidden = None
        return group, rows

    def _held(self, group: Group, rows: Rows) -> list[int]:
        """Branches of a group that have pages."""
        done = [done.branch for done in group.done] if self.strategy.keeps_pages else []
        root = [group.root] * (group.root >= 0)
        return list(dict.fromkeys([*rows.branch.tolist(), *group.parked, *done, *root]))

    def _leave_over(self) -> list[tuple[Group, Rows]]:
        """Groups that have not ended."""
        aside = {group.number for group, _ in self.aside}
        left = [self._put_aside(g, drop=None) for n, g in self.groups.items() if n not in aside]
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
        at, mask, spoken, group_ids = [], [], [], []
        for i, one in enumerate(ended):
            at += [rows + first for rows in one.at]
            mask += one.mask
            spoken += one.spoken
            group_ids += [i] * len(one.at)
            first += len(one.tree.tokens)
        truncated = [done.truncated for one in ended for done in one.done]
        lengths = torch.tensor([len(rows) for rows in at], dtype=torch.int64)
        rows = torch.from_numpy(np.concatenate(at)) if at else lengths

        turns = {}
        if self.environment is not None and spoken:
            columns = (torch.from_numpy(np.concatenate(c)).to(device) for c in zip(*spoken))
            turns = dict(zip(TURNS, columns, strict=True))

        def of_tokens(name: str, dtype: torch.dtype) -> Tensor:
            parts = [getattr(tree, name) for tree in trees]
            return (torch.cat(parts)[rows] if parts else rows).to(device, dtype)

        return Rollouts(
            prompt_tokens=torch.tensor([t for p in prompts for t in p], device=device),
            prompt_cu_seqlens=offsets(torch.tensor([len(p) for p in prompts], device=device)),
            tokens=of_tokens("tokens", torch.int64),
            cu_seqlens=offsets(lengths).to(device),
            logprob=of_tokens("logprob", torch.float32),
            group_ids=torch.tensor(group_ids, dtype=torch.int64, device=device),
            truncated=torch.tensor(truncated, dtype=torch.bool, device=device),
            entropy=of_tokens("entropy", torch.float32),
            versions=of_tokens("versions", torch.int64),
            origin=first_place(rows).to(device),
            mask=torch.from_numpy(np.concatenate(mask)).to(device) if mask else None,
            prompt_ids=torch.tensor([e.group.number for e in ended], device=device),
            **turns,
        )


def first_rows(at: list[np.ndarray], drawn_by: list[np.ndarray]) -> list[np.ndarray]:
    """Rows of a tree where each draw has one: `fork(at=)` feeds a token again, as another node."""
    if not at:
        return at
    lengths = [len(rows) for rows in at]
    draws = [(s + 1) * max(lengths) + np.arange(len(s)) for s in drawn_by]
    _, first, draw = np.unique(np.concatenate(draws), return_index=True, return_inverse=True)
    return np.split(np.concatenate(at)[first][draw], np.cumsum(lengths)[:-1])
