"""Schema, fake and owners of `suffix_similarity`; it has no gradient."""

import torch

from rlkern import _library
from rlkern.ops.suffix_similarity import reference


def _fake(tokens_a, *rest):
    return tokens_a.new_empty((tokens_a.shape[0],), dtype=torch.float32)


_library.define(
    "suffix_similarity(Tensor tokens_a, Tensor tokens_b, Tensor lengths_a, Tensor lengths_b, "
    "int mode) -> Tensor",
    _fake,
)
_library.fill("suffix_similarity", reference.forward, "rlkern.ops.suffix_similarity.triton:forward")
