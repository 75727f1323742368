"""What strategies decide by, on a whole batch: to become ops of the same names."""

from typing import NamedTuple

import torch
from torch import Tensor


class BranchSelect(NamedTuple):
    ids: Tensor  # int64 [R, m], the most likely tokens, first to m-th
    branches: Tensor  # bool [R, m], whether a branch begins with this token; never the first


def branch_select(logits: Tensor, *, top_m: int, tau_abs: float, tau_rel: float) -> BranchSelect:
    """The j-th likely token branches if p_j > tau_abs and p_1 - p_j < tau_rel (2510.24302)."""
    top = logits.float().softmax(-1).topk(top_m)
    p, first = top.values, top.values[:, :1]
    branches = (p > tau_abs) & (first - p < tau_rel)
    branches[:, 0] = False
    return BranchSelect(top.indices, branches)


def suffix_similarity(a: Tensor, b: Tensor, *, mode: str) -> Tensor:
    """How alike the rows of a and b (K, r) are, as a share of r -> float64 [K].

    "edit": Levenshtein distance, which falls with likeness; "suffix": the longest common suffix;
    "rouge": the longest common subsequence, which for rows of equal length is ROUGE-L.
    """
    same = (a[:, :, None] == b[:, None, :]).long()
    rows, r = a.shape
    if mode == "suffix":
        return (a == b).flip(1).long().cumprod(1).sum(1).double() / r
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
    return before[:, -1].double() / r


def smc_resample(log_weights: Tensor, u: float, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Systematic resampling of N particles by the points (u + i) / n -> parents [n], ESS.

    ESS = (sum w)^2 / sum w^2. n defaults to N.
    """
    w = log_weights.double().softmax(0)
    n = len(w) if n is None else n
    points = (torch.arange(n, dtype=torch.float64) + u) / n
    parents = torch.searchsorted(w.cumsum(0), points, right=True).clamp_(max=len(w) - 1)
    return parents, 1 / w.square().sum()
