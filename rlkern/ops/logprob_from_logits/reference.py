"""Statistics of softmax over given logits in plain torch: the specification.

    x = logits, rounded to bfloat16 where round_logits
    y = logit_scale x, then softcap tanh(y / softcap) where softcap > 0
    z = y / temperature, and -inf where vocab_mask is False;  p = softmax(z)
    logprob = z[target] - logsumexp(z),  entropy = logsumexp(z) - sum_j p_j z_j
    sum_sq_prob = sum_j p_j^2,  is_top1 = no z_j is larger than z[target]
    id_logprob[k] = z[ids[k]] - logsumexp(z)
    topk: the largest z, minus logsumexp(z); of equal ones the lower id first

Computed in float32, or in float64 for float64 logits. Columns from vocab_size on do not exist. A
logit of -inf is a token of probability 0 and adds nothing to the entropy. A target or id outside
[0, vocab_size) gives NaN, or 0 when it is ignore_index; such a target is not the top one. The top-k
of a row with fewer than k tokens of any probability ends in (-inf, id -1).
"""

import torch
from torch import Tensor


def forward(
    logits: Tensor,
    targets: Tensor,
    ids: Tensor | None,
    vocab_mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    round_logits: bool,
    topk: int,
) -> tuple[Tensor, ...]:
    y, _ = _capped(logits[:, :vocab_size], logit_scale, softcap, round_logits)
    z = y / _column(row_temperature, temperature)
    if vocab_mask is not None:
        z = z.masked_fill(~vocab_mask[:vocab_size], float("-inf"))
    logsumexp = torch.logsumexp(z, dim=-1)
    # not z - logsumexp: far below zero that sum is rounded away
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    hit, in_vocab = _pick(z, targets[:, None])
    logprob = _value(log_p, targets[:, None], ignore_index)[:, 0]
    top = z.amax(-1) if z.shape[1] else z.new_full(z.shape[:1], float("-inf"))
    is_top1 = (hit[:, 0] >= top) & in_vocab[:, 0] & (targets != ignore_index)
    id_logprob = _value(log_p, targets[:, None][:, :0] if ids is None else ids, ignore_index)
    order = torch.sort(z, dim=-1, descending=True, stable=True)
    absent = order.values[:, :topk] == float("-inf")
    topk_values = log_p.gather(-1, order.indices[:, :topk]).masked_fill(absent, float("-inf"))
    topk_ids = order.indices[:, :topk].masked_fill(absent, -1)
    sum_sq_prob = p.square().sum(-1)
    return logprob, logsumexp, entropy, sum_sq_prob, is_top1, id_logprob, topk_values, topk_ids


def backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_id_logprob: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    ids: Tensor | None,
    vocab_mask: Tensor | None,
    row_temperature: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    round_logits: bool,
) -> Tensor:
    """In the logits' dtype and shape, with dy / dx the slope of scale and soft cap:

    d logits_j = (a (1[j = target] - p_j) + sum_k g_k (1[j = ids_k] - p_j)
                  - b p_j (log p_j + H) + c p_j) / temperature dy_j / dx_j

    The rounding of logits is passed straight through. Columns that are masked or do not exist
    get 0.
    """
    y, slope = _capped(logits[:, :vocab_size], logit_scale, softcap, round_logits)
    z = y / _column(row_temperature, temperature)
    if vocab_mask is not None:
        z = z.masked_fill(~vocab_mask[:vocab_size], float("-inf"))
    log_p = z - logsumexp[:, None].to(z.dtype)
    p = log_p.exp()
    grad = torch.zeros_like(z)
    column = None if grad_logprob is None else grad_logprob[:, None]
    for upstream, wanted in ((column, targets[:, None]), (grad_id_logprob, ids)):
        if upstream is None or vocab_size == 0:
            continue
        g = torch.where(wanted == ignore_index, 0.0, upstream)
        _, in_vocab = _pick(z, wanted)
        hits = torch.zeros_like(z).scatter_add_(
            -1, torch.where(in_vocab, wanted, 0), torch.where(in_vocab, g, 0.0).to(z.dtype)
        )
        grad = grad + hits - g.sum(-1, keepdim=True) * p
    if grad_logsumexp is not None:
        grad = grad + grad_logsumexp[:, None] * p
    if grad_entropy is not None:
        h = torch.where(p == 0, 0.0, log_p) + entropy[:, None]
        grad = grad - grad_entropy[:, None] * p * h
    grad = grad / _column(row_temperature, temperature) * slope
    if vocab_mask is not None:
        grad = grad.masked_fill(~vocab_mask[:vocab_size], 0.0)
    padding = logits.shape[1] - vocab_size
    return torch.nn.functional.pad(grad, (0, padding)).to(logits.dtype)


def backward_inplace(*args) -> None:
    """The same, written over the logits."""
    args[4].copy_(backward(*args))


def _capped(
    logits: Tensor, logit_scale: float, softcap: float, round_logits: bool
) -> tuple[Tensor, Tensor | float]:
    """y and dy / dx."""
    y = logits if logits.dtype == torch.float64 else logits.float()
    if round_logits:
        y = y.float().bfloat16().to(y.dtype)
    # a scale of 1 must leave -inf alone, and every bit
    y = y if logit_scale == 1 else y * logit_scale
    if softcap == 0:
        return y, logit_scale
    t = torch.tanh(y / softcap)
    return softcap * t, logit_scale * (1 - t * t)


def _column(row_temperature: Tensor | None, temperature: float) -> Tensor | float:
    return temperature if row_temperature is None else row_temperature[:, None]


def _pick(z: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """z at the (T, K) columns that are wanted, NaN where there is none; and whether there is."""
    in_vocab = (wanted >= 0) & (wanted < z.shape[1])
    if z.shape[1] == 0:
        return z.new_full(wanted.shape, float("nan")), in_vocab
    hit = z.gather(-1, torch.where(in_vocab, wanted, 0))
    return torch.where(in_vocab, hit, float("nan")), in_vocab


def _value(log_p: Tensor, wanted: Tensor, ignore_index: int) -> Tensor:
    return torch.where(wanted == ignore_index, 0.0, _pick(log_p, wanted)[0])
