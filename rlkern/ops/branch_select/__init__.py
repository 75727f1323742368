"""Where a tree rollout may branch: candidates, LATR's test, entropy and ROSE's diversity."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops.branch_select import op as _op  # noqa: F401
from rlkern.ops.logprob_from_logits import logprob_from_logits

_OP = "branch_select"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BranchOutput(NamedTuple):
    ids: Tensor
    """(R, m) int64, most probable first"""
    logprob: Tensor
    """(R, m) float32"""
    branch: Tensor
    """(R, m) bool; the first column is never set"""
    entropy: Tensor
    """(R,) float32, nats"""
    diversity: Tensor | None = None
    """(R,) float32, where an embedding was given"""


def branch_select(
    logits: Tensor,
    *,
    m: int = 2,
    temperature: float | Tensor = 1.0,
    tau_abs: float | None = None,
    tau_rel: float | None = None,
    embedding: Tensor | None = None,
    top: int = 20,
    vocab_size: int | None = None,
) -> BranchOutput:
    """The m most probable tokens of each row, and which of them are worth a branch of their own.

        p = softmax(logits / temperature), p_1 >= p_2 >= ...
        branch[j] = j >= 2 and p_j > tau_abs and p_1 - p_j < tau_rel
        diversity = entropy * (sum_i p_i^2 - |sum_i p_i e_i|^2),  i over the `top` most probable,
            e_i = embedding[id_i] / |embedding[id_i]|

    The test is LATR's (arXiv 2510.24302; tau_abs 0.25 and tau_rel 0.15 by default there). The
    diversity is ROSE's (arXiv 2601.05053), which branches where it is largest: as |e_i| = 1 it is
    minus the entropy times sum_{i != j} p_i p_j cos(e_i, e_j), so 0 for unrelated candidates and
    negative for synonyms. The p_i are those of the whole softmax, not renormalised over `top`.

    Args:
        logits: (R, V) float32, bfloat16 or float16, read once.
        m: how many candidates, the first included; at most V.
        temperature: a positive number, or an (R,) tensor.
        tau_abs, tau_rel: thresholds; None leaves that half of the test out.
        embedding: (V', H) float32, bfloat16 or float16; tokens from V' on have none, and count
            as probability 0.
        top: over how many tokens the diversity runs.
        vocab_size: how many entries of the vocabulary exist; the rest is padding.

    Returns:
        BranchOutput. Where a row has fewer tokens than m, ids are -1, log-probs -inf and branch is
        False. Equal logits are ordered by id (on CUDA in any order).

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit.

    Two runs give the same bits, and a row's result does not depend on the other rows.
    """
    _check.tensor(_OP, "logits", logits)
    _check.dtype(_OP, "logits", logits, _DTYPES)
    _check.ndim(_OP, "logits", logits, "(R, V)")
    size = _logprob.check_vocab_size(_OP, vocab_size, logits.shape[1])
    for name, value, most in (("m", m, size), ("top", top, None)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{_OP}: expected {name} to be an int, got {type(value).__name__}")
        if value < 1 or (most is not None and value > most):
            bound = "at least 1" if most is None else f"in [1, {most}]"
            _check.fail(_OP, name, f"to be {bound}", value)
    for name, value in (("tau_abs", tau_abs), ("tau_rel", tau_rel)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{_OP}: expected {name} to be a number, got {type(value).__name__}")
    if embedding is not None:
        _check.tensor(_OP, "embedding", embedding)
        _check.dtype(_OP, "embedding", embedding, _DTYPES)
        _check.ndim(_OP, "embedding", embedding, "(V, H)")
        _check.same_device(_OP, "embedding", embedding, "logits", logits.device)
        embedding = embedding.detach()
        if embedding.stride(-1) != 1:
            embedding = embedding.contiguous()
    top = min(top, size) if embedding is not None else 0
    stats = logprob_from_logits(
        logits.detach(),
        torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device),
        temperature=temperature,
        vocab_size=size,
        topk=max(m, top),
        outputs=("entropy",),
    )
    branch, diversity = torch.ops.rlkern.branch_select(
        stats.topk_values,
        stats.topk_ids,
        stats.entropy,
        embedding,
        m,
        top,
        float("-inf") if tau_abs is None else float(tau_abs),
        float("inf") if tau_rel is None else float(tau_rel),
    )
    return BranchOutput(
        stats.topk_ids[:, :m],
        stats.topk_values[:, :m],
        branch,
        stats.entropy,
        None if embedding is None else diversity,
    )
