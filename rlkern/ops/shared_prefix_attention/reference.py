"""Attention over packed trees in plain torch: the specification.

Row i sees key j where j <= i < subtree_end[j] and both lie in the same pack. Pack by pack, with the
whole matrix of scores.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Computed in float32, or in float64 for float64; softcap 0: none."""
    kind = _kind(q)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=kind)
    for rows, scores in _scores(q, k, subtree_end, cu_seqlens, scale, softcap):
        values = _heads(v[rows].to(kind), q)
        lse[rows] = scores.logsumexp(-1)
        weights = _weights(scores, lse[rows])
        out[rows] = torch.einsum("ihj,jhd->ihd", weights, values).to(q.dtype)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    With p = exp(s - lse):  dv[j] = sum_i p[i, j] g[i];  ds = p (g . v - g . out + grad_lse), times
    1 - (s / softcap)^2 with a soft cap;  dq[i] = scale sum_j ds[i, j] k[j], and dk likewise.
    """
    kind = _kind(q)
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for rows, scores in _scores(q, k, subtree_end, cu_seqlens, scale, softcap):
        keys, values = (_heads(x[rows].to(kind), q) for x in (k, v))
        weights = _weights(scores, lse[rows])
        g = grad_out[rows].to(kind)
        delta = (g * out[rows].to(kind)).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse[rows]
        ds = weights * (torch.einsum("ihd,jhd->ihj", g, values) - delta[..., None])
        if softcap > 0:
            ds = ds * (1 - (scores.nan_to_num(neginf=0.0) / softcap) ** 2)
        group = q.shape[1] // k.shape[1]
        found = (
            scale * torch.einsum("ihj,jhd->ihd", ds, keys),
            scale * torch.einsum("ihj,ihd->jhd", ds, q[rows].to(kind)).unflatten(1, (-1, group)),
            torch.einsum("ihj,ihd->jhd", weights, g).unflatten(1, (-1, group)),
        )
        for grad, x in zip(grads, (found[0], found[1].sum(2), found[2].sum(2))):
            grad[rows] = x.to(q.dtype)
    return tuple(grads)


def visible(subtree_end: Tensor) -> Tensor:
    """Of one pack, with ends counted from its first row: bool [rows, keys]."""
    row = torch.arange(len(subtree_end), device=subtree_end.device)
    return (row <= row[:, None]) & (row[:, None] < subtree_end)


def _scores(q, k, subtree_end, cu_seqlens, scale, softcap) -> Iterator[tuple[slice, Tensor]]:
    """Of each pack that has rows: its rows, and scores [rows, heads, keys], -inf where unseen."""
    kind = _kind(q)
    for begin, end in pairwise(cu_seqlens.tolist()):
        if begin == end:
            continue
        rows = slice(begin, end)
        keys = _heads(k[rows].to(kind), q)
        scores = scale * torch.einsum("ihd,jhd->ihj", q[rows].to(kind), keys)
        if softcap > 0:
            scores = softcap * (scores / softcap).tanh()
        seen = visible(subtree_end[rows].long() - begin)
        yield rows, scores.masked_fill(~seen[:, None], -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """0 where nothing is seen."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """Each head of keys or values for all query heads that read it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _kind(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
