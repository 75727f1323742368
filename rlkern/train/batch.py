"""From token lists to log-probs of the response tokens.

s sequences of a (micro-)batch, T their response tokens, t those that are computed: a token that
sequences share is computed once.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import rlkern
from rlkern import kv
from rlkern.kv import hf
from rlkern.rollout import Rollouts
from rlkern.train.model import logit_options


@dataclass(frozen=True)
class TokenBatch:
    inputs: dict[str, Any]  # arguments of the model's forward
    rows: Tensor  # int64 [t], where in its flattened hidden states the next token is a target
    targets: Tensor  # int64 [t]
    cu_seqlens: Tensor  # int64 [s + 1]
    paths: Tensor | None = None  # int64 [T], targets of the sequences, which may share them

    @property
    def place(self) -> Tensor:
        """int64 [t], the place of each target in its response, from 0."""
        place = torch.arange(int(self.cu_seqlens[-1]), device=self.targets.device)
        place = place - torch.repeat_interleave(self.cu_seqlens[:-1], self.cu_seqlens.diff())
        if self.paths is None:
            return place
        return torch.zeros_like(self.targets).index_copy(0, self.paths, place)

    def only(self, mask: Tensor) -> "TokenBatch":
        """Without the response tokens that mask [T] leaves out: read, but not trained."""
        paths = torch.arange(len(mask), device=mask.device) if self.paths is None else self.paths
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return replace(self, paths=paths[mask], cu_seqlens=before[self.cu_seqlens])


def collate(prompts: list[Tensor], responses: list[Tensor]) -> TokenBatch:
    """A row each, padded on the right: causal attention never looks there."""
    pairs = [torch.cat([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
    tokens = pad_sequence(pairs, batch_first=True)
    lengths = torch.tensor([len(r) for r in responses], device=tokens.device)
    first = torch.tensor([len(p) for p in prompts], device=tokens.device) - 1
    column = torch.arange(tokens.shape[1], device=tokens.device)
    is_row = (column >= first[:, None]) & (column < (first + lengths)[:, None])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    inputs = {"input_ids": tokens, "use_cache": False}
    return TokenBatch(inputs, is_row.flatten().nonzero()[:, 0], torch.cat(responses), cu_seqlens)


def collate_shared(
    rollouts: Rollouts, rows: list[int], chunk: int | None = None, as_decoded: bool = False
) -> TokenBatch:
    """These of its sequences, in this order, in one row: those of one prompt share it.

    as_decoded: with the bits that an engine of this `chunk` gets.
    """
    picked = rollouts.select(torch.tensor(rows, device=rollouts.group_ids.device))
    prompts = (picked.prompt_tokens, picked.prompt_cu_seqlens)
    pack = kv.group_pack(*prompts, picked.tokens, picked.cu_seqlens, picked.group_ids)
    return along_tree(pack, chunk, as_decoded)


def along_tree(pack: kv.TreePack, chunk: int | None = None, as_decoded: bool = False) -> TokenBatch:
    """A pack as the model reads it, which `hf.install` has prepared."""
    tree = pack.subtree_end, pack.cu_seqlens
    attend = hf.as_decoded(pack, chunk) if as_decoded else hf.along_tree(*tree)
    inputs = {"input_ids": pack.ids[None], "position_ids": pack.positions[None]}
    return TokenBatch(
        inputs | hf.attending(attend),
        pack.pred_row[pack.targets],
        pack.ids[pack.targets],
        pack.path_cu_seqlens,
        pack.paths,
    )


def response_logprobs(
    model: PreTrainedModel,
    batch: TokenBatch,
    temperature: float = 1.0,
    batch_invariant: bool = False,
) -> rlkern.LogprobOutput:
    """-> logprob [T] and entropy [T], float32; no [t, vocabulary] tensor outlives the op."""
    hidden = model.base_model(**batch.inputs).last_hidden_state
    out = rlkern.linear_logprob(
        hidden.flatten(0, 1).index_select(0, batch.rows),
        model.get_output_embeddings().weight,
        batch.targets,
        temperature=temperature,
        outputs=("logprob", "entropy"),
        batch_invariant=batch_invariant,
        **logit_options(model),
    )
    if batch.paths is None:
        return out
    logprob, entropy = (x.index_select(0, batch.paths) for x in (out.logprob, out.entropy))
    return out._replace(logprob=logprob, entropy=entropy)
