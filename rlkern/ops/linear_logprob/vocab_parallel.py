"""`linear_logprob` over a head whose vocabulary is cut among the ranks of a process group.

Each rank runs the op on its own rows of the head; then one all-gather of a few numbers a row, which
every rank merges in rank order into the same bits. An all-reduce would not do: sums of exponentials
need their maximum first, and the order of its additions is the library's. With lse_r, H_r and S_r
the logsumexp, entropy and sum of squared probabilities of rank r's part alone:

    logsumexp = log sum_r exp(lse_r)        shift_r = lse_r - logsumexp,  w_r = exp(shift_r)
    log-prob = rank r's own + shift_r
    entropy = sum_r w_r (H_r - shift_r)     sum_sq_prob = sum_r w_r^2 S_r

The backward is the op's own, under the merged logsumexp and entropy.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlkern.ops._logprob import Rows, Scalars, Stats

# What a rank's own op gets for a token that is ignored, and for one that another rank holds.
IGNORED, ELSEWHERE = -1, -2
NONE = float("-inf")


class Parts(NamedTuple):
    """What every rank found in its own part, first dimension the rank."""

    logprob: Tensor
    """(R, T, 1 + K): of the target, then of the ids"""
    logsumexp: Tensor
    """(R, T), and so the next three"""
    entropy: Tensor
    sum_sq_prob: Tensor
    is_top1: Tensor
    topk_values: Tensor
    """(R, T, k), and so the ids, which count from the rank's first row; -1 where there is none"""
    topk_ids: Tensor


class VocabParallel(NamedTuple):
    """Wraps the op's forward and backward, whose arguments it takes after the op itself."""

    group: dist.ProcessGroup
    need_top1: bool

    def forward(self, op: Callable, hidden: Tensor, weight: Tensor, *args) -> Stats:
        bias, rows, scalars = args[0], Rows(*args[1:5]), Scalars(*args[5:11])
        topk, how = args[11], args[12:]
        own_rows, own = self._own(rows, scalars, len(weight))
        num_top = max(topk, self.need_top1)
        own_top = min(num_top, own.vocab_size)
        stats = Stats(*op(hidden, weight, bias, *own_rows, *own, own_top, *how))
        parts = gather(stats, num_top, self.group)
        return merge(parts, rows, scalars, len(weight), topk)

    def backward(self, op: Callable, *args) -> tuple[Tensor, Tensor, Tensor]:
        grads_and_head, rows, saved = args[:7], Rows(*args[7:11]), args[11:13]
        scalars, how, needs = Scalars(*args[13:19]), args[19:21], args[21:]
        own_rows, own = self._own(rows, scalars, len(args[5]))
        partial, *of_head = op(*grads_and_head, *own_rows, *saved, *own, *how, *needs)
        if not needs[0]:
            return partial, *of_head
        total = partial.to(torch.promote_types(partial.dtype, torch.float32))
        dist.all_reduce(total, group=self.group)
        return total.to(partial.dtype), *of_head

    def _own(self, rows: Rows, scalars: Scalars, height: int) -> tuple[Rows, Scalars]:
        """The op's arguments for this rank's `height` rows of the head."""
        first = dist.get_rank(self.group) * height
        size = min(max(scalars.vocab_size - first, 0), height)

        def local(wanted: Tensor) -> Tensor:
            here = (wanted >= first) & (wanted < first + size)
            found = torch.where(here, wanted - first, ELSEWHERE)
            return torch.where(wanted == scalars.ignore_index, IGNORED, found)

        ids = None if rows.ids is None else local(rows.ids)
        return (
            rows._replace(targets=local(rows.targets), ids=ids),
            scalars._replace(ignore_index=IGNORED, vocab_size=size),
        )


