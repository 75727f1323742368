"""Triton kernels of `sample_tokens`.

`fold` reads a chunk of 2048 columns and leaves its largest logit and sums; `select`, where a row
has filters, finds the least logit that is kept, by a search over the bits of the logits; `fold`
then weighs what is kept; `finish` draws a chunk and a token in it. Nothing may be contracted: the
bits of weights are those of math/exp.h, whose formula `exp_decay` repeats.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.ops._triton import INTERPRETED, finite, philox

CHUNK = 2048
# Columns of a row that a program of `select` looks at at a time; of the interpreter's, whose steps
# cost the same at any width, all that tests have. Integers do not depend on it.
BLOCK = 4096 if INTERPRETED else 512
SEARCH = 4096 if INTERPRETED else 256
_OPTIONS = {"enable_fp_fusion": False}
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def exp_decay(d):
    """e^max(d, -87) for d <= 0; NaN stays NaN."""
    d = tl.where(d < -87.0, -87.0, d)
    shifted = d * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (d - n * 0.693359375) - n * -2.12194440e-4
    square = r * r
    low = r * 1.6666665459e-1 + 5.0000001201e-1
    middle = r * 8.3334519073e-3 + 4.1665795894e-2
    high = r * 1.9875691500e-4 + 1.3981999507e-3
    p = (high * square + middle) * square + low
    mantissa = p * square + r + 1.0
    exponent = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return mantissa * exponent.to(tl.float32, bitcast=True)


@triton.jit
def weights_of(e):
    return (e * 1073741824.0 + 0.5).to(tl.int32)


@triton.jit
def scaled_down(high, low, total):
    """floor(u total / 2^62), u the upper 31 bits of two words."""
    u1 = (high >> 1).to(tl.int64)
    u0 = (low >> 1).to(tl.int64)
    t1 = total >> 31
    t0 = total & 0x7FFFFFFF
    return u1 * t1 + ((u1 * t0 + u0 * t1 + ((u0 * t0) >> 31)) >> 31)


@triton.jit
def load_logits(logits, row, stride, column, vocab):
    at = logits + row * stride + column
    return tl.load(at, mask=column < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def is_kept(x, column, bar, until):
    return (x > bar) | ((x == bar) & (column <= until))


@triton.jit(do_not_specialize=["chunks"])
def _fold_kernel(
    logits,
    inverse,
    threshold,
    last,
    tops,
    dots,
    sums,
    counts,
    stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits, row, stride, column, vocab)
    if threshold is not None:
        keep = is_kept(x, column, tl.load(threshold + row), tl.load(last + row))
        x = tl.where(keep, x, float("-inf"))
    top = tl.max(x, 0)
    d = (x - finite(top)) * tl.load(inverse + row)
    e = exp_decay(d)
    out = row * chunks + chunk
    tl.store(tops + out, top)
    tl.store(sums + out, tl.sum(weights_of(e).to(tl.int64), 0))
    tl.store(counts + out, tl.sum((x > float("-inf")).to(tl.int32), 0))
    if dots is not None:
        # a NaN or +inf shows
        tl.store(dots + out, tl.sum(e * tl.where(d < -87.0, -87.0, d), 0))


@triton.jit
def masses_of(sums, tops, top, inv):
    scale = exp_decay((tops - top) * inv).to(tl.float64)
    return (sums.to(tl.float64) * scale * 1024.0).to(tl.int64)


@triton.jit
def load_chunks(tops, sums, row, chunks, CHUNKS: tl.constexpr):
    index = tl.arange(0, CHUNKS)
    at = row * chunks + index
    top = tl.load(tops + at, mask=index < chunks, other=float("-inf"))
    return top, tl.load(sums + at, mask=index < chunks, other=0)


@triton.jit
def is_regular(dots, top, row, chunks, CHUNKS: tl.constexpr):
    """Whether a row has a distribution."""
    index = tl.arange(0, CHUNKS)
    dot = tl.load(dots + row * chunks + index, mask=index < chunks, other=0.0)
    return (tl.sum((dot != dot).to(tl.int32), 0) == 0) & (top > float("-inf"))


@triton.jit
def key_of(x):
    """int32 in the order of x; 0 and -0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def at_least(logits, row, stride, vocab, key, top, inv, BLOCK: tl.constexpr):
    """The sum of the weights of logits with that key or a higher one."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(logits, row, stride, column, vocab)
        reaches = (key_of(x) >= key) & (x > float("-inf"))
        weight = weights_of(exp_decay((x - top) * inv)).to(tl.int64)
        total += tl.where(reaches, weight, 0)
    return tl.sum(total, 0)


@triton.jit
def least_reaching(
    logits, row, stride, vocab, low, top, inv, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The highest key from `low` on at which what at_least finds is `wanted`; it is so at low.

    Eight keys are tried in a pass over the row.
    """
    high = key_of(top).to(tl.int64) + 1
    number = tl.arange(0, 8)[None, :] + 1
    while high - low > 1:
        step = (high - low + 7) >> 3
        tried = low + number * step
        found = tl.zeros((BLOCK, 8), tl.int64)
        for start in range(0, vocab, BLOCK):
            column = (start + tl.arange(0, BLOCK))[:, None]
            x = load_logits(logits, row, stride, column, vocab)
            one = (x > float("-inf")).to(tl.int64)
            if MASS:
                one *= weights_of(exp_decay((x - top) * inv)).to(tl.int64)
            found += tl.where(key_of(x).to(tl.int64) >= tried, one, 0)
        sums = tl.sum(found, 0)[None, :]
        reaches = (sums << 10).to(tl.float64) >= wanted if MASS else sums >= wanted
        low += step * tl.sum((reaches & (tried < high)).to(tl.int64))
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def column_of_tie(logits, row, stride, vocab, key, number, BLOCK: tl.constexpr):
    """The column of the number-th logit with that key."""
    seen = tl.zeros((), tl.int64)
    last = tl.full((), -1, tl.int64)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(logits, row, stride, column, vocab)
        tie = ((key_of(x) == key) & (column < vocab)).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        here = (tie != 0) & (rank == number)
        last = tl.maximum(last, tl.max(tl.where(here, column, -1), 0).to(tl.int64))
        seen += tl.sum(tie, 0).to(tl.int64)
    return last


