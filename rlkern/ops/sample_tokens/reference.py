"""A draw from a filtered softmax in plain torch: the specification, bit for bit.

    m = max_j x_j,  d_j = (x_j - m) inverse_temperature        float32, operation by operation
    W(d) = floor(2^30 E(d) + 1/2), an integer; E(d) = e^max(d, -87) by the polynomial of math/exp.h

Kept, in this order, of the tokens above -inf:
    top_k: those no smaller than the k-th largest
    top_p: of (x descending, column ascending) those before which there is less than top_p of
        the mass; the first always
    min_p: d_j >= log min_p

The draw, with four random words r = philox(seed, branch id, position):
    columns are cut into chunks of 2048; within each, weights W relative to its own largest kept x
    S_c = sum of the weights;  M_c = floor(2^10 S_c E(d of the chunk's largest)), in float64
    the chunk in which the sum of M passes u(r0, r1) sum_c M_c, then the first token in it where
    the sum of W passes u(r2, r3) S_c;  u(a, b) total = floor((a/2 2^31 + b/2) total / 2^62)

All sums are of integers: no order, device or number of threads changes one. The mass of top_p is
that of the chunks where no top_k is on, else sum W 2^10 of what top_k keeps.

Log-probs and entropy are computed in float64. A row whose largest logit is not finite, or with a
NaN, has token -1, NaN for the rest and keeps nothing.
"""

import torch
from torch import Tensor

from rlkern.ops.quantize_nvfp4 import reference as nvfp4

CHUNK = 2048
_MASK = 0x7FFFFFFF
_INF = float("inf")


def exp_decay(d: Tensor) -> Tensor:
    """e^max(d, -87) for d <= 0, in float32 steps that no device may contract."""
    d = torch.where(d < -87.0, -87.0, d)
    shifted = d * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (d - n * 0.693359375) - n * -2.12194440e-4
    square = r * r
    low = r * 1.6666665459e-1 + 5.0000001201e-1
    middle = r * 8.3334519073e-3 + 4.1665795894e-2
    high = r * 1.9875691500e-4 + 1.3981999507e-3
    p = (high * square + middle) * square + low
    mantissa = p * square + r + 1.0
    # the exponent lies in the low bits; the shift drops those of 1.5 2^23
    scale = ((shifted.view(torch.int32).long() << 23) + 0x3F800000) & 0xFFFFFFFF
    return mantissa * scale.int().view(torch.float32)


def weights(d: Tensor) -> Tensor:
    """int64"""
    return (exp_decay(d) * 2.0**30 + 0.5).long()


def scaled_down(high: Tensor, low: Tensor, total: Tensor) -> Tensor:
    """floor(u total / 2^62), u the upper 31 bits of two words: no product of halves overflows."""
    u1, u0 = high >> 1, low >> 1
    t1, t0 = total >> 31, total & _MASK
    return u1 * t1 + ((u1 * t0 + u0 * t1 + ((u0 * t0) >> 31)) >> 31)


