"""Statistics of each row's softmax over its kept tokens in plain torch: the specification.

With K the kept ids of a row, for j in K:

    x_j = hidden . weight[j] + bias[j], rounded to bfloat16 where asked
    y = logit_scale x, then softcap tanh(y / softcap) where softcap > 0;  z = y / temperature
    logsumexp = log sum_{j in K} exp z_j,  p_j = exp(z_j - logsumexp)
    logprob = z[target] - logsumexp,  entropy = logsumexp - sum_j p_j z_j
    sum_sq_prob = sum_j p_j^2,  is_top1: z[target] is the largest of z

Computed in float32, or in float64 for float64 inputs. A slot is a position in kept_ids; slots whose
id lies outside [0, V) do not count. An id that stands twice in a row counts twice.
"""

import torch
from torch import Tensor


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    round_logits: bool,
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, logsumexp, entropy, sum_sq_prob, is_top1, x of every slot, the target's slot or -1)

    x is -inf in slots that do not count.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    row, ids, counts = _slots(kept_ids, kept_offsets, vocab)
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row, ids, slot = row[counts], ids[counts], counts.nonzero()[:, 0]
    x = (hidden[row].to(kind) * weight[ids].to(kind)).sum(-1)
    if bias is not None:
        x = x + bias[ids].to(kind)
    if round_logits:
        x = x.bfloat16().to(kind)
    y, _ = _capped(x, logit_scale, softcap)
    z = y / (temperature if row_temperature is None else row_temperature[row])

    top = z.new_full((rows,), float("-inf")).scatter_reduce_(0, row, z, "amax")
    # while nothing has a probability any finite reference point gives sums of 0
    anchor = torch.where(top.isneginf(), 0.0, top)
    total = z.new_zeros(rows).index_add_(0, row, (z - anchor[row]).exp())
    logsumexp = anchor + total.log()
    log_p = z - logsumexp[row]
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * log_p)
    entropy = z.new_zeros(rows).index_add_(0, row, -terms)
    sum_sq_prob = z.new_zeros(rows).index_add_(0, row, p * p)

    hit = ids == targets[row]
    target_slot = torch.full((rows,), kept_ids.shape[0], device=hidden.device)
    target_slot = target_slot.scatter_reduce_(0, row[hit], slot[hit], "amin")
    found = target_slot < kept_ids.shape[0]
    in_vocab = (targets >= 0) & (targets < vocab)
    has_kept = torch.zeros_like(found).index_fill_(0, row, True)
    logprob = torch.where(in_vocab & has_kept, float("-inf"), float("nan")).to(kind)
    is_top1 = torch.zeros_like(found)
    if kept_ids.shape[0]:
        at = target_slot.clamp(max=kept_ids.shape[0] - 1)
        target_z = z.new_zeros(kept_ids.shape).index_put_((slot,), z)[at]
        logprob = torch.where(found, target_z - logsumexp, logprob)
        is_top1 = found & (target_z >= top) & ~logprob.isnan()
    ignored = targets == ignore_index
    logprob = torch.where(ignored, 0.0, logprob)
    is_top1 = is_top1 & ~ignored
    target_slot = torch.where(found & ~ignored, target_slot, -1)
    logits = x.new_full(kept_ids.shape, float("-inf")).index_put_((slot,), x)
    if not want_logits:
        logits, target_slot = logits.new_empty(0), target_slot.new_empty(0)
    return logprob, logsumexp, entropy, sum_sq_prob, is_top1, logits, target_slot


def backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    logits: Tensor,
    target_slot: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_hidden[t] = sum_j d_tj weight[j], grad_weight[j] = sum_t d_tj hidden[t],
    grad_bias[j] = sum_t d_tj, with dy / dx the slope of scale and soft cap, and

        d_j = (a (1[j = target] - p_j) - b p_j (log p_j + H) + c p_j) / temperature dy / dx

    a is 0 where the target is not kept or is ignored: that log-prob is a constant. The rounding of
    x has slope 1. What is not needed is empty.
    """
    row, ids, counts = _slots(kept_ids, kept_offsets, weight.shape[0])
    row, ids, slot = row[counts], ids[counts], counts.nonzero()[:, 0]
    x = logits[slot]
    y, slope = _capped(x, logit_scale, softcap)
    scale = temperature if row_temperature is None else row_temperature[row]
    log_p = y / scale - logsumexp[row]
    p = log_p.exp()
    d = torch.zeros_like(log_p)
    a = torch.zeros_like(logsumexp)
    if grad_logprob is not None:
        a = torch.where(target_slot >= 0, grad_logprob, 0.0)
    d = d - a[row] * p
    if grad_logsumexp is not None:
        d = d + grad_logsumexp[row] * p
    if grad_entropy is not None:
        h = torch.where(p == 0, 0.0, log_p) + entropy[row]
        d = d - grad_entropy[row] * p * h
    # a logit of -inf has p = 0, also in a row that has no other
    d = torch.where(x.isneginf(), 0.0, d) + a[row] * (slot == target_slot[row])
    d = d / scale * slope
    grad_hidden = hidden.new_empty((0, hidden.shape[1]))
    grad_weight = weight.new_empty((0, weight.shape[1]))
    grad_bias = weight.new_empty(0)
    if need_hidden:
        total = torch.zeros_like(hidden, dtype=d.dtype)
        products = d[:, None] * weight[ids].to(d.dtype)
        grad_hidden = total.index_add_(0, row, products).to(hidden.dtype)
    if need_weight:
        total = torch.zeros_like(weight, dtype=d.dtype)
        products = d[:, None] * hidden[row].to(d.dtype)
        grad_weight = total.index_add_(0, ids, products).to(weight.dtype)
    if need_bias:
        grad_bias = d.new_zeros(weight.shape[0]).index_add_(0, ids, d).to(weight.dtype)
    return grad_hidden, grad_weight, grad_bias


def _capped(x: Tensor, logit_scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """y and dy / dx."""
    y = logit_scale * x
    if softcap == 0:
        return y, logit_scale
    t = torch.tanh(y / softcap)
    return softcap * t, logit_scale * (1 - t * t)


def _slots(kept_ids: Tensor, kept_offsets: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each slot its row and id, and whether it counts."""
    position = torch.arange(kept_ids.shape[0], device=kept_ids.device)
    rows = kept_offsets.shape[0] - 1
    row = torch.searchsorted(kept_offsets[1:].contiguous(), position, right=True)
    ids = kept_ids.long()
    counts = (position >= kept_offsets[0]) & (row < rows) & (ids >= 0) & (ids < vocab)
    return row, ids, counts
