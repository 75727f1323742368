"""How alike the last tokens of two branches are."""

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.suffix_similarity import op as _op  # noqa: F401
from rlkern.ops.suffix_similarity.reference import MODES

_OP = "suffix_similarity"
_MOST = 64


def suffix_similarity(
    tokens_a: Tensor,
    tokens_b: Tensor,
    *,
    mode: str = "edit",
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
) -> Tensor:
    """Compares rows of token ids pair by pair, as LATR decides which child to prune.

        edit    Levenshtein distance / max(|a|, |b|)                     0: equal
        suffix  longest suffix of either that stands anywhere in the other / max(|a|, |b|)
        rouge   ROUGE-L: F1 of the longest common subsequence, 2 LCS / (|a| + |b|)

    LATR (arXiv 2510.24302) prunes a child 20, 30 or 50 tokens after its fork if edit < 0.4, or
    suffix or rouge is above a threshold, comparing its tokens since the fork with its parent's.

    Args:
        tokens_a, tokens_b: (N, r) int64 or int32, r at most 64.
        mode: "edit", "suffix" or "rouge".
        lengths_a, lengths_b: (N,) int64 or int32, how many of a row's last tokens count, at most
            r; all without it. What lies before them is not read.

    Returns:
        (N,) float32 in [0, 1]. Two empty rows are equal (0 for edit, 1 for the others).

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit. Lengths outside
            [0, r] are refused on the CPU and clamped elsewhere.

    A row's result is that of integers, divided once: the same bits on every device.
    """
    for name, value in (("tokens_a", tokens_a), ("tokens_b", tokens_b)):
        _check.tensor(_OP, name, value)
        _check.dtype(_OP, name, value, _check.INTEGERS)
        _check.ndim(_OP, name, value, "(N, r)")
    pairs, width = tokens_a.shape
    _check.shape(_OP, "tokens_b", tokens_b, (pairs, width), "(N, r)")
    _check.same_device(_OP, "tokens_b", tokens_b, "tokens_a", tokens_a.device)
    if width > _MOST:
        _check.fail(_OP, "tokens_a", f"of at most {_MOST} columns", width)
    _check.one_of(_OP, "mode", mode, MODES)
    lengths = [
        _lengths(name, value, tokens_a)
        for name, value in (("lengths_a", lengths_a), ("lengths_b", lengths_b))
    ]
    a, b = (t.long().contiguous() for t in (tokens_a, tokens_b))
    return torch.ops.rlkern.suffix_similarity(a, b, *lengths, MODES.index(mode))


def _lengths(name: str, value: Tensor | None, tokens: Tensor) -> Tensor:
    pairs, width = tokens.shape
    if value is None:
        return tokens.new_full((pairs,), width, dtype=torch.int64)
    _check.tensor(_OP, name, value)
    _check.dtype(_OP, name, value, _check.INTEGERS)
    _check.shape(_OP, name, value, (pairs,), "(N,)")
    _check.same_device(_OP, name, value, "tokens_a", tokens.device)
    if value.is_cpu and not torch.compiler.is_compiling():
        outside = (value < 0) | (value > width)
        if bool(outside.any()):
            _check.fail(_OP, name, f"in [0, {width}]", int(value[outside][0]))
    return value.long().contiguous()