class Masses:
    """The masses of (R, V) logits, chunk by chunk; -inf is not there."""

    def __init__(self, x: Tensor, inverse: Tensor) -> None:
        padding = -x.shape[1] % CHUNK
        chunks = torch.nn.functional.pad(x, (0, padding), value=-_INF).unflatten(1, (-1, CHUNK))
        top = chunks.amax(-1)
        d = (chunks - torch.where(top == -_INF, 0.0, top)[..., None]) * inverse[:, None, None]
        self.weights = torch.where(chunks == -_INF, 0, weights(d))
        self.sums = self.weights.sum(-1)
        shift = (top - top.amax(-1, keepdim=True)) * inverse[:, None]
        scaled = self.sums.double() * exp_decay(shift).double() * 1024.0
        self.masses = torch.where(top == -_INF, 0, scaled.long())
        self.total = self.masses.sum(-1)

    def draw(self, words: list[Tensor]) -> Tensor:
        target = scaled_down(words[0], words[1], self.total)[:, None]
        chunk = (self.masses.cumsum(-1) <= target).sum(-1)
        row = torch.arange(chunk.shape[0], device=chunk.device)
        target = scaled_down(words[2], words[3], self.sums[row, chunk])[:, None]
        within = (self.weights[row, chunk].cumsum(-1) <= target).sum(-1)
        return chunk * CHUNK + within


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
    x = logits[:, :vocab_size].float()
    regular = (x < _INF).all(-1) & (x > -_INF).any(-1)
    # what is computed of other rows is not returned
    x = torch.where(regular[:, None], x, 0.0)
    d = (x - x.amax(-1, keepdim=True)) * inverse_temperature[:, None]
    full = Masses(x, inverse_temperature)
    keep = _kept_mask(x, d, full, top_k, top_p, log_min_p)
    kept = x.masked_fill(~keep, -_INF)
    token = Masses(kept, inverse_temperature).draw(nvfp4.philox(branch_ids, seed, positions))
    if greedy is not None:
        token = torch.where(greedy, x.argmax(-1), token)

    z = (x.double() - x.double().amax(-1, keepdim=True)) * inverse_temperature[:, None].double()
    log_p = z.log_softmax(-1)
    entropy = -torch.where(log_p == -_INF, 0.0, log_p.exp() * log_p).sum(-1)
    of_kept = z.masked_fill(~keep, -_INF).log_softmax(-1)

    def picked(values: Tensor) -> Tensor:
        value = values.gather(-1, token[:, None])[:, 0]
        return torch.where(regular, value, float("nan")).float()

    # the threshold of unfiltered rows lies below all logits
    filtered = _filtered(x, top_k, top_p, log_min_p)
    threshold = torch.where(keep, x, _INF).amin(-1)
    column = torch.arange(vocab_size, device=x.device)
    last = torch.where(keep & (x == threshold[:, None]), column, -1).amax(-1)
    threshold = torch.where(filtered, threshold, -_INF)
    count = torch.where(regular, keep.sum(-1), 0)
    return (
        torch.where(regular, token, -1),
        picked(of_kept),
        picked(log_p),
        torch.where(regular, entropy, float("nan")).float(),
        torch.where(regular, threshold, _INF),
        torch.where(regular & filtered, last, -1),
        count if wants_count else count[:0],
    )


def _filtered(x, top_k, top_p, log_min_p) -> Tensor:
    found = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    if top_k is not None:
        found = found | ((top_k > 0) & (top_k < x.shape[1]))
    if top_p is not None:
        found = found | ~(top_p >= 1)
    if log_min_p is not None:
        found = found | (log_min_p > -_INF)
    return found


def _kept_mask(x, d, full: Masses, top_k, top_p, log_min_p) -> Tensor:
    keep = x > -_INF
    order = torch.sort(x, dim=-1, descending=True, stable=True)
    mass = full.total
    if top_k is not None:
        on = ((top_k > 0) & (top_k < x.shape[1]))[:, None]
        kth = order.values.gather(-1, (top_k[:, None] - 1).clamp(0, x.shape[1] - 1))
        keep = keep & (~on | (x >= kth))
        mass = torch.where(on[:, 0], torch.where(keep, weights(d), 0).sum(-1) << 10, mass)
    if top_p is not None:
        weight = torch.where(keep, weights(d), 0).gather(-1, order.indices)
        before = weight.cumsum(-1) - weight
        wanted = top_p.double() * mass.double()
        inside = (before << 10).double() < wanted[:, None]
        inside[:, 0] = True
        inside = torch.zeros_like(keep).scatter_(-1, order.indices, inside)
        keep = keep & (inside | (top_p >= 1)[:, None])
    if log_min_p is not None:
        keep = keep & ((d >= log_min_p.clamp(max=0.0)[:, None]) | ~(log_min_p > -_INF)[:, None])
    return keep


def kept(
    logits: Tensor, threshold: Tensor, last: Tensor, offsets: Tensor, size: int, vocab_size: int
) -> Tensor:
    """(size,) int64: the columns kept by row 0, then by row 1, ..., ascending; `offsets` are the
    running counts."""
    x = logits[:, :vocab_size].float()
    column = torch.arange(vocab_size, device=x.device)
    at_bar = (x == threshold[:, None]) & (column <= last[:, None])
    keep = (x > threshold[:, None]) | at_bar
    rank = keep.long().cumsum(-1) - 1
    slot = offsets[:-1, None] + rank
    slot = torch.where(keep & (slot < offsets[1:, None]), slot, size)
    ids = x.new_zeros((size + 1,), dtype=torch.int64)
    return ids.scatter_(0, slot.flatten(), column.expand_as(x).flatten())[:size]
