"""The divergence over K tokens of which the teacher's log-probs are known."""

import math

import torch
from torch import Tensor

TAILS = ("bucket", "renormalize", "drop")
# A log-prob for slots that do not count: of no probability, and still a number.
_NOTHING = -1e30
# SDPO's and TRL's: what the K tokens have at most, so that the tail keeps a logarithm.
_MOST = -1e-7


def topk_divergence(log_s: Tensor, log_t: Tensor, beta: float, tail: str) -> Tensor:
    """(T,) from (T, K) log-probs of student and teacher; slots where the teacher has -inf do not
    count."""
    counts = log_t != float("-inf")
    log_s = torch.where(counts, log_s, _NOTHING)
    log_t = torch.where(counts, log_t, _NOTHING)
    if tail == "bucket":
        log_s, log_t = _with_tail(log_s), _with_tail(log_t)
    elif tail == "renormalize":
        log_s = log_s - log_s.logsumexp(-1, keepdim=True)
        log_t = log_t - log_t.logsumexp(-1, keepdim=True)
    s, t = log_s.exp(), log_t.exp()
    if beta == 0:
        return (t * (log_t - log_s)).sum(-1)
    # a student's probability of 0 adds nothing, to the gradient either
    log_s = torch.where(s == 0, log_t, log_s)
    if beta == 1:
        return (s * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    return (beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)).sum(-1)


def _with_tail(log_p: Tensor) -> Tensor:
    """All other tokens as one more event."""
    inside = log_p.logsumexp(-1, keepdim=True).clamp(max=_MOST)
    return torch.cat([log_p, torch.log(-torch.expm1(inside))], -1)
