"""What an engine promises, and the packed rollouts it returns.

P prompts, G samples of each, S = P * G sequences, T response tokens of all sequences together.
"""

import heapq
import os
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TURNS = ("turns", "agents", "turn_rewards")  # fields of Rollouts


@dataclass(frozen=True)
class Rollouts:
    """Packed completions; sequence i answers prompt `group_ids[i]`."""

    prompt_tokens: Tensor  # int64 [all prompt tokens], one copy per prompt
    prompt_cu_seqlens: Tensor  # int64 [P + 1]
    tokens: Tensor  # int64 [T], the end token included
    cu_seqlens: Tensor  # int64 [S + 1]
    logprob: Tensor  # float32 [T], of the sampled token, at the sampling temperature
    group_ids: Tensor  # int64 [S]
    truncated: Tensor  # bool [S], no end token within max_new_tokens
    entropy: Tensor | None = None  # float32 [T], of softmax(logits / temperature)
    versions: Tensor | None = None  # int64 [T], of the weights that drew the token
    # int64 [T], the first place of the same token of the same tree: itself unless sequences share
    origin: Tensor | None = None
    # bool [T], False: given by a strategy or an environment, not drawn
    mask: Tensor | None = None
    prompt_ids: Tensor | None = None  # int64 [P], the number of each prompt among those handed in
    # With an environment. A reply counts to the turn that it answers.
    turns: Tensor | None = None  # int64 [T], the token's turn within its sequence
    agents: Tensor | None = None  # int64 [T], who spoke in that turn
    turn_rewards: Tensor | None = None  # float32 [T], the turn's, at the last token that it drew

    @property
    def lengths(self) -> Tensor:
        """int64 [S]: response tokens of each sequence."""
        return self.cu_seqlens.diff()

    def trained(self, values: Tensor) -> Tensor:
        """Of values [T], those of tokens that were drawn."""
        return values if self.mask is None else values[self.mask]

    @property
    def trained_lengths(self) -> Tensor:
        """int64 [S]: drawn tokens of each sequence."""
        if self.mask is None:
            return self.lengths
        return torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))[self.cu_seqlens].diff()

    def prompts(self) -> list[Tensor]:
        """The prompt of each of the S sequences, as views."""
        unique = self.prompt_tokens.split(self.prompt_cu_seqlens.diff().tolist())
        return [unique[group] for group in self.group_ids.tolist()]

    def responses(self) -> list[Tensor]:
        """The response of each of the S sequences, as views."""
        return list(self.tokens.split(self.lengths.tolist()))

    def select(self, rows: Tensor) -> "Rollouts":
        """These of the S sequences, in this order."""
        lengths = self.lengths[rows]
        starts = torch.repeat_interleave(self.cu_seqlens[rows] - offsets(lengths)[:-1], lengths)
        at = starts + torch.arange(len(starts), device=starts.device)
        per_token = ("tokens", "logprob", "entropy", "versions", "mask", *TURNS)
        given = {name: getattr(self, name) for name in per_token}
        changed = {name: tensor[at] for name, tensor in given.items() if tensor is not None}
        if self.origin is not None:
            changed["origin"] = first_place(self.origin[at])
        return replace(
            self,
            **changed,
            cu_seqlens=offsets(lengths),
            group_ids=self.group_ids[rows],
            truncated=self.truncated[rows],
        )

    def token_batches(
        self, rows: list[int], budget: int, parts: int = 1, whole_groups: bool = False
    ) -> list[list[int]]:
        """Cuts sequences into batches of at most `budget` tokens, a multiple of `parts` of them.

        They are as even as can be: the longest sequence first, each into the batch that is
        shortest by then. A sequence counts with its prompt, and may alone be longer than the
        budget. whole_groups: neighbours of one prompt stay together as far as the budget goes, and
        count it once. Batches are empty where there are too few sequences.
        """
        prompts = self.prompt_cu_seqlens.diff().tolist()
        lengths, groups = self.lengths.tolist(), self.group_ids.tolist()
        pieces: list[tuple[int, list[int]]] = []
        for row in rows:
            count, before = pieces[-1] if pieces else (0, [])
            joins = whole_groups and before and groups[before[-1]] == groups[row]
            if joins and count + lengths[row] <= budget:
                pieces[-1] = count + lengths[row], [*before, row]
            else:
                pieces.append((prompts[groups[row]] + lengths[row], [row]))
        pieces.sort(key=lambda piece: -piece[0])
        number, fits = 0, False
        while not fits:
            number, fits = number + parts, True
            heap = [(0, i) for i in range(number)]
            batches: list[list[int]] = [[] for _ in heap]
            for count, these in pieces:
                held, i = heapq.heappop(heap)
                fits &= held == 0 or held + count <= budget
                heapq.heappush(heap, (held + count, i))
                batches[i] += these
        return batches

    def to(self, device: torch.device | str) -> "Rollouts":
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollouts(**{n: None if t is None else t.to(device) for n, t in given.items()})

    @classmethod
    def joined(cls, parts: list["Rollouts"]) -> "Rollouts":
        """One after another: each part's prompts, and so its groups, follow those before it."""
        tokens = groups = 0
        shifted = []
        for part in parts:
            origin = None if part.origin is None else part.origin + tokens
            shifted.append(replace(part, group_ids=part.group_ids + groups, origin=origin))
            tokens += len(part.tokens)
            groups += len(part.prompt_cu_seqlens) - 1
        whole = {}
        for name in (f.name for f in fields(cls)):
            given = [getattr(part, name) for part in shifted]
            if name.endswith("cu_seqlens"):
                whole[name] = offsets(torch.cat([t.diff() for t in given]))
            elif all(t is not None for t in given):
                whole[name] = torch.cat(given)
        return cls(**whole)

    def save(self, path: str | Path, **extra: Tensor) -> None:
        """Writes one safetensors file; a reader never sees half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {f.name: getattr(self, f.name) for f in fields(self)} | extra
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file({name: t.detach().cpu().contiguous() for name, t in given.items()}, part)
        part.replace(path)

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu"
    ) -> tuple["Rollouts", dict[str, Tensor]]:
        """Returns the rollouts and whatever `extra` tensors `save` was given."""
        try:
            tensors = load_file(path, device=str(device))
            own = {f.name: tensors.pop(f.name) for f in fields(cls) if f.default is MISSING}
            own |= {f.name: tensors.pop(f.name, None) for f in fields(cls) if f.name not in own}
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"Rollouts.load: {path} is not a saved rollout: {error}") from error
        return cls(**own), tensors


def offsets(lengths: Tensor) -> Tensor:
    """[N] lengths -> [N + 1] offsets, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def first_place(ids: Tensor) -> Tensor:
    """[T] ids -> [T], the first place of the same id."""
    _, group = ids.unique(return_inverse=True)
    place = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(place, len(ids)).scatter_reduce(0, group, place, "amin")
    return first[group]


def check_prompts(engine: str, prompts: list[list[int]]) -> None:
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError(f"{engine}.generate: expected prompts of at least one token")


def check_sampling(engine: str, group_size: int, max_new_tokens: int, temperature: float) -> None:
    if group_size < 1 or max_new_tokens < 1 or not temperature > 0:
        raise ValueError(
            f"{engine}.generate: expected group_size >= 1, max_new_tokens >= 1 and "
            f"temperature > 0, got {group_size}, {max_new_tokens} and {temperature}"
        )


class Engine(Protocol):
    """Anything that can sample."""

    def generate(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> Rollouts: ...
