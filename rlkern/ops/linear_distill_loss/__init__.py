"""Divergence of a student from a teacher, straight from hidden states or cached log-probs."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops.linear_distill_loss.op import LinearDistillLoss, Scalars
from rlkern.ops.linear_distill_loss.topk import TAILS, topk_divergence
from rlkern.ops.linear_logprob import linear_logprob

_OP = "linear_distill_loss"
# the ops' beta
_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class LinearDistillLossOutput(NamedTuple):
    """(T,) float32 each."""

    divergence: Tensor
    """differentiable with respect to the student's hidden, weight and bias"""
    logprob: Tensor | None
    """the student's, of the targets; None where none were given. Without a gradient"""
    entropy: Tensor
    """the student's; without a gradient"""


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_logprobs: Tensor | None = None,
    tail: str = "bucket",
    targets: Tensor | None = None,
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> LinearDistillLossOutput:
    """Divergence, token by token, between a student's next-token distribution and a teacher's.

    With s = softmax of the student's logits / temperature and t = that of the teacher's:

        forward_kl   sum_j t_j log(t_j / s_j)
        reverse_kl   sum_j s_j log(s_j / t_j)
        jsd          beta KL(t || m) + (1 - beta) KL(s || m),  m = (1 - beta) s + beta t

    times token_weight, for the caller to reduce. Equivalent torch program of the first, which holds
    several (T, V) float32 tensors where this holds logits of some tokens (2^26, 256 MiB)::

        log_s = ((hidden.float() @ weight.float().T) / temperature).log_softmax(-1)
        log_t = ((teacher_hidden.float() @ teacher_weight.float().T) / temperature).log_softmax(-1)
        divergence = (log_t.exp() * (log_t - log_s)).sum(-1)

    Logits are float32, never rounded to 16 bits. The forward takes two matmuls, the backward four:
    both logits again, and the gradients of hidden and weight. Tokens whose upstream gradient is 0
    drop out of the backward (on CPU).

    Args:
        hidden: (T, H) float32, bfloat16 or float16: the student's. float64 is computed by the
            reference.
        weight: (V, H) in the same dtype: its LM head.
        teacher_hidden, teacher_weight: (T, H') and (V, H'), in the dtype of hidden; no gradient.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd", between 0 and 1: the weight of the teacher. As in TRL and Liger, and SDPO's
            alpha, beta -> 0 is the forward KL up to a factor, beta -> 1 the reverse.
        teacher_topk_ids, teacher_topk_logprobs: (T, K), instead of the teacher's hidden states and
            head: tokens and the teacher's log-probs of them, at its own temperature. The sums
            above run over the K tokens, and what is outside is up to `tail`. Slots with a log-prob
            of -inf do not count. The ids of a row differ. Four matmuls in all.
        tail: "bucket": the other tokens are one more event, of both (SDPO, TRL); "renormalize": s
            and t are divided by their sums over the K tokens (NeMo-RL, TRL); "drop": neither, which
            may be negative (verl).
        targets: (T,) int64 or int32, for logprob.
        token_weight: (T,), bool or floating point: a mask, or importance ratios. A constant factor
            of the divergence, which is exactly 0 where it is 0; such a token drops out of the
            backward (on CPU).
        bias, teacher_bias: (V,) in the same dtype.
        temperature: one for all tokens, or (T,). The divergence is not multiplied by its square.
        softcap, logit_scale: as in `logprob_from_logits`, of the student.
        teacher_softcap, teacher_logit_scale: the teacher's; None: the student's. A softcap of 0 is
            none.
        vocab_size: tokens that exist; rows of either head beyond are padding and are not read. The
            heads may then differ in length.
        ignore_index: targets equal to this have logprob 0.

    Returns:
        LinearDistillLossOutput(divergence, logprob, entropy).

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Two runs give the same bits. A teacher that is the student itself has divergence and gradient
    exactly 0. On CPU a row's result does not depend on the other rows, nor on the number of
    threads.
    """
    _logprob.check_head(_OP, hidden, weight, bias)
    _check.one_of(_OP, "divergence", divergence, DIVERGENCES)
    if divergence == "jsd":
        _check.positive(_OP, "beta", beta)
        if not beta < 1:
            _check.fail(_OP, "beta", "between 0 and 1", beta)
    kind = _BETA.get(divergence, float(beta))
    if targets is not None:
        _logprob.check_rows(_OP, hidden, "hidden", targets)
    if token_weight is not None:
        _check.tensor(_OP, "token_weight", token_weight)
        _check.dtype(_OP, "token_weight", token_weight, (*_check.FLOATS, torch.bool))
        _check.shape(_OP, "token_weight", token_weight, hidden.shape[:1], "(T,)")
        _check.same_device(_OP, "token_weight", token_weight, "hidden", hidden.device)
    whole, part = (teacher_hidden, teacher_weight), (teacher_topk_ids, teacher_topk_logprobs)
    given = [all(x is not None for x in pair) for pair in (whole, part)]
    stray = [any(x is not None for x in pair) for pair in (whole, part)]
    if given != stray or given[0] == given[1]:
        names = "teacher_hidden and teacher_weight, or teacher_topk_ids and teacher_topk_logprobs"
        raise ValueError(f"{_OP}: expected either {names}, and not both")
    if given[1]:
        for name, value in (
            ("teacher_bias", teacher_bias),
            ("teacher_softcap", teacher_softcap),
            ("teacher_logit_scale", teacher_logit_scale),
        ):
            if value is not None:
                _check.fail(_OP, name, "to be None beside teacher_topk_logprobs", value)
        _check.one_of(_OP, "tail", tail, TAILS)
        ids, log_t = _checked_topk(hidden, *part)
        student = linear_logprob(
            hidden,
            weight,
            torch.full_like(ids[:, 0], ignore_index) if targets is None else targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
            ids=torch.where(log_t == float("-inf"), ignore_index, ids),
            outputs=("logprob", "entropy"),
            ignore_index=ignore_index,
        )
        return LinearDistillLossOutput(
            _weighted(topk_divergence(student.id_logprob, log_t, kind, tail), token_weight),
            None if targets is None else student.logprob.detach(),
            student.entropy.detach(),
        )
    _logprob.check_head(_OP, *whole, teacher_bias, "teacher_")
    _check.dtype(_OP, "teacher_hidden", teacher_hidden, (hidden.dtype,))
    _check.same_device(_OP, "teacher_hidden", teacher_hidden, "hidden", hidden.device)
    depth = teacher_hidden.shape[1]
    _check.shape(_OP, "teacher_hidden", teacher_hidden, (hidden.shape[0], depth), "(T, H')")
    if vocab_size is None:
        _check.shape(_OP, "teacher_weight", teacher_weight, (weight.shape[0], depth), "(V, H')")
    size = _logprob.check_vocab_size(_OP, vocab_size, min(weight.shape[0], teacher_weight.shape[0]))
    row_temperature, scalar = _logprob.split_temperature(_OP, temperature, hidden, "hidden")
    *own, _ = _logprob.scalars_of(_OP, scalar, logit_scale, softcap, ignore_index)
    teacher_scale, teacher_cap = own[1:]
    if teacher_logit_scale is not None:
        _check.positive(_OP, "teacher_logit_scale", teacher_logit_scale)
        teacher_scale = float(teacher_logit_scale)
    if teacher_softcap is not None:
        if teacher_softcap != 0:
            _check.positive(_OP, "teacher_softcap", teacher_softcap)
        teacher_cap = float(teacher_softcap)
    teacher = (*whole, teacher_bias)
    outputs = LinearDistillLoss.apply(
        *_plain(hidden, weight, bias),
        *_plain(*(None if x is None else x.detach() for x in teacher)),
        None if targets is None else targets.long().contiguous(),
        row_temperature,
        Scalars(kind, *own, teacher_scale, teacher_cap, size),
        int(ignore_index),
    )
    found, logprob, entropy = outputs
    found = _weighted(found, token_weight)
    return LinearDistillLossOutput(found, None if targets is None else logprob, entropy)