@triton.jit
def ties_kept(above, weight, wanted):
    """How many of equal weights have less than `wanted` before them; `above` lies before all."""
    # off by a few at most; a division in float64 would spill
    rest = (wanted * 0.0009765625 - above.to(tl.float64)).to(tl.float32)
    number = (rest / weight.to(tl.float32)).to(tl.int64)
    number = tl.maximum(number, 1)
    while ((above + number * weight) << 10).to(tl.float64) < wanted:
        number += 1
    while (number > 1) & (((above + (number - 1) * weight) << 10).to(tl.float64) >= wanted):
        number -= 1
    return number


@triton.jit(do_not_specialize=["chunks"])
def _select_kernel(
    logits,
    inverse,
    top_k,
    top_p,
    log_min_p,
    tops,
    dots,
    sums,
    threshold,
    last,
    stride,
    vocab,
    chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inv = tl.load(inverse + row)
    chunk_tops, chunk_sums = load_chunks(tops, sums, row, chunks, CHUNKS)
    top = tl.max(chunk_tops, 0)
    regular = is_regular(dots, top, row, chunks, CHUNKS)
    k = vocab
    if top_k is not None:
        k = tl.load(top_k + row).to(tl.int32)
        k = tl.where((k > 0) & (k < vocab), k, vocab)
    p = 1.0
    if top_p is not None:
        p = tl.load(top_p + row)
    log_min = -INFINITY
    if log_min_p is not None:
        log_min = tl.minimum(tl.load(log_min_p + row), 0.0)
        log_min = tl.where(log_min > -INFINITY, log_min, -INFINITY)
    has_p = (p >= 1.0) == 0
    bar = tl.where(regular, -INFINITY, INFINITY)
    until = tl.full((), -1, tl.int64)
    if regular & ((k < vocab) | has_p | (log_min > -INFINITY)):
        key = key_of(bar).to(tl.int64)
        until += vocab + 1
        if k < vocab:
            key = least_reaching(logits, row, stride, vocab, key, top, inv, k, False, SEARCH)
        if has_p:
            mass = at_least(logits, row, stride, vocab, key, top, inv, BLOCK)
            total = mass << 10
            if k == vocab:
                total = tl.sum(masses_of(chunk_sums, chunk_tops, top, inv), 0)
            wanted = p.to(tl.float64) * total.to(tl.float64)
            if (mass << 10).to(tl.float64) >= wanted:
                key = least_reaching(logits, row, stride, vocab, key, top, inv, wanted, True, BLOCK)
                above = at_least(logits, row, stride, vocab, key + 1, top, inv, BLOCK)
                weight = weights_of(exp_decay((logit_of(key) - top) * inv)).to(tl.int64)
                number = ties_kept(above, weight, wanted)
                until = column_of_tie(logits, row, stride, vocab, key, number, BLOCK)
        bar = logit_of(key)
        # of what all filters keep: the least, and the last column with it
        least = tl.full((BLOCK,), float("inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = load_logits(logits, row, stride, column, vocab)
            keep = is_kept(x, column, bar, until) & ((x - top) * inv >= log_min)
            least = tl.minimum(least, tl.where(keep & (x > -INFINITY), x, INFINITY))
        lowest = tl.min(least, 0)
        until = tl.where(lowest > bar, vocab, until)
        bar = lowest
        final = tl.full((BLOCK,), -1, tl.int32)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = load_logits(logits, row, stride, column, vocab)
            final = tl.maximum(final, tl.where((x == bar) & (column <= until), column, -1))
        until = tl.max(final, 0).to(tl.int64)
    tl.store(threshold + row, bar)
    tl.store(last + row, until)


@triton.jit(do_not_specialize=["chunks", "seed"])
def _finish_kernel(
    logits,
    inverse,
    branch_ids,
    positions,
    greedy,
    tops,
    dots,
    sums,
    threshold,
    last,
    kept_tops,
    kept_sums,
    kept_counts,
    token,
    logprob,
    full_logprob,
    entropy,
    count,
    seed,
    stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inv = tl.load(inverse + row)
    index = tl.arange(0, CHUNKS)
    chunk_tops, chunk_sums = load_chunks(tops, sums, row, chunks, CHUNKS)
    top = tl.max(chunk_tops, 0)
    regular = is_regular(dots, top, row, chunks, CHUNKS)
    shift = (chunk_tops - top) * inv
    masses = masses_of(chunk_sums, chunk_tops, top, inv)
    mass = tl.sum(masses, 0)
    total = (mass.to(tl.float64) * 9.094947017729282e-13).to(tl.float32)
    log_sum = tl.log(total)
    dot = tl.load(dots + row * chunks + index, mask=index < chunks, other=0.0)
    dot += chunk_sums.to(tl.float32) * 9.313225746154785e-10 * tl.where(shift < -1e4, -1e4, shift)
    mean = tl.sum(exp_decay(shift) * dot, 0) / total
    kept_log_sum = log_sum
    if threshold is not None:
        chunk_tops, chunk_sums = load_chunks(kept_tops, kept_sums, row, chunks, CHUNKS)
        masses = masses_of(chunk_sums, chunk_tops, top, inv)
        mass = tl.sum(masses, 0)
        kept_log_sum = tl.log((mass.to(tl.float64) * 9.094947017729282e-13).to(tl.float32))

    w0, w1, w2, w3 = philox(tl.load(branch_ids + row), tl.load(positions + row), seed)
    target = scaled_down(w0, w1, mass)
    chosen = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
    takes_top = False
    if greedy is not None:
        takes_top = tl.load(greedy + row) != 0
        first = tl.min(tl.where(chunk_tops == top, index, CHUNKS), 0)
        chosen = tl.where(takes_top, first, chosen)
    # a row without a distribution reads nothing outside of it
    chosen = tl.where(regular, chosen, 0)
    here = index == chosen
    sum_here = tl.sum(tl.where(here, chunk_sums, 0), 0)
    top_here = tl.max(tl.where(here, chunk_tops, float("-inf")), 0)
    column = chosen * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits, row, stride, column, vocab)
    if threshold is not None:
        keep = is_kept(x, column, tl.load(threshold + row), tl.load(last + row))
        x = tl.where(keep, x, float("-inf"))
    weights = weights_of(exp_decay((x - top_here) * inv)).to(tl.int64)
    target = scaled_down(w2, w3, sum_here)
    drawn = chosen * CHUNK + tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    if greedy is not None:
        least = tl.min(tl.where(x == top, column, vocab), 0)
        drawn = tl.where(takes_top, least, drawn)
    logit = tl.max(tl.where(column == drawn, x, float("-inf")), 0)
    d = (logit - top) * inv
    nothing = float("nan")
    tl.store(token + row, tl.where(regular, drawn, -1).to(tl.int64))
    tl.store(logprob + row, tl.where(regular, d - kept_log_sum, nothing))
    tl.store(full_logprob + row, tl.where(regular, d - log_sum, nothing))
    tl.store(entropy + row, tl.where(regular, log_sum - mean, nothing))
    if count is not None:
        counts = tl.load(kept_counts + row * chunks + index, mask=index < chunks, other=0)
        number = tl.sum(counts, 0).to(tl.int64)
        tl.store(count + row, tl.where(regular, number, 0))


def forward(
    logits: Tensor,
    branch_ids: Tensor,
    positions: Tensor,
    inverse_temperature: Tensor,
    greedy: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    log_min_p: Tensor | None,
    seed: int,
    vocab_size: int,
    wants_count: bool,
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    chunks = triton.cdiv(vocab_size, CHUNK)
    wide = triton.next_power_of_2(chunks)

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    def partials(dots: bool) -> tuple:
        """tops, dots, sums, counts"""
        shape = (rows, chunks)
        return (
            new(torch.float32, *shape),
            new(torch.float32, *shape) if dots else None,
            new(torch.int64, *shape),
            new(torch.int32, *shape),
        )

    token, last = new(torch.int64, rows), new(torch.int64, rows)
    logprob, full_logprob, entropy, threshold = (new(torch.float32, rows) for _ in range(4))
    count = new(torch.int64, rows if wants_count else 0)
    results = token, logprob, full_logprob, entropy, threshold, last, count
    if rows == 0:
        return results
    full = partials(True)
    tops, dots, sums, _ = full
    sizes = logits.stride(0), vocab_size, chunks

    def fold(bar: Tensor | None, until: Tensor | None, parts: tuple) -> None:
        _fold_kernel[(rows, chunks)](
            logits,
            inverse_temperature,
            bar,
            until,
            *parts,
            *sizes,
            CHUNK=CHUNK,
            num_warps=4,
            **_OPTIONS,
        )

    fold(None, None, full)
    kept, bar, until = full, None, None
    if top_k is not None or top_p is not None or log_min_p is not None:
        _select_kernel[(rows,)](
            logits,
            inverse_temperature,
            top_k,
            top_p,
            log_min_p,
            tops,
            dots,
            sums,
            threshold,
            last,
            *sizes,
            CHUNKS=wide,
            BLOCK=BLOCK,
            SEARCH=SEARCH,
            num_warps=8,
            **_OPTIONS,
        )
        kept, bar, until = partials(False), threshold, last
        fold(threshold, last, kept)
    else:
        _unfiltered_kernel[(rows,)](
            tops, dots, threshold, last, chunks, CHUNKS=wide, num_warps=1, **_OPTIONS
        )
    _finish_kernel[(rows,)](
        logits,
        inverse_temperature,
        branch_ids,
        positions,
        greedy,
        tops,
        dots,
        sums,
        bar,
        until,
        kept[0],
        kept[2],
        kept[3],
        token,
        logprob,
        full_logprob,
        entropy,
        count if wants_count else None,
        seed,
        *sizes,
        CHUNK=CHUNK,
        CHUNKS=wide,
        num_warps=8,
        **_OPTIONS,
    )
    return results


@triton.jit(do_not_specialize=["chunks"])
def _unfiltered_kernel(tops, dots, threshold, last, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS)
    at = row * chunks + index
    top = tl.max(tl.load(tops + at, mask=index < chunks, other=float("-inf")), 0)
    regular = is_regular(dots, top, row, chunks, CHUNKS)
    tl.store(threshold + row, tl.where(regular, -INFINITY, INFINITY))
    tl.store(last + row, tl.full((), -1, tl.int64))


@triton.jit
def _kept_kernel(logits, threshold, last, offsets, ids, stride, size, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    bar = tl.load(threshold + row)
    until = tl.load(last + row)
    at = tl.load(offsets + row)
    stop = tl.minimum(tl.load(offsets + row + 1), size)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(logits, row, stride, column, vocab)
        keep = (is_kept(x, column, bar, until) & (column < vocab)).to(tl.int32)
        slot = at + tl.cumsum(keep, 0) - 1
        tl.store(ids + slot, column.to(tl.int64), mask=(keep != 0) & (slot >= 0) & (slot < stop))
        at += tl.sum(keep, 0).to(tl.int64)


def kept(
    logits: Tensor, threshold: Tensor, last: Tensor, offsets: Tensor, size: int, vocab_size: int
) -> Tensor:
    ids = logits.new_empty((size,), dtype=torch.int64)
    if size:
        _kept_kernel[(logits.shape[0],)](
            logits,
            threshold,
            last,
            offsets,
            ids,
            logits.stride(0),
            size,
            vocab_size,
            BLOCK=BLOCK,
            num_warps=8,
            **_OPTIONS,
        )
    return ids
