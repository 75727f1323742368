"""Log-prob, logsumexp and entropy under a kept set of tokens in plain torch: the specification.

With K the kept ids of a row, x_j = hidden . weight[j] for j in K, and z = x / temperature:

    logsumexp = log sum_{j in K} exp z_j,  p_j = exp(z_j - logsumexp)
    logprob = z[target] - logsumexp,  entropy = logsumexp - sum_j p_j z_j

Computed in float32, or in float64 for float64 inputs. A slot is a position in kept_ids; slots whose
id lies outside [0, V) do not count. An id that stands twice in a row counts twice.
"""

import torch
from torch import Tensor


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    ignore_index: int,
    want_entropy: bool,
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, logsumexp, entropy, x of every slot, the target's slot or -1)."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    row, ids, counts = _slots(kept_ids, kept_offsets, vocab)
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.new_full(kept_ids.shape, float("-inf"), dtype=kind)
    row, ids, slot = row[counts], ids[counts], counts.nonzero()[:, 0]
    logits[slot] = (hidden[row].to(kind) * weight[ids].to(kind)).sum(-1)
    z = logits[slot] / (temperature if row_temperature is None else row_temperature[row])

    top = z.new_full((rows,), float("-inf")).scatter_reduce_(0, row, z, "amax")
    total = z.new_zeros(rows).index_add_(0, row, (z - top[row]).exp())
    logsumexp = top + total.log()
    log_p = z - logsumexp[row]
    entropy = logits.new_empty(0)
    if want_entropy:
        p = log_p.exp()
        terms = torch.where(p == 0, 0.0, p * log_p)
        entropy = z.new_zeros(rows).index_add_(0, row, -terms)

    hit = ids == targets[row]
    target_slot = torch.full((rows,), kept_ids.shape[0], device=hidden.device)
    target_slot = target_slot.scatter_reduce_(0, row[hit], slot[hit], "amin")
    found = target_slot < kept_ids.shape[0]
    in_vocab = (targets >= 0) & (targets < vocab)
    has_kept = torch.zeros_like(found).index_fill_(0, row, True)
    logprob = torch.where(in_vocab & has_kept, float("-inf"), float("nan")).to(kind)
    if kept_ids.shape[0]:
        at = target_slot.clamp(max=kept_ids.shape[0] - 1)
        scale = temperature if row_temperature is None else row_temperature
        logprob = torch.where(found, logits[at] / scale - logsumexp, logprob)
    ignored = targets == ignore_index
    logprob = torch.where(ignored, 0.0, logprob)
    target_slot = torch.where(found & ~ignored, target_slot, -1)
    if not want_logits:
        logits, target_slot = logits.new_empty(0), target_slot.new_empty(0)
    return logprob, logsumexp, entropy, logits, target_slot


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
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """grad_hidden[t] = sum_j d_j weight[j], grad_weight[j] = sum_t d_tj hidden[t], with

        d_j = (a (1[j = target] - p_j) - b p_j (log p_j + H) + c p_j) / temperature

    a is 0 where the target is not kept or is ignored: that log-prob is a constant. What is not
    needed is empty.
    """
    row, ids, counts = _slots(kept_ids, kept_offsets, weight.shape[0])
    row, ids, slot = row[counts], ids[counts], counts.nonzero()[:, 0]
    scale = temperature if row_temperature is None else row_temperature[row]
    log_p = logits[slot] / scale - logsumexp[row]
    p = log_p.exp()
    d = torch.zeros_like(log_p)
    if grad_logprob is not None:
        a = torch.where(target_slot >= 0, grad_logprob, 0.0)[row]
        d = d + a * ((slot == target_slot[row]).to(p.dtype) - p)
    if grad_logsumexp is not None:
        d = d + grad_logsumexp[row] * p
    if grad_entropy is not None:
        h = torch.where(p == 0, 0.0, log_p) + entropy[row]
        d = d - grad_entropy[row] * p * h
    d = (d / scale)[:, None]
    grad_hidden = hidden.new_empty((0, hidden.shape[1]))
    grad_weight = weight.new_empty((0, weight.shape[1]))
    if need_hidden:
        total = torch.zeros_like(hidden, dtype=d.dtype)
        grad_hidden = total.index_add_(0, row, d * weight[ids].to(d.dtype)).to(hidden.dtype)
    if need_weight:
        total = torch.zeros_like(weight, dtype=d.dtype)
        grad_weight = total.index_add_(0, ids, d * hidden[row].to(d.dtype)).to(weight.dtype)
    return grad_hidden, grad_weight


def _slots(kept_ids: Tensor, kept_offsets: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each slot its row and id, and whether it counts."""
    position = torch.arange(kept_ids.shape[0], device=kept_ids.device)
    rows = kept_offsets.shape[0] - 1
    row = torch.searchsorted(kept_offsets[1:].contiguous(), position, right=True)
    ids = kept_ids.long()
    counts = (position >= kept_offsets[0]) & (row < rows) & (ids >= 0) & (ids < vocab)
    return row, ids, counts
