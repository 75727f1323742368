"""Small programs with the names, arguments and results of the ops that are to replace them."""

from typing import NamedTuple

import torch
from torch import Tensor


class BranchOutput(NamedTuple):
    ids: Tensor  # int64 [R, m], most probable first
    branch: Tensor  # bool [R, m]
    diversity: Tensor | None  # float32 [R]


def branch_select(
    logits: Tensor,
    *,
    m: int = 2,
    tau_abs: float | None = None,
    tau_rel: float | None = None,
    embedding: Tensor | None = None,
    top: int = 20,
) -> BranchOutput:
    """With p_1 >= p_2 >= ... the softmax,

    branch[j] = j >= 2 and p_j > tau_abs and p_1 - p_j < tau_rel
    diversity = entropy (sum_i p_i^2 - |sum_i p_i e_i|^2),

    over the `top` most probable tokens, with e_i their normalised embeddings.
    """
    logp = logits.float().log_softmax(-1)
    p = logp.exp()
    best = p.topk(m)
    branch = torch.ones_like(best.indices, dtype=torch.bool)
    branch[:, 0] = False
    if tau_abs is not None:
        branch &= best.values > tau_abs
    if tau_rel is not None:
        branch &= best.values[:, :1] - best.values < tau_rel
    if embedding is None:
        return BranchOutput(best.indices, branch, None)
    entropy = -(p * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
    share = p.topk(min(top, p.shape[1]))
    e = torch.nn.functional.normalize(embedding[share.indices].float(), dim=-1)
    mean = (share.values[..., None] * e).sum(1)
    spread = share.values.square().sum(-1) - mean.square().sum(-1)
    return BranchOutput(best.indices, branch, entropy * spread)


def suffix_similarity(tokens_a: Tensor, tokens_b: Tensor, *, mode: str = "edit") -> Tensor:
    """Of each pair of rows of r tokens, divided by r: "edit", their Levenshtein distance; "suffix",
    the longest suffix of either that stands anywhere in the other; "rouge", their longest common
    subsequence, which for equal lengths is ROUGE-L."""
    same = (tokens_a[:, :, None] == tokens_b[:, None, :]).long()
    rows, r = tokens_a.shape
    if mode == "suffix":
        return torch.tensor([max(_tail(s), _tail(s.T)) / r for s in same])
    edit = mode == "edit"
    before = torch.arange(r + 1).expand(rows, -1) * int(edit)
    for i in range(r):
        line = [before[:, 0] + int(edit)]
        for j in range(r):
            if edit:
                least = torch.minimum(line[j], before[:, j + 1]) + 1
                line.append(torch.minimum(least, before[:, j] + 1 - same[:, i, j]))
            else:
                most = torch.maximum(line[j], before[:, j + 1])
                line.append(torch.maximum(most, before[:, j] + same[:, i, j]))
        before = torch.stack(line, 1)
    return before[:, -1].float() / r


def _tail(same: Tensor) -> int:
    """The longest suffix of a that stands anywhere in b: the longest diagonal from the last row."""
    r = len(same)
    runs = [same.flip(0, 1).diagonal(k).cumprod(0).sum() for k in range(r)]
    return int(max(runs))


class ResampleOutput(NamedTuple):
    parents: Tensor  # int64 [N]
    ess: Tensor  # float32 [1]


def smc_resample(log_weights: Tensor, u: Tensor, *, ess_threshold: float = 0.5) -> ResampleOutput:
    """Systematic resampling of n particles, if ess = (sum w)^2 / sum w^2 < ess_threshold n:
    parents[i] is the first j with w_0 + ... + w_j > (i + u) / n. Else parents[i] = i."""
    n = len(log_weights)
    w = log_weights.double().softmax(0)
    ess = 1 / w.square().sum()
    parents = torch.arange(n)
    if ess < ess_threshold * n:
        points = (parents + u.double()) / n
        parents = torch.searchsorted(w.cumsum(0), points, right=True).clamp_(max=n - 1)
    return ResampleOutput(parents, ess.float()[None])
