"""Triton kernels of `linear_distill_loss`.

Forward: torch's matmul writes the logits of some tokens under both heads in float32; the kernel of
`logprob_from_logits` folds them into statistics, `_normalize_kernel` makes stats of those, and
`_divergence_kernel` goes over both sets of logits once more. Backward: both heads' logits again,
for some of the vocabulary at a time; `_gradient_kernel` stores their gradient, which feeds torch's
matmuls. Six matmuls in all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops import _logprob
from rlkern.ops._logprob import Rows
from rlkern.ops._triton import (
    clamped,
    exp_below,
    finite,
    inverse,
    rounded,
    softcap_slope,
)
from rlkern.ops.linear_distill_loss.op import Scalars
from rlkern.ops.linear_logprob.triton import matmul_fp32, multiply
from rlkern.ops.logprob_from_logits.triton import PARTIALS, SPLIT, fold, new_partial, processed

# Logits of both heads that exist at a time: 256 MiB.
MAX_LOGITS = 2**26
FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JSD = tl.constexpr(2)
# Rows of stats: see reference.py.
OWN = 4


@triton.jit
def _normalizer(partial, row, splits, inv, SPLITS: tl.constexpr):
    """(max, log of the sum, the sum, sum of e^d d, the target's logit) of a row's splits."""
    split = tl.arange(0, SPLITS)
    valid = split < splits
    part = partial + row * PARTIALS * splits + split
    part_top = tl.load(part, mask=valid, other=float("-inf"))
    part_total = tl.load(part + splits, mask=valid, other=0.0)
    part_dot = tl.load(part + 2 * splits, mask=valid, other=0.0)
    hit = tl.sum(tl.load(part + 4 * splits, mask=valid, other=0.0), 0)
    top = tl.max(part_top, 0)
    scale, shift = exp_below(part_top, finite(top), inv)
    total = tl.sum(scale * part_total, 0)
    dot = tl.sum(scale * (part_dot + part_total * shift), 0)
    return top, tl.log(total), total, dot, hit


@triton.jit(do_not_specialize=["splits", "rows"])
def _normalize_kernel(
    partial,
    teacher_partial,
    targets,
    row_temperature,
    logprob,
    entropy,
    stats,
    rows,
    splits,
    vocab_size,
    temperature,
    logit_scale,
    teacher_logit_scale,
    ignore_index,
    HAS_CAP: tl.constexpr,
    TEACHER_HAS_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """stats has a stride of `rows`."""
    row = tl.program_id(0).to(tl.int64)
    inv = inverse(row_temperature, row, temperature, logit_scale, HAS_CAP)
    top, log_sum, total, dot, hit = _normalizer(partial, row, splits, inv, SPLITS)
    out = stats + row
    tl.store(out, top)
    tl.store(out + rows, log_sum)
    tl.store(entropy + row, log_sum - dot / total)
    if logprob is not None:
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < vocab_size)
        value = tl.where(inside, (hit - top) * inv - log_sum, float("nan"))
        tl.store(logprob + row, tl.where(target == ignore_index, 0.0, value))
    inv = inverse(row_temperature, row, temperature, teacher_logit_scale, TEACHER_HAS_CAP)
    top, log_sum, total, dot, hit = _normalizer(teacher_partial, row, splits, inv, SPLITS)
    tl.store(out + 2 * rows, top)
    tl.store(out + 3 * rows, log_sum)


@triton.jit
def _log_probs(
    block,
    bias,
    row_temperature,
    normalizers,
    row,
    rows,
    offset,
    inside,
    first,
    stride,
    temperature,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
):
    """(log-probs, capped logits, 1 / temperature) of a row of one model's block."""
    inv = inverse(row_temperature, row, temperature, logit_scale, HAS_CAP)
    x = tl.load(block + row * stride + offset, mask=inside, other=0.0)
    y, _ = processed(
        x, bias, None, first + offset, inside, logit_scale, softcap, HAS_CAP, ROUND=False
    )
    top = tl.load(normalizers + row)
    return (y - top) * inv - tl.load(normalizers + rows + row), y, inv


@triton.jit
def _over_mixture(log_s, log_t, beta):
    """(log t - log m, log s - log m), by the ratio of the smaller to the larger: exactly 0 where
    s = t, and finite where both are 0."""
    log_s, log_t = clamped(log_s), clamped(log_t)
    gap = log_t - log_s
    down = -tl.abs(gap)
    weight = tl.where(gap > 0, 1.0 - beta, beta)
    rest = -tl.log(1.0 + weight * (tl.exp(down) - 1.0))
    return rest + tl.where(gap > 0, 0.0, down), rest + tl.where(gap > 0, down, 0.0)


@triton.jit(do_not_specialize=["splits", "rows"])
def _divergence_kernel(
    block,
    bias,
    teacher_block,
    teacher_bias,
    row_temperature,
    stats,
    terms,
    rows,
    width,
    stride,
    splits,
    beta,
    temperature,
    logit_scale,
    softcap,
    teacher_logit_scale,
    teacher_softcap,
    HAS_CAP: tl.constexpr,
    TEACHER_HAS_CAP: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """terms is (T, 2, splits): the divergence's and the student's own. The blocks begin at the
    vocabulary's first column."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * SPLIT + tl.arange(0, SPLIT)
    inside = offset < width
    log_s, _, _ = _log_probs(
        block,
        bias,
        row_temperature,
        stats,
        row,
        rows,
        offset,
        inside,
        0,
        stride,
        temperature,
        logit_scale,
        softcap,
        HAS_CAP,
    )
    log_t, _, _ = _log_probs(
        teacher_block,
        teacher_bias,
        row_temperature,
        stats + 2 * rows,
        row,
        rows,
        offset,
        inside,
        0,
        stride,
        temperature,
        teacher_logit_scale,
        teacher_softcap,
        TEACHER_HAS_CAP,
    )
    own = 0.0
    if KIND == FORWARD:
        t = tl.exp(log_t)
        value = tl.sum(tl.where(inside & (t != 0.0), t * (log_t - log_s), 0.0), 0)
    elif KIND == REVERSE:
        s = tl.exp(log_s)
        value = tl.sum(tl.where(inside & (s != 0.0), s * (log_s - log_t), 0.0), 0)
        own = value
    else:
        from_t, from_s = _over_mixture(log_s, log_t, beta)
        own_terms = tl.where(inside, tl.exp(log_s) * from_s, 0.0)
        terms_t = tl.where(inside, tl.exp(log_t) * from_t, 0.0)
        value = tl.sum(beta * terms_t + (1.0 - beta) * own_terms, 0)
        own = tl.sum(own_terms, 0)
    out = terms + row * 2 * splits + tl.program_id(1)
    tl.store(out, value)
    tl.store(out + splits, own)


@triton.jit(do_not_specialize=["rows"])
def _gradient_kernel(
    grad_divergence,
    block,
    bias,
    teacher_block,
    teacher_bias,
    row_temperature,
    stats,
    d_block,
    rows,
    first,
    width,
    stride,
    beta,
    temperature,
    logit_scale,
    softcap,
    teacher_logit_scale,
    teacher_softcap,
    HAS_CAP: tl.constexpr,
    TEACHER_HAS_CAP: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """d_block has the strides of block, and may be block."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * SPLIT + tl.arange(0, SPLIT)
    inside = offset < width
    log_s, y, inv = _log_probs(
        block,
        bias,
        row_temperature,
        stats,
        row,
        rows,
        offset,
        inside,
        first,
        stride,
        temperature,
        logit_scale,
        softcap,
        HAS_CAP,
    )
    log_t, _, _ = _log_probs(
        teacher_block,
        teacher_bias,
        row_temperature,
        stats + 2 * rows,
        row,
        rows,
        offset,
        inside,
        first,
        stride,
        temperature,
        teacher_logit_scale,
        teacher_softcap,
        TEACHER_HAS_CAP,
    )
    own = tl.load(stats + 4 * rows + row)
    s = tl.exp(log_s)
    if KIND == FORWARD:
        d = s - tl.exp(log_t)
    elif KIND == REVERSE:
        d = tl.where(s == 0.0, 0.0, s * (log_s - log_t - own))
    else:
        _, from_s = _over_mixture(log_s, log_t, beta)
        d = (1.0 - beta) * s * (from_s - own)
    g = tl.load(grad_divergence + row)
    d = d * g * inv
    if HAS_CAP:
        d = d * softcap_slope(y, logit_scale, softcap)
    d = rounded(tl.where(g == 0.0, 0.0, d), d_block.dtype.element_ty)
    tl.store(d_block + row * stride + offset, d, mask=inside)


class Model(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float


class Block(NamedTuple):
    """Some tokens' logits of some of the vocabulary; the next block overwrites them."""

    tokens: slice
    columns: slice
    student: Tensor
    teacher: Tensor


def forward(*args: object) -> tuple[Tensor, ...]:
    """args: both models' hidden, weight and bias, targets, row_temperature, *Scalars,
    ignore_index."""
    targets, row_temperature, scalars = args[6], args[7], Scalars(*args[8:15])
    student, teacher = _models(args[:6], scalars)
    hidden, vocab = student.hidden, scalars.vocab_size
    count = hidden.shape[0]

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    divergence, entropy, stats = new(count), new(count), new(5, count)
    logprob = new(0 if targets is None else count)
    # fold wants some
    wanted = hidden.new_zeros(count, dtype=torch.int64) if targets is None else targets
    for tokens, _, *logits in _blocks(student, teacher, vocab, whole=True):
        temperatures = None if row_temperature is None else row_temperature[tokens]
        rows = Rows(wanted[tokens], None, None, temperatures)
        partials = []
        for model, block in zip((student, teacher), logits):
            how = (scalars.temperature, model.logit_scale, model.softcap, args[15], vocab, False)
            partials.append(new_partial(hidden, block.shape[0], vocab))
            fold(block, 0, model.bias, rows, _logprob.Scalars(*how), partials[-1])
        splits = partials[0].shape[2]
        _normalize_kernel[(tokens.stop - tokens.start,)](
            *partials,
            rows.targets,
            temperatures,
            None if targets is None else logprob[tokens],
            entropy[tokens],
            stats[:, tokens],
            count,
            splits,
            vocab,
            scalars.temperature,
            scalars.logit_scale,
            scalars.teacher_logit_scale,
            args[15],
            HAS_CAP=scalars.softcap > 0,
            TEACHER_HAS_CAP=scalars.teacher_softcap > 0,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=1,
        )
        terms = new(tokens.stop - tokens.start, 2, splits)
        _divergence_kernel[(terms.shape[0], splits)](
            logits[0],
            student.bias,
            logits[1],
            teacher.bias,
            temperatures,
            stats[:, tokens],
            terms,
            count,
            vocab,
            logits[0].stride(0),
            splits,
            *_options(scalars),
            **_constants(scalars),
        )
        total = terms.sum(-1)
        divergence[tokens], stats[OWN, tokens] = total[:, 0], total[:, 1]
    return divergence, logprob, entropy, stats


def backward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    """args: grad_divergence, both models' hidden, weight and bias, row_temperature, stats,
    *Scalars, need_hidden, need_weight, need_bias.

    Every row takes part: to drop those without a gradient, their number would have to be known
    on the host.
    """
    upstream, row_temperature, stats = args[0], args[7], args[8]
    scalars, (need_hidden, need_weight, need_bias) = Scalars(*args[9:16]), args[16:]
    student, teacher = _models(args[1:7], scalars)
    hidden, weight = student.hidden, student.weight
    (count, depth), vocab = hidden.shape, weight.shape[0]

    def zeros(*shape: int) -> Tensor:
        return hidden.new_zeros(shape, dtype=torch.float32)

    d_hidden = zeros(count if need_hidden else 0, depth)
    # the padding of the vocabulary gets 0
    grad_weight = weight.new_zeros((vocab if need_weight else 0, depth))
    grad_bias = weight.new_zeros((vocab if need_bias else 0,))
    for tokens, columns, ours, theirs in _blocks(student, teacher, scalars.vocab_size, whole=False):
        d_logits = ours
        if hidden.dtype != torch.float32:
            d_logits = hidden.new_empty((ours.shape[0], ours.stride(0)))[:, : ours.shape[1]]
        _gradient_kernel[(ours.shape[0], triton.cdiv(ours.shape[1], SPLIT))](
            upstream[tokens],
            ours,
            student.bias,
            theirs,
            teacher.bias,
            None if row_temperature is None else row_temperature[tokens],
            stats[:, tokens],
            d_logits,
            count,
            columns.start,
            ours.shape[1],
            ours.stride(0),
            *_options(scalars),
            **_constants(scalars),
        )
        if tokens.start == 0:
            d_weight = zeros(ours.shape[1] if need_weight else 0, depth)
            d_bias = zeros(ours.shape[1] if need_bias else 0)
        if need_hidden:
            d_hidden[tokens] += matmul_fp32(d_logits, weight[columns])
        if need_weight:
            d_weight += matmul_fp32(d_logits.T, hidden[tokens])
        if need_bias:
            d_bias += d_logits.sum(0, dtype=torch.float32)
        if tokens.stop == count and need_weight:
            grad_weight[columns] = d_weight
        if tokens.stop == count and need_bias:
            grad_bias[columns] = d_bias
    return d_hidden.to(hidden.dtype), grad_weight, grad_bias


def _models(heads: tuple, scalars: Scalars) -> tuple[Model, Model]:
    return (
        Model(*heads[:3], scalars.logit_scale, scalars.softcap),
        Model(*heads[3:], scalars.teacher_logit_scale, scalars.teacher_softcap),
    )


def _options(scalars: Scalars) -> tuple[float, ...]:
    """From beta on, in the kernels' order."""
    return tuple(scalars)[:-1]


def _constants(scalars: Scalars) -> dict[str, object]:
    kind = {0.0: FORWARD, 1.0: REVERSE}.get(scalars.beta, JSD)
    return {
        "HAS_CAP": scalars.softcap > 0,
        "TEACHER_HAS_CAP": scalars.teacher_softcap > 0,
        "KIND": kind.value,
        "SPLIT": SPLIT,
        "num_warps": 8,
    }


def _blocks(student: Model, teacher: Model, vocab: int, whole: bool) -> Iterator[Block]:
    """Both heads' logits by vocabulary, then by tokens; the whole vocabulary at a time if `whole`.

    Rows begin at multiples of 16 elements, for wide loads.
    """
    hidden = student.hidden
    count, most = hidden.shape[0], MAX_LOGITS // 2
    width = triton.cdiv(vocab, 16) * 16
    if not whole:
        width = min(width, max(1, most // max(1, count) // SPLIT) * SPLIT)
    step = min(count, max(1, most // width))
    buffers = [hidden.new_empty((step, width), dtype=torch.float32) for _ in range(2)]
    for first in range(0, vocab, width):
        columns = slice(first, min(first + width, vocab))
        for begin in range(0, count, max(1, step)):
            tokens = slice(begin, min(begin + step, count))
            logits = [
                b[: tokens.stop - tokens.start, : columns.stop - columns.start] for b in buffers
            ]
            for model, out in zip((student, teacher), logits):
                multiply(model.hidden[tokens], model.weight[columns], out, batch_invariant=False)
            yield Block(tokens, columns, *logits)