def _weighted(divergence: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return divergence
    weight = weight.detach().to(divergence.dtype)
    return torch.where(weight == 0, 0.0, weight * divergence)


def _checked_topk(hidden: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(ids in int64, log-probs in float32, or float64 with float64 hidden states)."""
    rows = hidden.shape[0]
    _check.tensor(_OP, "teacher_topk_ids", ids)
    _check.dtype(_OP, "teacher_topk_ids", ids, _check.INTEGERS)
    _check.ndim(_OP, "teacher_topk_ids", ids, "(T, K)")
    if ids.shape[1] == 0:
        _check.fail(_OP, "teacher_topk_ids", "of at least one token a row", tuple(ids.shape))
    _check.shape(_OP, "teacher_topk_ids", ids, (rows, ids.shape[1]), "(T, K)")
    _check.tensor(_OP, "teacher_topk_logprobs", logprobs)
    _check.dtype(_OP, "teacher_topk_logprobs", logprobs, _check.FLOATS)
    _check.shape(_OP, "teacher_topk_logprobs", logprobs, ids.shape, "(T, K)")
    for name, value in (("teacher_topk_ids", ids), ("teacher_topk_logprobs", logprobs)):
        _check.same_device(_OP, name, value, "hidden", hidden.device)
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return ids.long(), logprobs.detach().to(kind)


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """With contiguous rows, as the kernels read them."""
    return (
        hidden if hidden.stride(-1) == 1 else hidden.contiguous(),
        weight if weight.stride(-1) == 1 else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )
