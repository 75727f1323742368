"""Divergence between a student's and a teacher's heads in plain torch: the specification.

    x = hidden @ weight^T + bias
    z = logit_scale x / temperature, or softcap tanh(logit_scale x / softcap) / temperature where
    softcap > 0;  s = softmax(z of the student),  t = softmax(z of the teacher)

    beta = 0      sum_j t_j log(t_j / s_j)                          forward KL
    beta = 1      sum_j s_j log(s_j / t_j)                          reverse KL
    between       beta sum_j t_j log(t_j / m_j) + (1 - beta) sum_j s_j log(s_j / m_j),
                  m = (1 - beta) s + beta t                         JSD

and the student's log-prob of the targets and its entropy. Computed in float32, or in float64 for
float64 inputs; logits are never rounded to 16 bits. Rows of weights and biases from vocab_size on
are not read. A token of probability 0 adds nothing under that distribution.
"""

import math

import torch
from torch import Tensor


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    targets: Tensor | None,
    row_temperature: Tensor | None,
    beta: float,
    temperature: float,
    logit_scale: float,
    softcap: float,
    teacher_logit_scale: float,
    teacher_softcap: float,
    vocab_size: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergence, logprob, entropy, stats); logprob is empty without targets.

    stats is (5, T), for backward: the largest logit (x, or after the soft cap where there is one)
    and log sum_j exp(z_j - max z) of the student, both of the teacher, and the divergence's part
    that the student's gradient holds: the reverse KL, or sum_j s_j log(s_j / m_j); 0 for the
    forward KL.
    """
    scale = temperature if row_temperature is None else row_temperature[:, None]
    x = _logits(hidden, weight, bias, vocab_size)
    y, inv, _ = _capped(x, logit_scale, softcap, scale)
    x = _logits(teacher_hidden, teacher_weight, teacher_bias, vocab_size)
    theirs, teacher_inv, _ = _capped(x, teacher_logit_scale, teacher_softcap, scale)
    top, log_sum = _normalizer(y, inv)
    teacher_top, teacher_log_sum = _normalizer(theirs, teacher_inv)
    log_s = (y - top) * inv - log_sum
    log_t = (theirs - teacher_top) * teacher_inv - teacher_log_sum
    s, t = log_s.exp(), log_t.exp()
    own = y.new_zeros(y.shape[0])
    if beta == 0:
        divergence = _weighted(t, log_t - log_s)
    elif beta == 1:
        divergence = own = _weighted(s, log_s - log_t)
    else:
        log_m = _log_mixture(log_s, log_t, beta)
        own = _weighted(s, log_s - log_m)
        divergence = beta * _weighted(t, log_t - log_m) + (1 - beta) * own
    logprob = y.new_empty(0)
    if targets is not None:
        inside = (targets >= 0) & (targets < vocab_size)
        logprob = log_s.gather(-1, torch.where(inside, targets, 0)[:, None])[:, 0]
        logprob = torch.where(inside, logprob, float("nan"))
        logprob = torch.where(targets == ignore_index, 0.0, logprob)
    entropy = -_weighted(s, log_s)
    normalizers = (top, log_sum, teacher_top, teacher_log_sum)
    stats = torch.stack([*(x[:, 0] for x in normalizers), own])
    return divergence, logprob, entropy, stats


def backward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    """args: those of logit_gradient, need_hidden, need_weight, need_bias. With d from there,

    grad_hidden = d @ weight, grad_weight = d^T @ hidden, grad_bias = d^T 1. What is not needed is
    empty.
    """
    *args, need_hidden, need_weight, need_bias = args
    d = logit_gradient(*args)
    upstream, hidden, weight = args[:3]
    (vocab, depth), size = weight.shape, d.shape[1]
    grad_hidden = hidden.new_empty((0, depth))
    grad_weight = weight.new_empty((0, depth))
    grad_bias = weight.new_empty((0,))
    if need_hidden:
        grad_hidden = (d @ weight[:size].to(d.dtype)).to(hidden.dtype)
    if need_weight:
        live = torch.where((upstream != 0)[:, None], hidden.to(d.dtype), 0.0)
        grad_weight = weight.new_zeros((vocab, depth))
        grad_weight[:size] = d.T @ live
    if need_bias:
        grad_bias = weight.new_zeros((vocab,))
        grad_bias[:size] = d.sum(0)
    return grad_hidden, grad_weight, grad_bias


def logit_gradient(
    grad_divergence: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    row_temperature: Tensor | None,
    stats: Tensor,
    beta: float,
    temperature: float,
    logit_scale: float,
    softcap: float,
    teacher_logit_scale: float,
    teacher_softcap: float,
    vocab_size: int,
) -> Tensor:
    """(T, vocab_size). With g the upstream gradient,

    d_j = g e_j dz_j / dx_j,  e_j = s_j - t_j                                             beta = 0
                                    s_j (log s_j - log t_j - reverse KL)                  beta = 1
                                    (1 - beta) s_j (log s_j - log m_j
                                        - sum_k s_k log(s_k / m_k))                       between

    Rows with g = 0 get exactly 0, whatever they hold.
    """
    scale = temperature if row_temperature is None else row_temperature[:, None]
    x = _logits(hidden, weight, bias, vocab_size)
    y, inv, slope = _capped(x, logit_scale, softcap, scale)
    x = _logits(teacher_hidden, teacher_weight, teacher_bias, vocab_size)
    theirs, teacher_inv, _ = _capped(x, teacher_logit_scale, teacher_softcap, scale)
    top, log_sum, teacher_top, teacher_log_sum, own = stats.to(y.dtype)[:, :, None]
    log_s = (y - top) * inv - log_sum
    log_t = (theirs - teacher_top) * teacher_inv - teacher_log_sum
    s = log_s.exp()
    if beta == 0:
        d = s - log_t.exp()
    elif beta == 1:
        d = torch.where(s == 0, 0.0, s * (log_s - log_t - own))
    else:
        d = torch.where(s == 0, 0.0, s * (log_s - _log_mixture(log_s, log_t, beta) - own))
        d = (1 - beta) * d
    g = grad_divergence.to(y.dtype)[:, None]
    return torch.where(g != 0, d * g * inv * slope, 0.0)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(kind) @ weight[:size].to(kind).T
    return logits if bias is None else logits + bias[:size].to(kind)


def _capped(
    x: Tensor, logit_scale: float, softcap: float, temperature: Tensor | float
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """y, z / y, and dy / dx."""
    if softcap == 0:
        return x, logit_scale / temperature, 1.0
    t = torch.tanh(logit_scale * x / softcap)
    return softcap * t, 1 / temperature, logit_scale * (1 - t * t)


def _normalizer(y: Tensor, inv: Tensor | float) -> tuple[Tensor, Tensor]:
    """Each row's largest y, and log sum_j exp((y_j - max) inv)."""
    top = y.amax(-1, keepdim=True)
    return top, ((y - top) * inv).exp().sum(-1, keepdim=True).log()


def _log_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """sum_j p_j x_j, where 0 times infinity is 0."""
    return torch.where(p == 0, 0.0, p * x).sum(-1)
