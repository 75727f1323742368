"""Triton kernels of `policy_loss`: statistics of sequences where needed, tokens in blocks, sums.

No atomics: blocks of a fixed size write partial sums, which the last kernel adds in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# A program walks a whole sequence: long blocks, so that 128 k tokens take 32 steps.
SEQUENCE_BLOCK = 4096
# Partial sums of one block of tokens, padded to a power of two.
COLUMNS = tl.constexpr(16)
LOSS, TOKENS, LOW, HIGH, CAPPED, OLD_KL, RATIO, KL, ENTROPY, LEAST, MOST = (
    tl.constexpr(i) for i in range(11)
)
NUM_METRICS = 11
MERGE_ROWS = 64

CLIP = tl.constexpr(0)
BY_TOKENS, BY_FILLED, BY_ALL = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


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
def _sequence_kernel(
    logprob,
    old_logprob,
    cu_seqlens,
    mask,
    lengths,
    log_ratios,
    row_length,
    num_tokens,
    SEQUENCE_LEVEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of one sequence: the tokens that count, and the mean of logprob - old_logprob over them."""
    i = tl.program_id(0)
    begin = _start(cu_seqlens, i, row_length, num_tokens)
    end = _start(cu_seqlens, i + 1, row_length, num_tokens)
    total = tl.zeros((BLOCK_T,), tl.float32)
    number = tl.zeros((BLOCK_T,), tl.int32)
    for base in range(begin, end, BLOCK_T):
        position = base + tl.arange(0, BLOCK_T)
        counts = position < end
        if mask is not None:
            counts = counts & (tl.load(mask + position, mask=counts, other=0) != 0)
        number += counts.to(tl.int32)
        if SEQUENCE_LEVEL:
            x = tl.load(logprob + position, mask=counts, other=0.0)
            total += x - tl.load(old_logprob + position, mask=counts, other=0.0)
    length = tl.sum(number, 0)
    tl.store(lengths + i, length)
    if SEQUENCE_LEVEL:
        tl.store(log_ratios + i, tl.sum(total, 0) / tl.maximum(length, 1).to(tl.float32))


@triton.jit
def _divisor(lengths, cu_seqlens, row_length, num_tokens, num_sequences, DENOMINATOR: tl.constexpr):
    """What the weighted losses are divided by: every program counts for itself, S reads from L2."""
    if DENOMINATOR == BY_ALL:
        return tl.maximum(num_sequences, 1).to(tl.float32)
    total = tl.zeros((256,), tl.int64)
    for base in range(0, num_sequences, 256):
        i = base + tl.arange(0, 256)
        present = i < num_sequences
        if lengths is not None:
            length = tl.load(lengths + i, mask=present, other=0).to(tl.int64)
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
def _bounded(x, low, high):
    # written as selects, not minimum and maximum: a NaN must get through
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _clipped(r, outside, advantage, low, high, cap):
    """-min(r A, clip(r) A), at most -cap A for A < 0: csrc/include/rlkern/math/policy_ratio.h."""
    up, down = advantage > 0, advantage < 0
    above, below, past = up & (r > high), down & (r < low), down & (r > cap)
    u = tl.where(above, high, tl.where(below, low, tl.where(past, cap, r)))
    k = tl.where(above | below | past | outside, 0.0, r)
    idle = advantage == 0
    loss = tl.where(idle, 0.0, -advantage * u)
    return loss, tl.where(idle, 0.0, -advantage * k), below, above, past


@triton.jit
def _detached(r, logprob, advantage, low, high):
    """-sg[clip(r)] A logprob."""
    weight = _bounded(r, low, high)
    idle = advantage == 0
    grad = tl.where(idle, 0.0, -advantage * weight)
    return tl.where(idle, 0.0, grad * logprob), grad, r < low, r > high, r != r


