"""From token lists to log-probs of the response tokens.

s sequences of a (micro-)batch, L their longest input, t response tokens, H hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import rlkern


@dataclass(frozen=True)
class TokenBatch:
    inputs: Tensor  # int64 [s, L], padded on the right: causal attention never looks there
    rows: Tensor  # int64 [t], where in the flattened inputs the next token is a response token
    targets: Tensor  # int64 [t]
    cu_seqlens: Tensor  # int64 [s + 1]


def collate(prompts: list[Tensor], responses: list[Tensor]) -> TokenBatch:
    inputs = pad_sequence(
        [torch.cat([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)],
        batch_first=True,
    )
    device = inputs.device
    lengths = torch.tensor([len(r) for r in responses], device=device)
    first = torch.tensor([len(p) for p in prompts], device=device) - 1
    column = torch.arange(inputs.shape[1], device=device)
    is_row = (column >= first[:, None]) & (column < (first + lengths)[:, None])
    return TokenBatch(
        inputs=inputs,
        rows=is_row.flatten().nonzero()[:, 0],
        targets=torch.cat(responses),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    )


def response_logprobs(
    model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0
) -> rlkern.LogprobOutput:
    """-> logprob [t] and entropy [t], float32; no [t, V] tensor outlives the op."""
    hidden = model.base_model(input_ids=batch.inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return rlkern.linear_logprob(
        hidden.flatten(0, 1).index_select(0, batch.rows),
        head.weight,
        batch.targets,
        temperature=temperature,
        outputs=("logprob", "entropy"),
    )
