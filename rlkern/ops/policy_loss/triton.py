"""Triton kernels of `policy_loss`: statistics of sequences where needed, tokens in blocks, sums.

No atomics: blocks of a fixed size write partial sums, which the last kernel adds in order. What
each computes stands in reference.py; the surrogates in triton_surrogates.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops.policy_loss.triton_surrogates import (
    BANDED,
    CLIP,
    GAMMA_WEIGHT,
    GEOMETRIC,
    QUADRATIC,
    bounded,
    surrogate,
)

BLOCK = 1024
# A program walks a whole sequence: long blocks, so that 128 k tokens take 64 steps.
SEQUENCE_BLOCK = 2048
# Partial sums of one block of tokens, padded to a power of two.
COLUMNS = tl.constexpr(16)
(
    LOSS,
    TOKENS,
    LOW,
    HIGH,
    CAPPED,
    OLD_KL,
    RATIO,
    KL,
    ENTROPY,
    WEIGHT,
    WEIGHT_SQUARE,
    PRESENT,
    RATIO_VARIANCE,
    LEAST,
    MOST,
) = (tl.constexpr(i) for i in range(15))
NUM_METRICS = 15
MERGE_ROWS = 64
# Numbers of one sequence.
STATISTIC, CORRECTION, DRIFTED, KL_MEAN = (tl.constexpr(i) for i in range(4))
NUM_STATS = tl.constexpr(4)

BY_TOKENS, BY_FILLED, BY_ALL = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
BY_SEQUENCE, BY_PRODUCT, BY_MIN, BY_MEAN, BY_MIN_CAPPED = (tl.constexpr(i) for i in range(1, 6))
OF_TOKEN, OF_SEQUENCE, GEOMETRIC_MEAN = (tl.constexpr(i) for i in range(1, 4))
MEAN, MAX = tl.constexpr(2), tl.constexpr(3)
K1, K2, K3, ABS, K1_PLUS, K3_PLUS = (tl.constexpr(i) for i in range(6))


class Kinds(NamedTuple):
    """The schema's `kinds`, in its order."""

    surrogate: int
    level: int
    from_rollout: int
    correction: int
    correction_masks: int
    token_rejection: int
    sequence_rejection: int
    rejection_reduction: int
    count_rejected: int
    kl_type: int
    kl_times_ratio: int
    denominator: int
    divide_by_length: int


class Numbers(NamedTuple):
    """The schema's `numbers`, in its order."""

    p0: float
    p1: float
    p2: float
    p3: float
    p4: float
    p5: float
    log_ratio_clamp: float
    correction_low: float
    correction_high: float
    token_rejection_low: float
    token_rejection_high: float
    sequence_rejection_low: float
    sequence_rejection_high: float
    off_policy_limit: float
    kl_coef: float
    kl_input_clamp: float
    kl_output_clamp: float
    entropy_coef: float
    entropy_low: float
    entropy_high: float
    entropy_low_coef: float
    entropy_high_coef: float
    entropy_from: float
    nll_coef: float
    scale: float


@triton.jit
def _start(cu_seqlens, i, row_length, num_tokens):
    """Where sequence i begins, in [0, T] whatever cu_seqlens holds."""
    if cu_seqlens is not None:
        at = tl.load(cu_seqlens + i).to(tl.int64)
        at = tl.minimum(tl.maximum(at, 0), num_tokens)
    else:
        at = i.to(tl.int64) * row_length
    return at


@triton.jit
def _exp_minus_linear(x):
    """exp(x) - 1 - x; near 0, where that cancels, the series of exp from x^2 on."""
    p = x * 1.9875691500e-4 + 1.3981999507e-3
    p = p * x + 8.3334519073e-3
    p = p * x + 4.1665795894e-2
    p = p * x + 1.6666665459e-1
    p = p * x + 5.0000001201e-1
    return tl.where(x * x < 0.1156, p * x * x, tl.exp(x) - 1.0 - x)


