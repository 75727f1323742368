"""Turns: what answers the policy while it decodes, and what its turns are worth.

A turn is what the policy draws in a row. It ends with one of the engine's end tokens or of
`Environment.turn_ends`; the environment then replies with tokens that are forced through the cache,
read by the policy and never trained, or ends the sequence.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlkern.rollout.engine import Rollouts


class ReplyError(RuntimeError):
    """What an environment has raised, or has replied that cannot be taken."""


class Turn(NamedTuple):
    """A turn that has ended, and all that came before it."""

    number: int  # of the prompt, as in Rollouts.prompt_ids
    prompt: list[int]
    response: list[int]  # all turns so far and the replies to them; its last token ended this one
    begin: int  # the turn is response[begin:]
    index: int  # 0 for the first
    agent: int  # who spoke


class Reply(NamedTuple):
    """What an environment says to a turn."""

    tokens: Sequence[int] = ()  # put behind the turn; without any the policy goes on by itself
    reward: float = 0.0  # of this turn
    agent: int = 0  # who speaks next
    done: bool = False  # the sequence ends here, and `tokens` are not read
    others: Mapping[int, float] = {}  # agent -> reward, added to that of the agent's last turn


class Environment(Protocol):
    """Answers turns. A reply may depend on the turn and on `tasks`, and on nothing else: a step
    that is repeated, or resumed, gets the same ones.

    turn_ends: tokens that end a turn, beside the engine's end tokens.
    max_turns: after that many a sequence ends, truncated unless the environment ends it.
    first_agent: who speaks first.
    tasks: what is known of each prompt, by number; whoever calls `generate` sets it.
    """

    turn_ends: Collection[int] = ()
    max_turns: int = 8
    first_agent: int = 0
    tasks: Mapping[int, Any] = {}

    def reply(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """One reply for each of the turns that have ended at the same step of the engine."""
        ...


class Calculator(Environment):
    """A tool: to `12+7*2=` at the end of a turn it says `26`. An end token ends the sequence.

    Numbers without fractions and + - *. What cannot be read is answered with `error`.

    Args:
        tokenizer: with encode, decode and len.
        penalty: taken from the reward of a turn that cannot be read.
        error: the reply to it; "": none, and the policy goes on.
    """

    CALL = re.compile(r"(?<![-+*\d])-?\d+(?:[-+*]\d+)*(?==\s*$)")
    TERM = re.compile(r"([-+]?)(\d+(?:\*\d+)*)")

    def __init__(
        self, tokenizer: Any, *, max_turns: int = 4, penalty: float = 0.0, error: str = ""
    ) -> None:
        self.tokenizer, self.max_turns, self.penalty, self.error = (
            tokenizer, max_turns, penalty, error,
        )  # fmt: skip
        # "=" alone, or at the end of a longer token
        texts = ((i, tokenizer.decode([i])) for i in range(len(tokenizer)))
        self.turn_ends = frozenset(i for i, text in texts if text.rstrip().endswith("="))

    def reply(self, turns: Sequence[Turn]) -> list[Reply]:
        return [self._answer(turn) for turn in turns]

    def _answer(self, turn: Turn) -> Reply:
        if turn.response[-1] not in self.turn_ends:
            return Reply(done=True)
        text = self.tokenizer.decode(turn.response[turn.begin :], skip_special_tokens=True)
        call = self.CALL.search(text)
        said = self.error if call is None else str(calculate(call[0]))
        tokens = self.tokenizer.encode(said, add_special_tokens=False) if said else ()
        return Reply(tokens, -self.penalty if call is None else 0.0)


def ask(environment: Environment, turns: list[Turn], vocabulary: int) -> list[Reply]:
    """The replies to turns, looked at."""
    try:
        replies = list(environment.reply(turns))
    except Exception as error:
        raise ReplyError(f"the environment raised {type(error).__name__}: {error}") from error
    if len(replies) != len(turns):
        raise ReplyError(f"the environment gave {len(replies)} replies to {len(turns)} turns")
    for reply in replies:
        if len(reply.tokens) and not 0 <= min(reply.tokens) <= max(reply.tokens) < vocabulary:
            raise ReplyError(f"a reply has tokens that are not in [0, {vocabulary})")
    return replies


def calculate(expression: str) -> int:
    """The value of integers joined by + - *, such as "-3+4*5"."""
    terms = Calculator.TERM.findall(expression)
    return sum((-1) ** (s == "-") * math.prod(map(int, p.split("*"))) for s, p in terms)


ENVIRONMENTS = {"calculator": Calculator}  # the names that recipes use


def replies_in(
    environment: Environment,
    number: int,
    prompt: list[int],
    response: list[int],
    end_tokens: Collection[int],
    vocabulary: int,
) -> list[bool]:
    """Which tokens of a demonstration the environment would have said: not to be trained.

    The demonstration holds them as they are; where it says something else, nothing is a reply.
    """
    said, begin, index, agent = [False] * len(response), 0, 0, environment.first_agent
    ends, at = {*end_tokens, *environment.turn_ends}, 0
    while at < len(response):
        at += 1
        if response[at - 1] not in ends:
            continue
        turn = Turn(number, prompt, response[:at], begin, index, agent)
        (reply,) = ask(environment, [turn], vocabulary)
        if reply.done:
            break
        tokens = list(reply.tokens)
        if response[at : at + len(tokens)] == tokens:
            said[at : at + len(tokens)] = [True] * len(tokens)
            at += len(tokens)
        begin, index, agent = at, index + 1, reply.agent
    return said


class TurnRows(NamedTuple):
    """The U turns of rollouts, for `group_advantage` to have a row each."""

    returns: Tensor  # float32 [U]
    group_ids: Tensor  # int64 [U]
    agent_ids: Tensor  # int64 [U]
    of_token: Tensor  # int64 [drawn tokens], the turn of each


def turn_rows(rollouts: Rollouts, rewards: Tensor) -> TurnRows:
    """rewards [S]: of whole sequences, those of their turns included.

    The return of a turn is the sequence's reward without those of its turns (the outcome, which all
    agents share), plus the rewards of its agent's turns from this one on.
    """
    if rollouts.turns is None:
        raise ValueError("turn_rows: expected rollouts of a call with an environment, got no turns")
    device, lengths = rewards.device, rollouts.lengths
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    width = int(rollouts.turns.max()) + 1 if len(sequence) else 1
    # a turn without drawn tokens has no row: nothing of it is trained
    mask = torch.ones_like(sequence, dtype=torch.bool) if rollouts.mask is None else rollouts.mask
    key = sequence * width + rollouts.turns
    present, of_token = torch.unique(key[mask], return_inverse=True)
    count = len(lengths) * width
    given = torch.zeros(count, device=device, dtype=torch.float64)
    given.index_add_(0, key, rollouts.turn_rewards.double())
    agent = torch.zeros(count, device=device, dtype=torch.int64).index_copy(0, key, rollouts.agents)
    given, agent = given.view(-1, width), agent.view(-1, width)
    mine = agent[:, :, None] == agent[:, None, :]
    later = torch.ones(width, width, dtype=torch.bool, device=device).triu()
    own = ((mine & later) * given[:, None, :]).sum(-1)
    total = (rewards.double() - given.sum(1))[:, None] + own
    row = present // width
    return TurnRows(
        total.flatten()[present].float(),
        rollouts.group_ids[row],
        agent.flatten()[present],
        of_token,
    )