def gather(stats: Stats, num_top: int, group: dist.ProcessGroup) -> Parts:
    """One collective. A part of fewer than num_top tokens is filled up with none."""
    num_ids = stats.id_logprob.shape[1]
    missing = (0, num_top - stats.topk_ids.shape[1])
    values = torch.nn.functional.pad(stats.topk_values, missing)
    ids = torch.nn.functional.pad(stats.topk_ids, missing, value=-1)
    single = (stats.logprob, stats.logsumexp, stats.entropy, stats.sum_sq_prob, stats.is_top1)
    logprob, *others = (x[:, None].to(values.dtype) for x in single)
    numbers = torch.cat([logprob, stats.id_logprob, *others, values], 1)
    # as integers of the same width: ids are exact, and a NaN keeps its bits
    bits = {4: torch.int32, 8: torch.int64}[numbers.element_size()]
    packed = torch.cat([numbers.view(bits), ids.to(bits)], 1)
    everything = packed.new_empty((dist.get_world_size(group), *packed.shape))
    # torch 2.13 renamed its form for one tensor
    dist.all_gather(list(everything), packed, group=group)
    *found, values, ids = everything.split([1 + num_ids, 1, 1, 1, 1, num_top, num_top], -1)
    logprob, *others = (x.view(numbers.dtype) for x in found)
    return Parts(logprob, *(x[..., 0] for x in others), values.view(numbers.dtype), ids.long())


def merge(parts: Parts, rows: Rows, scalars: Scalars, height: int, topk: int) -> Stats:
    """height: rows of the head that each rank holds. `sum` adds in rank order."""
    top = parts.logsumexp.amax(0)
    # while every token is masked any finite reference point gives sums of 0
    away = parts.logsumexp - torch.where(top == NONE, 0.0, top)
    log_total = sum(away.exp()).log()
    # not lse_r - logsumexp: far below zero that sum is rounded away
    shift = away - log_total
    share = shift.exp()
    entropy = sum(torch.where(share == 0, 0.0, share * (parts.entropy - shift)))
    sum_sq_prob = sum(torch.where(share == 0, 0.0, share.square() * parts.sum_sq_prob))

    wanted = rows.targets[:, None]
    if rows.ids is not None:
        wanted = torch.cat([wanted, rows.ids], 1)
    owner = (wanted // max(height, 1)).clamp(0, len(shift) - 1)
    exists = (wanted >= 0) & (wanted < scalars.vocab_size) & (wanted != scalars.ignore_index)
    nothing = torch.where(wanted == scalars.ignore_index, 0.0, float("nan"))
    value = _shifted(parts.logprob, shift).gather(0, owner[None])[0]
    logprob = torch.where(exists, value, nothing.to(value.dtype))

    values = torch.where(parts.topk_ids < 0, NONE, _shifted(parts.topk_values, shift))
    is_top1 = exists[:, 0]
    if values.shape[-1]:
        # the target is its own part's top, and no other part has a higher one
        tops, own = values[..., 0], owner[None, :, 0]
        highest = tops.gather(0, own)[0] >= tops.amax(0)
        is_top1 = is_top1 & highest & (parts.is_top1.gather(0, own)[0] == 1)
    first = height * torch.arange(len(shift), device=shift.device)[:, None, None]
    ids = torch.where(parts.topk_ids < 0, -1, parts.topk_ids + first)
    # equal ones stay in the order of ranks, and so of ids
    values, ids = (x.transpose(0, 1).flatten(1) for x in (values, ids))
    order = values.argsort(dim=1, descending=True, stable=True)[:, :topk]
    return Stats(
        logprob[:, 0].contiguous(),
        top + log_total,
        entropy,
        sum_sq_prob,
        is_top1,
        logprob[:, 1:].contiguous(),
        values.gather(1, order),
        ids.gather(1, order),
    )


def _shifted(values: Tensor, shift: Tensor) -> Tensor:
    """Log-probs of the parts as log-probs of the whole; a part that is all masked has none."""
    shift = shift[:, :, None]
    return torch.where(shift == NONE, shift, values + shift)