@triton.jit
def _kl(delta, input_clamp, output_clamp, KL_TYPE: tl.constexpr):
    """Estimate and derivative, 0 beyond a clamp: csrc/include/rlkern/math/policy_kl.h."""
    whole = delta
    outside = (delta > input_clamp) | (delta < -input_clamp)
    delta = bounded(delta, -input_clamp, input_clamp)
    value = delta
    grad = tl.full(delta.shape, 1.0, tl.float32)
    if KL_TYPE == K2:
        value = 0.5 * delta * delta
        grad = delta
    elif KL_TYPE == ABS:
        value = tl.abs(delta)
        grad = tl.where(delta > 0, 1.0, 0.0) - tl.where(delta < 0, 1.0, 0.0)
    elif (KL_TYPE == K3) | (KL_TYPE == K3_PLUS):
        value = _exp_minus_linear(-delta)
        grad = delta - value
    outside = outside | (value > output_clamp) | (value < -output_clamp)
    grad = tl.where(outside, 0.0, grad)
    if (KL_TYPE == K1_PLUS) | (KL_TYPE == K3_PLUS):
        grad = whole
    return bounded(value, -output_clamp, output_clamp), grad


@triton.jit
def _correction(d, low, high, clamp, MASKS: tl.constexpr):
    w = tl.exp(bounded(d, -clamp, clamp))
    if MASKS:
        return tl.where((w < low) | (w > high), 0.0, w)
    return bounded(w, low, high)


@triton.jit
def _rejection(d, clamp, METRIC: tl.constexpr):
    """k1, k2 or k3 of d = old_logprob - rollout_logprob."""
    d = bounded(d, -clamp, clamp)
    if METRIC == 1:
        return -d
    if METRIC == 2:
        return 0.5 * d * d
    return _exp_minus_linear(d)


@triton.jit
def _least(a, b):
    return tl.where((b < a) | (b != b), b, a)


