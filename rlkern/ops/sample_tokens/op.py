"""Schemas, fakes and owners of `sample_tokens`; no gradient goes through it."""

import torch

from rlkern import _library
from rlkern.ops.sample_tokens import reference


def _fake(logits, branch_ids, *rest):
    rows, wants_count = logits.shape[0], rest[-1]

    def new(dtype, count=rows):
        return logits.new_empty((count,), dtype=dtype)

    return (
        new(torch.int64),
        *(new(torch.float32) for _ in range(4)),
        new(torch.int64),
        new(torch.int64, rows if wants_count else 0),
    )


def _fake_kept(logits, threshold, last, offsets, size, vocab_size):
    return logits.new_empty((size,), dtype=torch.int64)


_library.define(
    "sample_tokens(Tensor logits, Tensor branch_ids, Tensor positions, Tensor inverse_temperature, "
    "Tensor? greedy, Tensor? top_k, Tensor? top_p, Tensor? log_min_p, int seed, int vocab_size, "
    "bool wants_count) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
# the columns that sample_tokens kept: logits above the threshold, and equal ones up to `last`
_library.define(
    "kept_tokens(Tensor logits, Tensor threshold, Tensor last, Tensor offsets, SymInt size, "
    "int vocab_size) -> Tensor",
    _fake_kept,
)
_TRITON = "rlkern.ops.sample_tokens.triton"
_library.fill("sample_tokens", reference.forward, f"{_TRITON}:forward")
_library.fill("kept_tokens", reference.kept, f"{_TRITON}:kept")
