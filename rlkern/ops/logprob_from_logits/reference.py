"""Log-prob, logsumexp and entropy of logits in plain torch: the specification.

    y = logit_scale logits, then softcap tanh(y / softcap) where softcap > 0
    z = y / temperature,  p = softmax(z)
    logprob = z[target] - logsumexp(z),  entropy = logsumexp(z) - sum_j p_j z_j

Computed in float32, or in float64 for float64 logits. A logit of -inf is a token of probability
0 and adds nothing to the entropy. A target outside [0, V) gives NaN, or 0 when it is ignore_index.
"""

import torch
from torch import Tensor


def forward(
    logits: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, _ = _capped(logits, logit_scale, softcap)
    scaled = y / _column(row_temperature, temperature)
    logsumexp = torch.logsumexp(scaled, dim=-1)
    in_vocab, safe = _targets(scaled, targets)
    if logits.shape[-1] == 0:
        logprob = torch.full_like(logsumexp, float("nan"))
    else:
        logprob = scaled.gather(-1, safe[:, None])[:, 0] - logsumexp
        logprob = torch.where(in_vocab, logprob, float("nan"))
    logprob = torch.where(targets == ignore_index, 0.0, logprob)
    entropy = logsumexp.new_empty(0)
    if want_entropy:
        log_p = scaled - logsumexp[:, None]
        p = log_p.exp()
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    return logprob, logsumexp, entropy


def backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    """In the logits' dtype, with dy / dx the slope of scale and soft cap:

    d logits = (a (1[j = t] - p) - b p (log p + H) + c p) / temperature dy / dx
    """
    y, slope = _capped(logits, logit_scale, softcap)
    scaled = y / _column(row_temperature, temperature)
    log_p = scaled - logsumexp[:, None].to(scaled.dtype)
    p = log_p.exp()
    grad = torch.zeros_like(scaled)
    if grad_logprob is not None and logits.shape[-1] > 0:
        in_vocab, safe = _targets(scaled, targets)
        a = torch.where(targets == ignore_index, 0.0, grad_logprob)[:, None]
        hit = torch.zeros_like(scaled).scatter_(-1, safe[:, None], in_vocab[:, None].to(p.dtype))
        grad = grad + a * (hit - p)
    if grad_logsumexp is not None:
        grad = grad + grad_logsumexp[:, None] * p
    if grad_entropy is not None:
        h = torch.where(p == 0, 0.0, log_p) + entropy[:, None]
        grad = grad - grad_entropy[:, None] * p * h
    return (grad / _column(row_temperature, temperature) * slope).to(logits.dtype)


def _capped(logits: Tensor, logit_scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """y and dy / dx."""
    y = logits if logits.dtype == torch.float64 else logits.float()
    # a scale of 1 must leave -inf alone, and every bit
    y = y if logit_scale == 1 else y * logit_scale
    if softcap == 0:
        return y, logit_scale
    t = torch.tanh(y / softcap)
    return softcap * t, logit_scale * (1 - t * t)


def _column(row_temperature: Tensor | None, temperature: float) -> Tensor | float:
    return temperature if row_temperature is None else row_temperature[:, None]


def _targets(scaled: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each target is in the vocabulary, and an index that is safe to read at."""
    in_vocab = (targets >= 0) & (targets < scaled.shape[-1])
    return in_vocab, torch.where(in_vocab, targets, 0)
