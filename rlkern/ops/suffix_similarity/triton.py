"""Triton kernel of `suffix_similarity`: a program sixteen pairs, a word a pair."""

import torch
import triton
import triton.language as tl
from torch import Tensor

EDIT = tl.constexpr(0)
SUFFIX = tl.constexpr(1)
PAIRS = 16


@triton.jit
def _matches(one, others, live, bit):
    """The bits of the positions at which others (P, 64) has the (P,) tokens."""
    hit = live & (others == one[:, None])
    return tl.sum(tl.where(hit, bit, 0), 1)


@triton.jit
def _suffix_within(tokens, count, others, live, bit, pair, inside, width):
    """The longest suffix of the (P,) rows of `tokens` that stands in `others`."""
    found = tl.zeros_like(count)
    places = tl.sum(tl.where(live, bit, 0), 1)
    for back in range(width):
        valid = inside & (back < count)
        one = tl.load(tokens + pair * width + width - 1 - back, mask=valid, other=0)
        places &= tl.where(valid, _matches(one, others, live, bit), 0)
        found += (places != 0).to(tl.int64)
        places = places >> 1
    return found


@triton.jit
def _kernel(
    tokens_a, tokens_b, lengths_a, lengths_b, out, pairs, width, MODE: tl.constexpr, P: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = pair < pairs
    n = tl.minimum(tl.maximum(tl.load(lengths_a + pair, mask=inside, other=0), 0), width)
    m = tl.minimum(tl.maximum(tl.load(lengths_b + pair, mask=inside, other=0), 0), width)
    place = tl.arange(0, 64)[None, :]
    bit = tl.full((1, 64), 1, tl.uint64) << place.to(tl.uint64)
    at = pair[:, None] * width + place
    # the last tokens, from bit 0 on
    live_b = inside[:, None] & (place < m[:, None])
    b = tl.load(tokens_b + at + (width - m)[:, None], mask=live_b, other=0)
    if MODE == SUFFIX:
        live_a = inside[:, None] & (place < n[:, None])
        a = tl.load(tokens_a + at + (width - n)[:, None], mask=live_a, other=0)
        count = tl.maximum(
            _suffix_within(tokens_a, n, b, live_b, bit, pair, inside, width),
            _suffix_within(tokens_b, m, a, live_a, bit, pair, inside, width),
        )
        total = tl.maximum(n, m)
    else:
        ones = ~tl.zeros((P,), tl.uint64)
        plus = ones
        minus = tl.zeros((P,), tl.uint64)
        row = ones
        # of no bit where b is empty
        bottom = tl.sum(tl.where(place == m[:, None] - 1, bit, 0), 1)
        distance = m
        for i in range(width):
            valid = inside & (i >= width - n)
            one = tl.load(tokens_a + pair * width + i, mask=valid, other=0)
            match = _matches(one, b, live_b, bit)
            if MODE == EDIT:
                vertical = match | minus
                horizontal = (((match & plus) + plus) ^ plus) | match
                up = minus | ~(horizontal | plus)
                down = plus & horizontal
                change = ((up & bottom) != 0).to(tl.int64) - ((down & bottom) != 0).to(tl.int64)
                distance = tl.where(valid, distance + change, distance)
                up = (up << 1) | 1
                plus = tl.where(valid, (down << 1) | ~(vertical | up), plus)
                minus = tl.where(valid, up & vertical, minus)
            else:
                match = tl.where(valid, match & row, 0)
                row = (row + match) | (row - match)
        if MODE == EDIT:
            count = tl.where(m == 0, n, distance)
            total = tl.maximum(n, m)
        else:
            zeros = ((row[:, None] & bit) == 0) & (place < m[:, None])
            count = 2 * tl.sum(zeros.to(tl.int64), 1)
            total = n + m
    ratio = tl.div_rn(count.to(tl.float32), tl.maximum(total, 1).to(tl.float32))
    ratio = tl.where(n + m == 0, 0.0 if MODE == EDIT else 1.0, ratio)
    tl.store(out + pair, ratio, mask=inside)


def forward(
    tokens_a: Tensor, tokens_b: Tensor, lengths_a: Tensor, lengths_b: Tensor, mode: int
) -> Tensor:
    pairs, width = tokens_a.shape
    out = lengths_a.new_empty((pairs,), dtype=torch.float32)
    if pairs:
        _kernel[(triton.cdiv(pairs, PAIRS),)](
            tokens_a,
            tokens_b,
            lengths_a,
            lengths_b,
            out,
            pairs,
            width,
            MODE=mode,
            P=PAIRS,
            num_warps=4,
        )
    return out
