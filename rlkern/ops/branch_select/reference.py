"""LATR's test and ROSE's diversity of given top probabilities: the specification.

p_i = exp(log_probs[i]), largest first; ids of -1 are not there (p = 0)
branch[j] = j >= 1 and p_j > tau_abs and p_0 - p_j < tau_rel,  j < m
diversity = entropy (sum_i p_i^2 - |sum_i p_i e_i|^2),  e_i = embedding[ids[i]] / its length
"""

import torch
from torch import Tensor


def forward(
    log_probs: Tensor,
    ids: Tensor,
    entropy: Tensor,
    embedding: Tensor | None,
    m: int,
    top: int,
    tau_abs: float,
    tau_rel: float,
) -> tuple[Tensor, Tensor]:
    p = log_probs.exp()
    branch = (p[:, :m] > tau_abs) & (p[:, :1] - p[:, :m] < tau_rel) & (ids[:, :m] >= 0)
    branch[:, 0] = False
    if embedding is None:
        return branch, entropy[:0].clone()
    known = (ids[:, :top] >= 0) & (ids[:, :top] < embedding.shape[0])
    p = torch.where(known, p[:, :top], 0.0)
    rows = embedding[torch.where(known, ids[:, :top], 0)]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    squares = rows.square().sum(-1)
    scale = p / torch.where(squares == 0, 1.0, squares).sqrt()
    mean = (scale[..., None] * rows).sum(1)
    return branch, entropy * (p.square().sum(-1) - mean.square().sum(-1)).to(entropy.dtype)
