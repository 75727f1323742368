"""linear_policy_loss chunk by chunk: logits, log-probs, gradient of the loss, of the head."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlkern.ops._logprob import Rows, Scalars
from rlkern.ops.policy_loss import PolicyLossOutput, PolicyObjective, policy_loss

# Logits of a chunk: 256 MiB of float32. A larger chunk reads the weight, and adds to the sum of its
# gradient, less often.
MAX_LOGITS = 2**26


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Rows
    scalars: Scalars


class Loss(NamedTuple):
    """policy_loss but for the log-probs and entropies."""

    objective: PolicyObjective
    old_logprob: Tensor
    advantages: Tensor
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    cu_seqlens: Tensor | None
    cu_segments: Tensor | None
    normalizer: float | Tensor | None

    def __call__(self, logprob: Tensor, entropy: Tensor) -> PolicyLossOutput:
        return policy_loss(
            logprob,
            self.old_logprob,
            self.advantages,
            cu_seqlens=self.cu_seqlens,
            objective=self.objective,
            ref_logprob=self.ref_logprob,
            rollout_logprob=self.rollout_logprob,
            entropy=entropy,
            cu_segments=self.cu_segments,
            normalizer=self.normalizer,
        )

    def gradient(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """d loss / d logprob and, where the objective has such a term, d loss / d entropy."""
        wanted = [logprob.requires_grad_()]
        if self.objective.needs_entropy:
            wanted.append(entropy.requires_grad_())
        with torch.enable_grad():
            loss = self(logprob, entropy).loss
        grads = torch.autograd.grad(loss, wanted)
        for tensor in wanted:
            tensor.requires_grad_(False)
        return grads[0], grads[1] if len(grads) > 1 else None

    def whole(self) -> "Loss":
        """Such that the losses of its parts add up: with the count of all tokens or sequences."""
        if self.normalizer is not None or self.objective.loss_agg_mode == "token-sum":
            return self
        return self._replace(normalizer=max(1, self._count()))

    def part(self, tokens: slice, sequences: slice | None) -> "Loss":
        """Of a stretch of tokens; `sequences` is None where that cuts one."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[tokens]

        advantages, offsets, segments = self.advantages, self.cu_seqlens, self.cu_segments
        if sequences is None:
            advantages, offsets = self._per_token()[tokens], None
        else:
            whole = advantages.shape[0] == offsets.shape[0] - 1
            advantages = advantages[sequences if whole else tokens]
            offsets = offsets[sequences.start : sequences.stop + 1] - tokens.start
        if segments is not None:
            inside = (segments >= tokens.start) & (segments <= tokens.stop)
            segments = segments[inside] - tokens.start
        return self._replace(
            old_logprob=cut(self.old_logprob),
            advantages=advantages,
            ref_logprob=cut(self.ref_logprob),
            rollout_logprob=cut(self.rollout_logprob),
            cu_seqlens=offsets,
            cu_segments=segments,
        )

    def cuts(self) -> bool:
        """Whether a sequence may be cut: no token depends on another."""
        return self.cu_seqlens is None or not (
            self.objective.needs_sequences or self.cu_segments is not None
        )

    def _per_token(self) -> Tensor:
        if self.cu_seqlens is None or self.advantages.shape[0] != self.cu_seqlens.shape[0] - 1:
            return self.advantages
        return self.advantages.repeat_interleave(self.cu_seqlens.diff().long())

    def _count(self) -> int:
        """What the aggregation divides by, counted by policy_loss itself: the sum of a loss of 1
        a token, or of 1 / n_i a token of sequence i, with the same tokens rejected."""
        o = self.objective
        if o.loss_agg_mode != "token-mean" and o.count_empty:
            return self.cu_seqlens.shape[0] - 1
        rejection = {}
        if not o.count_rejected:
            names = ("rollout_rs", "rollout_rs_threshold", "log_ratio_clamp")
            rejection = {name: getattr(o, name) for name in names}
        mode = "token-sum" if o.loss_agg_mode == "token-mean" else "seq-mean-token-mean"
        ones = PolicyObjective(
            surrogate="reinforce", entropy_coef=1.0, loss_agg_mode=mode, **rejection
        )
        old = self.old_logprob
        counted = policy_loss(
            old,
            old,
            torch.zeros_like(old, dtype=torch.float32),
            cu_seqlens=self.cu_seqlens,
            objective=ones,
            rollout_logprob=self.rollout_logprob,
            entropy=-torch.ones_like(old),
            normalizer=None if mode == "token-sum" else 1.0,
        )
        return round(counted.loss.item())


