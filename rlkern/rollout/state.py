"""What is known of a rollout under way: groups, the branches that are decoded, and a step."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class Done:
    """A sequence that has ended; strategies may fork its branch."""

    group: int
    branch: int
    stream: int
    length: int  # response tokens
    truncated: bool  # no end token within max_new_tokens


@dataclass
class Spoken:
    """A turn of a stream: response tokens begin..end, and the reply up to the next one's begin."""

    begin: int
    agent: int
    end: int = -1  # -1: it goes on
    reward: float = 0.0


@dataclass
class Group:
    """One prompt and all that grows from it."""

    number: int  # of the prompt; (number, stream) decides the draws of a sample
    prompt: list[int]  # with what a strategy puts after it
    given: int = 0  # tokens of `prompt` that are a strategy's, and belong to the responses
    root: int = -1  # branch of the prompt; -1: not begun, or not needed any more
    logits: Tensor | None = None  # [1, V] after the prompt, while samples are to be drawn from it
    hidden: Tensor | None = None  # [1, H], where a step has hidden states
    waiting: int = 0  # samples to draw from the prompt
    # of each stream, the one that it was forked from, and how many response tokens they share; what
    # lies before a stream -1 was given
    lineage: list[tuple[int, int]] = field(default_factory=list)
    parked: list[int] = field(default_factory=list)  # branches that a strategy has stopped
    done: list[Done] = field(default_factory=list)
    turns: dict[int, list[Spoken]] = field(default_factory=dict)  # by stream, with an environment
    notes: dict = field(default_factory=dict)  # of the strategy

    @property
    def begun(self) -> bool:
        return self.root >= 0 or len(self.lineage) > 0

    def drawn_by(self, stream: int, length: int) -> np.ndarray:
        """int64 [length]: the stream that drew each of these response tokens; -1: given."""
        owner = np.full(length, -1, np.int64)
        while stream >= 0:
            parent, shared = self.lineage[stream]
            owner[shared:length] = stream
            stream, length = parent, min(length, shared)
        return owner

    def spoken(self, stream: int, length: int) -> tuple[np.ndarray, ...]:
        """Of each response token, with an environment: drawn in a turn? its turn, agent, reward."""
        drawn, turn = np.ones(length, bool), np.zeros(length, np.int64)
        agent, reward = np.zeros(length, np.int64), np.zeros(length, np.float32)
        for index, one in enumerate(self.turns.get(stream, [])):
            turn[one.begin :], agent[one.begin :] = index, one.agent
            drawn[one.begin :] = True
            if one.end >= 0:
                drawn[one.end :], reward[one.end - 1] = False, one.reward
        return drawn, turn, agent, reward

    def stem(self) -> "Rows":
        """The prompt, to fork it with `at`."""
        return Rows(*(np.array([x]) for x in (self.root, self.number, -1, self.given, -1)))


@dataclass
class Rows:
    """The branches of a batch, one entry each; arrays of equal length."""

    branch: np.ndarray  # int64, of the cache
    group: np.ndarray  # int64, Group.number
    stream: np.ndarray  # int64, of the group
    length: np.ndarray  # int64, response tokens, the last of which is to be fed
    last: np.ndarray  # int64, that token

    @classmethod
    def empty(cls) -> "Rows":
        return cls(*(np.empty(0, np.int64) for _ in range(5)))

    @classmethod
    def of(cls, done: list[Done]) -> "Rows":
        """To fork sequences that have ended."""
        fields = [(d.branch, d.group, d.stream, d.length, -1) for d in done]
        return cls(*np.array(fields, np.int64).reshape(-1, 5).T)

    def __len__(self) -> int:
        return len(self.branch)

    def __getitem__(self, rows: np.ndarray) -> "Rows":
        return Rows(*(column[rows] for column in self.columns()))

    def __add__(self, other: "Rows") -> "Rows":
        pairs = zip(self.columns(), other.columns(), strict=True)
        return Rows(*(np.concatenate(pair) for pair in pairs))

    def columns(self) -> tuple[np.ndarray, ...]:
        return self.branch, self.group, self.stream, self.length, self.last


@dataclass
class Step:
    """What a step has computed for `rows`, before and after their tokens are appended."""

    rows: Rows  # as before the step
    logits: Tensor  # [R, V]
    tokens: Tensor  # int64 [R], drawn
    logprob: Tensor  # float32 [R]
    entropy: Tensor  # float32 [R], of softmax(logits / temperature)
    hidden: Tensor | None  # [R, H], where the strategy asks for it
    temperature: Tensor | float  # float32 [R], where it differs