@triton.jit
def _kl(delta, input_clamp, output_clamp, KL_TYPE: tl.constexpr):
    """Estimate and derivative, 0 beyond a clamp: csrc/include/rlkern/math/policy_kl.h."""
    outside = (delta > input_clamp) | (delta < -input_clamp)
    delta = _bounded(delta, -input_clamp, input_clamp)
    value = delta
    grad = tl.full(delta.shape, 1.0, tl.float32)
    if KL_TYPE == 2:
        value = 0.5 * delta * delta
        grad = delta
    elif KL_TYPE == 3:
        # exp(x) - 1 - x cancels near 0: there the series of exp from x^2 on
        x = -delta
        p = x * 1.9875691500e-4 + 1.3981999507e-3
        p = p * x + 8.3334519073e-3
        p = p * x + 4.1665795894e-2
        p = p * x + 1.6666665459e-1
        p = p * x + 5.0000001201e-1
        value = tl.where(x * x < 0.1156, p * x * x, tl.exp(x) - 1.0 - x)
        grad = delta - value
    outside = outside | (value > output_clamp) | (value < -output_clamp)
    return _bounded(value, -output_clamp, output_clamp), tl.where(outside, 0.0, grad)


@triton.jit
def _token_kernel(
    logprob,
    old_logprob,
    advantages,
    cu_seqlens,
    mask,
    ref_logprob,
    entropy,
    lengths,
    log_ratios,
    grad,
    grad_entropy,
    partials,
    num_tokens,
    num_sequences,
    row_length,
    ratio_low,
    ratio_high,
    ratio_cap,
    log_ratio_clamp,
    kl_coef,
    kl_input_clamp,
    kl_output_clamp,
    entropy_coef,
    scale,
    PER_TOKEN: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL_TYPE: tl.constexpr,
    HAS_KL_LOSS: tl.constexpr,
    HAS_ENTROPY_LOSS: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    DIVIDE_BY_LENGTH: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    position = block * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = position < num_tokens
    counts = in_range
    if mask is not None:
        counts = counts & (tl.load(mask + position, mask=in_range, other=0) != 0)

    # the last sequence that begins at or before the token
    sequence = tl.zeros((BLOCK_T,), tl.int64)
    length = tl.full((BLOCK_T,), 0, tl.int64) + row_length
    if cu_seqlens is not None:
        beyond = sequence + num_sequences
        for _ in range(SEARCH_STEPS):
            middle = (sequence + beyond) // 2
            starts_before = tl.load(cu_seqlens + middle).to(tl.int64) <= position
            sequence = tl.where(starts_before, middle, sequence)
            beyond = tl.where(starts_before, beyond, middle)
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        # tokens before the first sequence or after the last do not count
        counts = counts & (position >= begin) & (position < end)
        length = tl.minimum(end, num_tokens) - tl.maximum(begin, 0)
    else:
        sequence = tl.where(in_range, position // row_length, 0)
    if lengths is not None:
        length = tl.load(lengths + sequence, mask=counts, other=1).to(tl.int64)

    if DENOMINATOR != 0:
        scale = scale / _divisor(
            lengths, cu_seqlens, row_length, num_tokens, num_sequences, DENOMINATOR
        )
    weight = tl.full((BLOCK_T,), 0.0, tl.float32) + scale
    if DIVIDE_BY_LENGTH:
        weight = weight / tl.maximum(length, 1).to(tl.float32)
    weight = tl.where(counts, weight, 0.0)

    # masked slots may hold NaN or inf: they are not read
    live = tl.load(logprob + position, mask=counts, other=0.0)
    x = live - tl.load(old_logprob + position, mask=counts, other=0.0)
    if PER_TOKEN:
        advantage = tl.load(advantages + position, mask=counts, other=0.0)
    else:
        advantage = tl.load(advantages + sequence, mask=counts, other=0.0)
    log_ratio = x
    if log_ratios is not None:
        log_ratio = tl.load(log_ratios + sequence, mask=counts, other=0.0)
    outside = (log_ratio > log_ratio_clamp) | (log_ratio < -log_ratio_clamp)
    r = tl.exp(_bounded(log_ratio, -log_ratio_clamp, log_ratio_clamp))
    if SURROGATE == CLIP:
        loss, d_logprob, below, above, past = _clipped(
            r, outside, advantage, ratio_low, ratio_high, ratio_cap
        )
    else:
        loss, d_logprob, below, above, past = _detached(r, live, advantage, ratio_low, ratio_high)

    out = partials + block * COLUMNS
    if ref_logprob is not None:
        delta = live - tl.load(ref_logprob + position, mask=counts, other=0.0)
        kl, d_kl = _kl(delta, kl_input_clamp, kl_output_clamp, KL_TYPE)
        tl.store(out + KL, tl.sum(kl, 0))
        if HAS_KL_LOSS:
            loss += kl_coef * kl
            d_logprob += kl_coef * d_kl
    else:
        tl.store(out + KL, 0.0)
    if entropy is not None:
        h = tl.load(entropy + position, mask=counts, other=0.0)
        tl.store(out + ENTROPY, tl.sum(h, 0))
        if HAS_ENTROPY_LOSS:
            loss -= entropy_coef * h
    else:
        tl.store(out + ENTROPY, 0.0)
    if grad is not None:
        tl.store(grad + position, weight * d_logprob, mask=in_range)
    if grad_entropy is not None:
        tl.store(grad_entropy + position, -entropy_coef * weight, mask=in_range)

    tl.store(out + LOSS, tl.sum(weight * loss, 0))
    tl.store(out + TOKENS, tl.sum(counts.to(tl.float32), 0))
    tl.store(out + LOW, tl.sum((below & counts).to(tl.float32), 0))
    tl.store(out + HIGH, tl.sum((above & counts).to(tl.float32), 0))
    tl.store(out + CAPPED, tl.sum((past & counts & (SURROGATE == CLIP)).to(tl.float32), 0))
    tl.store(out + OLD_KL, -tl.sum(_bounded(x, -log_ratio_clamp, log_ratio_clamp), 0))
    tl.store(out + RATIO, tl.sum(tl.where(counts, r, 0.0), 0))
    tl.store(out + LEAST, tl.min(tl.where(counts, r, float("inf")), 0))
    tl.store(out + MOST, tl.max(tl.where(counts, r, float("-inf")), 0))


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


def forward(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
    sequence_level: bool,
    surrogate: int,
    ratio_low: float,
    ratio_high: float,
    ratio_cap: float,
    log_ratio_clamp: float,
    kl_type: int,
    kl_coef: float,
    kl_input_clamp: float,
    kl_output_clamp: float,
    entropy_coef: float,
    denominator: int,
    divide_by_length: bool,
    scale: float,
    want_grad: bool,
    want_entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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

    lengths = log_ratios = None
    if mask is not None or sequence_level:
        lengths = empty(num_sequences, dtype=torch.int32)
        log_ratios = empty(num_sequences) if sequence_level else None
        _sequence_kernel[(num_sequences,)](
            logprob,
            old_logprob,
            cu_seqlens,
            mask,
            lengths,
            log_ratios,
            row_length,
            num_tokens,
            SEQUENCE_LEVEL=sequence_level,
            BLOCK_T=min(SEQUENCE_BLOCK, triton.next_power_of_2(max(num_tokens, 16))),
            num_warps=8,
        )
    loss, metrics = empty(), empty(NUM_METRICS)
    num_blocks = triton.cdiv(num_tokens, BLOCK)
    partials = empty(num_blocks, COLUMNS.value)
    _token_kernel[(num_blocks,)](
        logprob,
        old_logprob,
        advantages,
        cu_seqlens,
        mask,
        ref_logprob,
        entropy,
        lengths,
        log_ratios,
        grad if want_grad else None,
        grad_entropy if want_entropy_grad else None,
        partials,
        num_tokens,
        num_sequences,
        row_length,
        ratio_low,
        ratio_high,
        ratio_cap,
        log_ratio_clamp,
        kl_coef,
        kl_input_clamp,
        kl_output_clamp,
        entropy_coef,
        scale,
        PER_TOKEN=per_token,
        SURROGATE=surrogate,
        KL_TYPE=kl_type,
        HAS_KL_LOSS=kl_coef != 0,
        HAS_ENTROPY_LOSS=entropy_coef != 0,
        DENOMINATOR=denominator,
        DIVIDE_BY_LENGTH=divide_by_length,
        SEARCH_STEPS=num_sequences.bit_length(),
        BLOCK_T=BLOCK,
        num_warps=4,
    )
    _merge_kernel[(1,)](partials, loss, metrics, num_blocks, ROWS=MERGE_ROWS, num_warps=4)
    return loss, metrics, grad, grad_entropy