class _Chunk(NamedTuple):
    tokens: slice
    loss: Loss
    keeps: bool  # its logits fit


def gradients(
    head: Head, loss: Loss, needs: list[bool], weight_grad: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(logprob, entropy, gradients of hidden, weight and bias, None where not needed)."""
    hidden, weight = head.hidden, head.weight
    need_hidden, need_weight, need_bias = needs
    logprob = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    entropy = torch.empty_like(logprob)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_bias = hidden.new_zeros(weight.shape[:1], dtype=torch.float32) if need_bias else None
    chunks = list(_chunks(head, loss.whole()))
    grad_weight, weight_sum = None, weight_grad if need_weight else None
    if need_weight and weight_sum is None and len(chunks) != 1:
        weight_sum = weight.new_zeros(weight.shape, dtype=torch.float32)
    for tokens, part_loss, keeps in chunks:
        bare = (hidden[tokens], weight, head.bias)
        rows = head.rows._replace(targets=head.rows.targets[tokens])
        if rows.row_temperature is not None:
            rows = rows._replace(row_temperature=rows.row_temperature[tokens])
        # no top-k, batch-invariant where that is a choice, the kernel's own chunks of vocabulary
        how = (False, 0)
        if keeps:
            stats = torch.ops.rlkern.linear_logprob_fwd_keep(*bare, *rows, *head.scalars, 0, *how)
            kept = stats[-1]
        else:
            stats = torch.ops.rlkern.linear_logprob_fwd(*bare, *rows, *head.scalars, 0, *how)
            kept = None
        logprob[tokens], entropy[tokens] = stats[0], stats[2]
        by_logprob, by_entropy = part_loss.gradient(stats[0], stats[2])
        found = torch.ops.rlkern.linear_logprob_bwd_kept(
            by_logprob,
            None,
            by_entropy,
            None,
            *bare,
            *rows,
            stats[1],
            stats[2],
            *head.scalars,
            *how,
            kept,
            weight_sum,
            need_hidden,
            need_weight,
            need_bias,
        )
        if need_hidden:
            grad_hidden[tokens] = found[0]
        if need_weight and weight_sum is None:
            grad_weight = found[1]
        if need_bias:
            grad_bias += found[2]
    if weight_sum is not None and weight_grad is None:
        grad_weight = weight_sum.to(weight.dtype)
    if need_bias:
        grad_bias = grad_bias.to(hidden.dtype)
    return logprob, entropy, [grad_hidden, grad_weight, grad_bias]


def _chunks(head: Head, loss: Loss) -> Iterator[_Chunk]:
    """Whole sequences while they fit; longer ones alone, cut where the loss allows it."""
    count = head.hidden.shape[0]
    fits = max(1, MAX_LOGITS // max(1, head.scalars.vocab_size))
    if loss.cuts():
        for begin in range(0, count, fits):
            tokens = slice(begin, min(count, begin + fits))
            yield _Chunk(tokens, loss.part(tokens, None), True)
        return
    offsets = loss.cu_seqlens.tolist()
    first = 0
    while first < len(offsets) - 1:
        last = first + 1
        while last < len(offsets) - 1 and offsets[last + 1] - offsets[first] <= fits:
            last += 1
        tokens = slice(offsets[first], offsets[last])
        length = tokens.stop - tokens.start
        if length:
            yield _Chunk(tokens, loss.part(tokens, slice(first, last)), length <= fits)
        first = last