@triton.jit
def _sequence_kernel(
    logprob,
    anchor,
    old_logprob,
    advantages,
    cu_seqlens,
    mask,
    rollout_logprob,
    ref_logprob,
    lengths,
    stats,
    prefixes,
    row_length,
    num_tokens,
    p0,
    p1,
    log_ratio_clamp,
    correction_low,
    correction_high,
    token_rejection_low,
    token_rejection_high,
    sequence_rejection_low,
    sequence_rejection_high,
    off_policy_limit,
    kl_input_clamp,
    kl_output_clamp,
    PER_TOKEN: tl.constexpr,
    SURROGATE: tl.constexpr,
    LEVEL: tl.constexpr,
    CORRECTION_KIND: tl.constexpr,
    CORRECTION_MASKS: tl.constexpr,
    TOKEN_REJECTION: tl.constexpr,
    SEQUENCE_REJECTION: tl.constexpr,
    REDUCTION: tl.constexpr,
    READS_ROLLOUT: tl.constexpr,
    KL_TYPE: tl.constexpr,
    COUPLES_KL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of one sequence: the tokens that count and that are kept, and its statistics; of each of
    its tokens the statistic of the prefix."""
    i = tl.program_id(0)
    begin = _start(cu_seqlens, i, row_length, num_tokens)
    end = _start(cu_seqlens, i + 1, row_length, num_tokens)
    if not WIDE:
        begin, end = begin.to(tl.int32), end.to(tl.int32)
    number = tl.zeros((BLOCK_T,), tl.int32)
    kept = tl.zeros((BLOCK_T,), tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    mismatch = tl.zeros((BLOCK_T,), tl.float32)
    drift = tl.zeros((BLOCK_T,), tl.float32)
    rejection = tl.zeros((BLOCK_T,), tl.float32)
    kl_total = tl.zeros((BLOCK_T,), tl.float32)
    most = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    # of the prefix: the least x, or the sum of x and the number of tokens
    carry = tl.full((1,), 0.0 if LEVEL == BY_MIN_CAPPED else float("inf"), tl.float32)
    carry_sum = tl.zeros((1,), tl.float64)
    carry_count = tl.zeros((1,), tl.int32)
    for base in range(begin, end, BLOCK_T):
        position = base + tl.arange(0, BLOCK_T)
        counts = position < end
        if mask is not None:
            counts = counts & (tl.load(mask + position, mask=counts, other=0) != 0)
        keeps = counts
        number += counts.to(tl.int32)
        live = tl.load(logprob + position, mask=counts, other=0.0)
        if READS_ROLLOUT:
            rollout = tl.load(rollout_logprob + position, mask=counts, other=0.0)
            d = tl.load(old_logprob + position, mask=counts, other=0.0) - rollout
            mismatch += d
            drift += rollout - live
            if SEQUENCE_REJECTION != 0:
                value = _rejection(d, log_ratio_clamp, SEQUENCE_REJECTION)
                rejection += value
                most = tl.where(counts & (value > most), value, most)
            if TOKEN_REJECTION != 0:
                value = _rejection(d, log_ratio_clamp, TOKEN_REJECTION)
                out = (value < token_rejection_low) | (value > token_rejection_high)
                keeps = keeps & (out == 0)
        kept += keeps.to(tl.int32)
        if COUPLES_KL:
            delta = live - tl.load(ref_logprob + position, mask=counts, other=0.0)
            kl, _ = _kl(delta, kl_input_clamp, kl_output_clamp, KL_TYPE)
            kl_total += tl.where(keeps, kl, 0.0)
        if LEVEL != 0:
            x = live - tl.load(anchor + position, mask=counts, other=0.0)
            if SURROGATE == GAMMA_WEIGHT:
                x = bounded(x, -log_ratio_clamp, log_ratio_clamp)
            if SURROGATE == GEOMETRIC:
                if PER_TOKEN:
                    a = tl.load(advantages + position, mask=counts, other=0.0)
                else:
                    a = tl.load(advantages + i) + tl.zeros((BLOCK_T,), tl.float32)
                x = tl.where((a > 0) & (x > p1), p1, tl.where((a < 0) & (x < p0), p0, x))
                x = tl.where(a == 0, 0.0, x)
            if (LEVEL == BY_MIN) | (LEVEL == BY_MIN_CAPPED):
                # what stands before a token: the scan of x moved by one
                earlier = (position > base) & (position <= end)
                if mask is not None:
                    seen = tl.load(mask + position - 1, mask=earlier, other=0) != 0
                    earlier = earlier & seen
                before = tl.load(logprob + position - 1, mask=earlier, other=0.0)
                before = before - tl.load(anchor + position - 1, mask=earlier, other=0.0)
                before = tl.where(earlier, before, float("inf"))
                scanned = _least(carry, tl.associative_scan(before, 0, _least))
                value = tl.where(scanned == float("inf"), x, x + scanned)
                tl.store(prefixes + position, value, mask=counts)
                smallest = tl.min(tl.where(counts, x, float("inf")), 0)
                lost = tl.max((x != x).to(tl.int32), 0) > 0
                smallest = tl.where(lost, float("nan"), smallest)
                carry = _least(carry, tl.zeros((1,), tl.float32) + smallest)
            elif LEVEL == BY_MEAN:
                so_far = carry_sum + tl.cumsum(x.to(tl.float64), 0)
                count = carry_count + tl.cumsum(counts.to(tl.int32), 0)
                value = so_far / tl.maximum(count, 1).to(tl.float64)
                tl.store(prefixes + position, value.to(tl.float32), mask=counts)
                carry_sum += tl.sum(x.to(tl.float64), 0)
                carry_count += tl.sum(counts.to(tl.int32), 0)
            else:
                total += x
    length = tl.sum(number, 0)
    keep = tl.sum(kept, 0)
    count = tl.maximum(length, 1).to(tl.float32)
    if SEQUENCE_REJECTION != 0:
        value = tl.sum(rejection, 0)
        if REDUCTION == MEAN:
            value = value / count
        if REDUCTION == MAX:
            value = tl.max(most, 0)
        out = (value < sequence_rejection_low) | (value > sequence_rejection_high)
        keep = tl.where(out, 0, keep)
    tl.store(lengths + 2 * i, length)
    tl.store(lengths + 2 * i + 1, keep)
    out = stats + i.to(tl.int64) * NUM_STATS
    statistic = tl.sum(total, 0)
    if LEVEL == BY_SEQUENCE:
        statistic = statistic / count
    tl.store(out + STATISTIC, statistic)
    if (CORRECTION_KIND == OF_SEQUENCE) | (CORRECTION_KIND == GEOMETRIC_MEAN):
        d = tl.sum(mismatch, 0)
        if CORRECTION_KIND == GEOMETRIC_MEAN:
            d = d / count
        weight = _correction(d, correction_low, correction_high, log_ratio_clamp, CORRECTION_MASKS)
        tl.store(out + CORRECTION, weight)
    tl.store(out + DRIFTED, (tl.sum(drift, 0) / count > off_policy_limit).to(tl.float32))
    tl.store(out + KL_MEAN, tl.sum(kl_total, 0) / count)


@triton.jit
def _divisor(
    lengths,
    cu_seqlens,
    row_length,
    num_tokens,
    num_sequences,
    COLUMN: tl.constexpr,
    DENOMINATOR: tl.constexpr,
):
    """What the weighted losses are divided by: every program counts for itself, S reads from L2."""
    if DENOMINATOR == BY_ALL:
        return tl.maximum(num_sequences, 1).to(tl.float32)
    total = tl.zeros((256,), tl.int64)
    for base in range(0, num_sequences, 256):
        i = base + tl.arange(0, 256)
        present = i < num_sequences
        if lengths is not None:
            length = tl.load(lengths + 2 * i + COLUMN, mask=present, other=0).to(tl.int64)
        elif cu_seqlens is not None:
            begin = tl.load(cu_seqlens + i, mask=present, other=0).to(tl.int64)
            end = tl.load(cu_seqlens + i + 1, mask=present, other=0).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), num_tokens)
            length = tl.maximum(tl.minimum(tl.maximum(end, 0), num_tokens) - begin, 0)
        else:
            length = tl.where(present, row_length, 0).to(tl.int64)
        if DENOMINATOR == BY_TOKENS:
            total += length
        else:
            total += (length > 0).to(tl.int64)
    return tl.maximum(tl.sum(total, 0), 1).to(tl.float32)


@triton.jit
def _find(offsets, position, num, STEPS: tl.constexpr):
    """The last sequence that begins at or before the token."""
    found = tl.zeros(position.shape, position.dtype)
    beyond = found + num
    for _ in range(STEPS):
        middle = (found + beyond) // 2
        starts_before = tl.load(offsets + middle).to(tl.int64) <= position
        found = tl.where(starts_before, middle, found)
        beyond = tl.where(starts_before, beyond, middle)
    return found


@triton.jit
def _token_kernel(
    logprob,
    anchor,
    old_logprob,
    advantages,
    cu_seqlens,
    mask,
    rollout_logprob,
    ref_logprob,
    entropy,
    nll_weight,
    cu_segments,
    lengths,
    stats,
    segment_stats,
    prefixes,
    grad,
    grad_entropy,
    partials,
    num_tokens,
    num_sequences,
    num_segments,
    row_length,
    p0,
    p1,
    p2,
    p3,
    p4,
    p5,
    log_ratio_clamp,
    correction_low,
    correction_high,
    token_rejection_low,
    token_rejection_high,
    kl_coef,
    kl_input_clamp,
    kl_output_clamp,
    entropy_coef,
    entropy_low,
    entropy_high,
    entropy_low_coef,
    entropy_high_coef,
    entropy_from,
    nll_coef,
    scale,
    PER_TOKEN: tl.constexpr,
    SURROGATE: tl.constexpr,
    LEVEL: tl.constexpr,
    FROM_ROLLOUT: tl.constexpr,
    CORRECTION_KIND: tl.constexpr,
    CORRECTION_MASKS: tl.constexpr,
    LIMITS_DRIFT: tl.constexpr,
    TOKEN_REJECTION: tl.constexpr,
    SEQUENCE_REJECTION: tl.constexpr,
    COUNT_REJECTED: tl.constexpr,
    KL_TYPE: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    HAS_KL_LOSS: tl.constexpr,
    HAS_ENTROPY_LOSS: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    DIVIDE_BY_LENGTH: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    SEGMENT_STEPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    position = block * BLOCK_T + tl.arange(0, BLOCK_T)
    if not WIDE:
        # an index of 64 bits takes two registers
        position = position.to(tl.int32)
    in_range = position < num_tokens
    counts = in_range
    if mask is not None:
        counts = counts & (tl.load(mask + position, mask=in_range, other=0) != 0)

    length = tl.zeros((BLOCK_T,), position.dtype) + row_length
    if cu_seqlens is not None:
        sequence = _find(cu_seqlens, position, num_sequences, SEARCH_STEPS)
        begin = _start(cu_seqlens, sequence, row_length, num_tokens).to(position.dtype)
        end = _start(cu_seqlens, sequence + 1, row_length, num_tokens).to(position.dtype)
        # tokens before the first sequence or after the last do not count
        counts = counts & (position >= begin) & (position < end)
        length = end - begin
    else:
        # a division of 64 bits is a call, and costs registers
        sequence = tl.where(in_range, position // row_length, 0)
    if cu_segments is not None:
        segment = _find(cu_segments, position, num_segments, SEGMENT_STEPS)
        of_segment = tl.load(segment_stats + segment * NUM_STATS, mask=counts, other=0.0)
    all_tokens = length
    which: tl.constexpr = 0 if COUNT_REJECTED else 1
    tl.store(partials + block * COLUMNS + PRESENT, tl.sum(counts.to(tl.float32), 0))
    if lengths is not None:
        all_tokens = tl.load(lengths + 2 * sequence, mask=counts, other=1).to(position.dtype)
        length = tl.load(lengths + 2 * sequence + which, mask=counts, other=1).to(position.dtype)
        if SEQUENCE_REJECTION != 0:
            kept = tl.load(lengths + 2 * sequence + 1, mask=counts, other=0)
            counts = counts & (kept > 0)

    # masked slots may hold NaN or inf: they are not read
    live = tl.load(logprob + position, mask=counts, other=0.0)
    before = tl.load(old_logprob + position, mask=counts, other=0.0)
    old = before
    if FROM_ROLLOUT:
        old = tl.load(anchor + position, mask=counts, other=0.0)
    weight_of_token = tl.full((BLOCK_T,), 1.0, tl.float32)
    if rollout_logprob is not None:
        d = before - tl.load(rollout_logprob + position, mask=counts, other=0.0)
        if TOKEN_REJECTION != 0:
            value = _rejection(d, log_ratio_clamp, TOKEN_REJECTION)
            out = (value < token_rejection_low) | (value > token_rejection_high)
            counts = counts & (out == 0)
        if CORRECTION_KIND == OF_TOKEN:
            weight_of_token = _correction(
                d, correction_low, correction_high, log_ratio_clamp, CORRECTION_MASKS
            )
        elif CORRECTION_KIND != 0:
            weight_of_token = tl.load(
                stats + sequence * NUM_STATS + CORRECTION, mask=counts, other=1.0
            )

    if DENOMINATOR != 0:
        scale = scale / _divisor(
            lengths, cu_seqlens, row_length, num_tokens, num_sequences, which, DENOMINATOR
        )
    weight = tl.full((BLOCK_T,), 0.0, tl.float32) + scale
    if DIVIDE_BY_LENGTH:
        weight = weight / tl.maximum(length, 1).to(tl.float32)
    weight = tl.where(counts, weight, 0.0)

    if PER_TOKEN:
        advantage = tl.load(advantages + position, mask=counts, other=0.0)
    else:
        advantage = tl.load(advantages + sequence, mask=counts, other=0.0)
    if LIMITS_DRIFT:
        drifted = tl.load(stats + sequence * NUM_STATS + DRIFTED, mask=counts, other=0.0)
        weight_of_token = tl.where((advantage < 0) & (drifted > 0), 0.0, weight_of_token)
    x = live - old
    z = x
    if LEVEL >= BY_MIN:
        z = tl.load(prefixes + position, mask=counts, other=0.0)
    elif cu_segments is not None:
        z = tl.where(counts, of_segment, 0.0)
    elif LEVEL != 0:
        z = tl.load(stats + sequence * NUM_STATS, mask=counts, other=0.0)
    outside = (z > log_ratio_clamp) | (z < -log_ratio_clamp)
    z = bounded(z, -log_ratio_clamp, log_ratio_clamp)
    r = tl.exp(z)
    decided = bounded(live - before, -log_ratio_clamp, log_ratio_clamp)
    # each sum as soon as it can be: what it needs is then out of the registers
    out = partials + block * COLUMNS
    tl.store(out + TOKENS, tl.sum(counts.to(tl.float32), 0))
    tl.store(out + OLD_KL, -tl.sum(tl.where(counts, decided, 0.0), 0))
    tl.store(out + RATIO, tl.sum(tl.where(counts, r, 0.0), 0))
    variance = 0.0
    if SURROGATE == QUADRATIC:
        variance = tl.sum(tl.where(counts, (r - 1.0) * (r - 1.0), 0.0), 0)
    tl.store(out + RATIO_VARIANCE, variance)
    tl.store(out + LEAST, tl.min(tl.where(counts, r, float("inf")), 0))
    tl.store(out + MOST, tl.max(tl.where(counts, r, float("-inf")), 0))
    loss, d_logprob, low, high, capped = surrogate(
        live,
        old,
        advantage,
        x,
        decided,
        z,
        r,
        outside,
        all_tokens.to(tl.float32),
        p0,
        p1,
        p2,
        p3,
        p4,
        p5,
        SURROGATE,
    )
    tl.store(out + LOW, tl.sum((low & counts).to(tl.float32), 0))
    tl.store(out + HIGH, tl.sum((high & counts).to(tl.float32), 0))
    tl.store(out + CAPPED, tl.sum((capped & counts).to(tl.float32), 0))
    if (LEVEL == BY_PRODUCT) & ((SURROGATE == CLIP) | (SURROGATE == BANDED)):
        # every token carries the loss of its sequence, and each of the n moves all of them
        d_logprob = d_logprob * all_tokens.to(tl.float32)
    if (CORRECTION_KIND != 0) | LIMITS_DRIFT:
        loss = tl.where(weight_of_token == 0, 0.0, weight_of_token * loss)
        d_logprob = tl.where(weight_of_token == 0, 0.0, weight_of_token * d_logprob)

    weight_of_token = tl.where(counts, weight_of_token, 0.0)
    tl.store(out + WEIGHT, tl.sum(weight_of_token, 0))
    tl.store(out + WEIGHT_SQUARE, tl.sum(weight_of_token * weight_of_token, 0))
    if ref_logprob is not None:
        delta = live - tl.load(ref_logprob + position, mask=counts, other=0.0)
        kl, d_kl = _kl(delta, kl_input_clamp, kl_output_clamp, KL_TYPE)
        if KL_TIMES_RATIO:
            mean = kl
            if LEVEL == BY_SEQUENCE:
                # through the ratio every token of the sequence moves the KL of all others
                mean = tl.load(stats + sequence * NUM_STATS + KL_MEAN, mask=counts, other=0.0)
            d_kl = r * (d_kl + tl.where(outside, 0.0, mean))
            kl = kl * r
        tl.store(out + KL, tl.sum(tl.where(counts, kl, 0.0), 0))
        if HAS_KL_LOSS:
            loss += kl_coef * kl
            d_logprob += kl_coef * d_kl
    else:
        tl.store(out + KL, 0.0)
    if nll_weight is not None:
        chosen = nll_coef * tl.load(nll_weight + position, mask=counts, other=0.0)
        loss -= tl.where(chosen == 0, 0.0, chosen * live)
        d_logprob -= chosen
    d_entropy = tl.zeros((BLOCK_T,), tl.float32)
    if entropy is not None:
        h = tl.load(entropy + position, mask=counts, other=0.0)
        tl.store(out + ENTROPY, tl.sum(h, 0))
        if HAS_ENTROPY_LOSS:
            under, over = entropy_low - h, h - entropy_high
            band = entropy_low_coef * tl.where(under < 0, 0.0, under)
            band += entropy_high_coef * tl.where(over < 0, 0.0, over)
            slope = tl.where(over > 0, entropy_high_coef, 0.0)
            slope -= tl.where(under > 0, entropy_low_coef, 0.0)
            free = h < entropy_from
            loss += tl.where(free, 0.0, band) - entropy_coef * h
            d_entropy = tl.where(free, 0.0, slope) - entropy_coef
    else:
        tl.store(out + ENTROPY, 0.0)
    if grad is not None:
        tl.store(grad + position, tl.where(counts, weight * d_logprob, 0.0), mask=in_range)
    if grad_entropy is not None:
        tl.store(grad_entropy + position, weight * d_entropy, mask=in_range)

    tl.store(out + LOSS, tl.sum(tl.where(counts, weight * loss, 0.0), 0))


@triton.jit
def _column(values, column, k: tl.constexpr):
    return tl.sum(tl.where(column == k, values, 0.0), 0)


@triton.jit
def _merge_kernel(partials, loss, metrics, num_blocks, ROWS: tl.constexpr):
    """The sums of all blocks, in double, in the order of the blocks; then the means."""
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float64)
    least = tl.full((COLUMNS,), float("inf"), tl.float32)
    most = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for base in range(0, num_blocks, ROWS):
        row = base + tl.arange(0, ROWS)[:, None].to(tl.int64)
        here = (row < num_blocks) & (column[None, :] <= MOST)
        tile = tl.load(partials + row * COLUMNS + column[None, :], mask=here, other=0.0)
        total += tl.sum(tile.to(tl.float64), 0)
        least = tl.minimum(least, tl.min(tl.where(here, tile, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(here, tile, float("-inf")), 0))
    tl.store(loss, _column(total, column, LOSS).to(tl.float32))
    tokens = _column(total, column, TOKENS)
    share = tl.where(tokens > 0, 1.0 / tl.maximum(tokens, 1.0), 0.0)
    low = _column(total, column, LOW) * share
    high = _column(total, column, HIGH) * share
    tl.store(metrics, tokens.to(tl.float32))
    tl.store(metrics + 1, (low + high).to(tl.float32))
    tl.store(metrics + 2, (_column(total, column, CAPPED) * share).to(tl.float32))
    tl.store(metrics + 3, low.to(tl.float32))
    tl.store(metrics + 4, high.to(tl.float32))
    tl.store(metrics + 5, (_column(total, column, OLD_KL) * share).to(tl.float32))
    tl.store(metrics + 6, (_column(total, column, RATIO) * share).to(tl.float32))
    tl.store(metrics + 7, tl.where(tokens > 0, _column(least, column, LEAST), 0.0))
    tl.store(metrics + 8, tl.where(tokens > 0, _column(most, column, MOST), 0.0))
    tl.store(metrics + 9, (_column(total, column, KL) * share).to(tl.float32))
    tl.store(metrics + 10, (_column(total, column, ENTROPY) * share).to(tl.float32))
    weight = _column(total, column, WEIGHT) * share
    square = _column(total, column, WEIGHT_SQUARE) * share
    tl.store(metrics + 11, weight.to(tl.float32))
    effective = tl.where(square > 0, weight * weight / tl.where(square > 0, square, 1.0), 0.0)
    tl.store(metrics + 12, effective.to(tl.float32))
    present = _column(total, column, PRESENT)
    tl.store(metrics + 13, ((present - tokens) / tl.maximum(present, 1.0)).to(tl.float32))
    tl.store(metrics + 14, (_column(total, column, RATIO_VARIANCE) * share).to(tl.float32))


def forward(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    rollout_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
    nll_weight: Tensor | None,
    cu_segments: Tensor | None,
    kinds: Sequence[int],
    numbers: Sequence[float],
    want_grad: bool,
    want_entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, n = Kinds(*kinds), Numbers(*numbers)
    num_tokens = logprob.numel()
    num_sequences, row_length, per_token = 1, num_tokens, True
    if cu_seqlens is not None:
        num_sequences = cu_seqlens.shape[0] - 1
        per_token = advantages.shape[0] != num_sequences
    elif logprob.ndim == 2:
        num_sequences, row_length = logprob.shape
        per_token = advantages.ndim == 2

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logprob.new_empty(shape, dtype=dtype)

    grad = empty(*logprob.shape) if want_grad else empty(0)
    grad_entropy = empty(*logprob.shape) if want_entropy_grad else empty(0)
    if num_tokens == 0 or num_sequences == 0:
        nothing = (grad.zero_(), grad_entropy.zero_())
        return empty().zero_(), empty(NUM_METRICS).zero_(), *nothing

    anchor = rollout_logprob if do.from_rollout else old_logprob
    limits_drift = n.off_policy_limit != float("inf")
    rejects = do.token_rejection != 0 or do.sequence_rejection != 0
    couples_kl = do.kl_times_ratio and do.level == BY_SEQUENCE.value and ref_logprob is not None
    # whether a position, or four numbers for every sequence, need 64 bits
    wide = max(num_tokens, 4 * num_sequences) + SEQUENCE_BLOCK >= 2**31
    prefixes = empty(num_tokens) if do.level >= BY_MIN.value else None

    def statistics(offsets: Tensor | None, count: int, own: bool) -> tuple[Tensor, Tensor]:
        """own: of sequences, with everything that corrects them; else the log-ratio alone."""
        lengths = empty(count, 2, dtype=torch.int32)
        stats = empty(count, NUM_STATS.value)
        level = 0 if own and cu_segments is not None else do.level
        _sequence_kernel[(count,)](
            logprob,
            anchor,
            old_logprob,
            advantages,
            offsets,
            mask,
            rollout_logprob,
            ref_logprob,
            lengths,
            stats,
            prefixes,
            row_length,
            num_tokens,
            n.p0,
            n.p1,
            n.log_ratio_clamp,
            n.correction_low,
            n.correction_high,
            n.token_rejection_low,
            n.token_rejection_high,
            n.sequence_rejection_low,
            n.sequence_rejection_high,
            n.off_policy_limit,
            n.kl_input_clamp,
            n.kl_output_clamp,
            PER_TOKEN=per_token,
            SURROGATE=do.surrogate,
            LEVEL=level,
            CORRECTION_KIND=do.correction if own else 0,
            CORRECTION_MASKS=do.correction_masks,
            TOKEN_REJECTION=do.token_rejection if own else 0,
            SEQUENCE_REJECTION=do.sequence_rejection if own else 0,
            REDUCTION=do.rejection_reduction,
            READS_ROLLOUT=own and (limits_drift or rejects or do.correction > OF_TOKEN.value),
            KL_TYPE=do.kl_type,
            COUPLES_KL=own and couples_kl,
            WIDE=wide,
            # the prefix's sums are doubles
            BLOCK_T=min(
                SEQUENCE_BLOCK // (2 if level == BY_MEAN.value else 1),
                triton.next_power_of_2(max(num_tokens, 16)),
            ),
            num_warps=8,
        )
        return lengths, stats

    lengths = stats = segment_stats = None
    by_sequence = do.level != 0 and cu_segments is None
    corrects = do.correction > OF_TOKEN.value or limits_drift or rejects or couples_kl
    if mask is not None or by_sequence or corrects:
        lengths, stats = statistics(cu_seqlens, num_sequences, own=True)
    num_segments = 0
    if cu_segments is not None:
        num_segments = cu_segments.shape[0] - 1
        _, segment_stats = statistics(cu_segments, num_segments, own=False)
    loss, metrics = empty(), empty(NUM_METRICS)
    num_blocks = triton.cdiv(num_tokens, BLOCK)
    partials = empty(num_blocks, COLUMNS.value)
    has_entropy = n.entropy_coef != 0 or n.entropy_low_coef != 0 or n.entropy_high_coef != 0
    _token_kernel[(num_blocks,)](
        logprob,
        anchor,
        old_logprob,
        advantages,
        cu_seqlens,
        mask,
        rollout_logprob if do.correction or rejects or limits_drift else None,
        ref_logprob,
        entropy,
        nll_weight,
        cu_segments,
        lengths,
        stats,
        segment_stats,
        prefixes,
        grad if want_grad else None,
        grad_entropy if want_entropy_grad else None,
        partials,
        num_tokens,
        num_sequences,
        num_segments,
        row_length,
        n.p0,
        n.p1,
        n.p2,
        n.p3,
        n.p4,
        n.p5,
        n.log_ratio_clamp,
        n.correction_low,
        n.correction_high,
        n.token_rejection_low,
        n.token_rejection_high,
        n.kl_coef,
        n.kl_input_clamp,
        n.kl_output_clamp,
        n.entropy_coef,
        n.entropy_low,
        n.entropy_high,
        n.entropy_low_coef,
        n.entropy_high_coef,
        n.entropy_from,
        n.nll_coef,
        n.scale,
        PER_TOKEN=per_token,
        SURROGATE=do.surrogate,
        LEVEL=do.level,
        FROM_ROLLOUT=do.from_rollout,
        CORRECTION_KIND=do.correction,
        CORRECTION_MASKS=do.correction_masks,
        LIMITS_DRIFT=limits_drift,
        TOKEN_REJECTION=do.token_rejection,
        SEQUENCE_REJECTION=do.sequence_rejection,
        COUNT_REJECTED=do.count_rejected,
        KL_TYPE=do.kl_type,
        KL_TIMES_RATIO=do.kl_times_ratio,
        HAS_KL_LOSS=n.kl_coef != 0,
        HAS_ENTROPY_LOSS=has_entropy,
        DENOMINATOR=do.denominator,
        DIVIDE_BY_LENGTH=do.divide_by_length,
        SEARCH_STEPS=num_sequences.bit_length(),
        SEGMENT_STEPS=num_segments.bit_length(),
        WIDE=wide,
        BLOCK_T=BLOCK,
        num_warps=8,
    )
    _merge_kernel[(1,)](partials, loss, metrics, num_blocks, ROWS=MERGE_ROWS, num_warps=4)
    return loss, metrics, grad, grad_entropy
