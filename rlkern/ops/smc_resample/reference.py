"""Systematic resampling, a loop over groups: the specification.

W = softmax(log_weights) of a group of n;  ess = 1 / sum W^2
Where ess < ess_threshold n: row i continues the first j with W_0 + ... + W_j > (i + u) / n, and all
weights become the group's mean. Computed in float64. Groups without a finite weight, or with NaN or
inf, stay as they are.
"""

import itertools

import torch
from torch import Tensor


def forward(
    log_weights: Tensor, u: Tensor, cu_seqlens: Tensor, ess_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    parents = torch.arange(log_weights.shape[0], device=log_weights.device)
    new = log_weights.clone()
    ess = log_weights.new_zeros((cu_seqlens.shape[0] - 1,))
    bounds = cu_seqlens.tolist()
    for g, (first, stop) in enumerate(itertools.pairwise(bounds)):
        x, n = log_weights[first:stop].double(), stop - first
        if bool((x.isnan() | (x == float("inf"))).any()):
            ess[g] = float("nan")
        elif n and bool((x > -float("inf")).any()):
            w = (x - x.amax()).exp()
            size = w.sum() ** 2 / (w * w).sum()
            ess[g] = size
            if size < ess_threshold * n:
                children = (w.cumsum(0) / w.sum() * n - u[g].double()).ceil()
                children[int(w.nonzero()[-1]) :] = n
                row = torch.arange(n, device=x.device)
                parents[first:stop] = first + (children[None, :] <= row[:, None]).sum(-1)
                new[first:stop] = x.amax() + (w.sum() / n).log()
    return parents, ess, new
