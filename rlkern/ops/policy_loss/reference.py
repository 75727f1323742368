"""The policy loss in plain torch: the specification.

    x = logprob - old_logprob (or rollout_logprob),  z = x or its statistic, clamped,  r = exp(z)
    loss = sum w (W S(r, A, ...) + kl_coef KL - entropy_coef H - nll_coef c logprob)
    w = scale / denominator [/ n_i]

S is one of SURROGATES, W the correction for the rollout policy, a constant. Computed in float32, or
in float64 for float64 log-probs. `forward` also returns grad_logprob = d loss / d logprob in closed
form, which autograd through its loss reproduces.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The codes of the schema's `kinds`.
NOTHING, TOKENS, FILLED_SEQUENCES, ALL_SEQUENCES = range(4)
LEVELS = ("token", "sequence", "product", "prefix_min", "prefix_mean", "prefix_min_capped")
CORRECTIONS = (None, "token", "sequence", "geometric")
KL_TYPES = ("k1", "k2", "k3", "abs", "k1+", "k3+")
SUM, MEAN, MAX = 1, 2, 3


class Kinds(NamedTuple):
    """The schema's `kinds`: what is computed."""

    surrogate: int = 0  # of SURROGATES
    level: int = 0  # of LEVELS
    from_rollout: int = 0  # the ratio is taken against rollout_logprob
    correction: int = 0  # of CORRECTIONS
    correction_masks: int = 0  # outside of its bounds the correction is 0
    token_rejection: int = 0  # 1, 2, 3: k1, k2, k3 of a token; 0: none
    sequence_rejection: int = 0  # likewise of a sequence
    rejection_reduction: int = 0  # SUM, MEAN or MAX over the sequence
    count_rejected: int = 0  # whether rejected tokens stay in the denominators
    kl_type: int = 2  # of KL_TYPES
    kl_times_ratio: int = 0
    denominator: int = FILLED_SEQUENCES
    divide_by_length: int = 1


class Numbers(NamedTuple):
    """The schema's `numbers`."""

    p0: float = 0.8  # p0 to p5: what the surrogate reads, see its function
    p1: float = 1.2
    p2: float = math.inf
    p3: float = 0.0
    p4: float = 0.0
    p5: float = 0.0
    log_ratio_clamp: float = 20.0
    correction_low: float = -math.inf
    correction_high: float = math.inf
    token_rejection_low: float = -math.inf
    token_rejection_high: float = math.inf
    sequence_rejection_low: float = -math.inf
    sequence_rejection_high: float = math.inf
    off_policy_limit: float = math.inf
    kl_coef: float = 0.0
    kl_input_clamp: float = 20.0
    kl_output_clamp: float = math.inf
    entropy_coef: float = 0.0
    entropy_low: float = -math.inf
    entropy_high: float = math.inf
    entropy_low_coef: float = 0.0
    entropy_high_coef: float = 0.0
    entropy_from: float = -math.inf  # below it a token has no entropy band
    nll_coef: float = 0.0
    scale: float = 1.0


class Token(NamedTuple):
    """What a surrogate sees of every token."""

    live: Tensor  # logprob
    old: Tensor  # what the ratio is taken against
    a: Tensor  # advantage
    x: Tensor  # live - old of the token itself
    decided: Tensor  # live - old_logprob of the token itself, clamped
    z: Tensor  # x or its statistic, clamped
    r: Tensor  # exp(z)
    outside: Tensor  # whether z was clamped
    length: Tensor  # tokens of the sequence or segment


class Surrogate(NamedTuple):
    """Token losses, their derivative by logprob, and what the clip metrics count."""

    loss: Tensor
    slope: Tensor
    low: Tensor
    high: Tensor
    capped: Tensor


def _times(a: Tensor, u: Tensor) -> Tensor:
    """a u, and 0 where a is 0 whatever u is."""
    return torch.where(a == 0, 0.0, a * u)


def _choose(condition: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """One of two numbers; torch.where would round both to float32."""
    return torch.where(condition, torch.full_like(like, a), torch.full_like(like, b))


def _clipped(t: Token, low: Tensor | float, high: Tensor | float, cap: float) -> Surrogate:
    up, down = t.a > 0, t.a < 0
    below, above, past = down & (t.r < low), up & (t.r > high), down & (t.r > cap)
    value = torch.where(above, high, torch.where(below, low, torch.where(past, cap, t.r)))
    slope = torch.where(below | above | past | t.outside, 0.0, t.r)
    return Surrogate(-_times(t.a, value), -_times(t.a, slope), below, above, past)


def _weighted(t: Token, weight: Tensor, low: Tensor, high: Tensor, capped: Tensor) -> Surrogate:
    """-sg[weight] A logprob."""
    slope = -_times(t.a, weight.detach())
    return Surrogate(torch.where(slope == 0, 0.0, slope * t.live), slope, low, high, capped)


def _smooth(t: Token, loss: Tensor, slope: Tensor) -> Surrogate:
    """Of a surrogate that clips nothing."""
    none = torch.zeros_like(t.outside)
    return Surrogate(loss, slope, none, none, none)


def clip(t: Token, low: float, high: float, cap: float) -> Surrogate:
    """-A min(r, high) for A > 0, -A min(max(r, low), cap) for A < 0."""
    return _clipped(t, low, high, cap)


def detached(t: Token, low: float, high: float) -> Surrogate:
    """-sg[clip(r, low, high)] A logprob."""
    weight = t.r.clamp(low, high)
    return _weighted(t, weight, t.r < low, t.r > high, torch.zeros_like(t.outside))


def soft_gate(t: Token, tau_pos: float, tau_neg: float) -> Surrogate:
    """-A f(r), f = 4 / tau sigmoid(tau (r - 1))."""
    tau = _choose(t.a > 0, tau_pos, tau_neg, t.r)
    u = tau * (t.r - 1)
    gate = u.sigmoid()
    tail = (-u).sigmoid()
    slope = torch.where(tail == 0, 0.0, 4 * gate * tail * t.r)
    slope = torch.where(t.outside, 0.0, slope)
    return _smooth(t, -_times(t.a, 4 / tau * gate), -_times(t.a, slope))


def hazard(
    t: Token,
    c: float,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    factor: float,
) -> Surrogate:
    """-A exp(psi - sg[zeta]) factor: psi = c tanh(z / c), zeta two Weibull hazards of it."""
    psi = c * torch.tanh(t.z / c)
    held = psi.detach()
    softplus = torch.nn.functional.softplus
    zeta = (softplus(held) / lambda_pos) ** k_pos + (softplus(-held) / lambda_neg) ** k_neg
    value = factor * (psi - zeta).exp()
    slope = torch.where(t.outside, 0.0, value / torch.cosh(t.z / c).square())
    return _smooth(t, -_times(t.a, value), -_times(t.a, slope))


def mask(t: Token, low: float, high: float, cap: float) -> Surrogate:
    """-M sg[min(r, cap)] A logprob; M = 0 where PPO would clip the ratio to old_logprob."""
    ratio = t.decided.exp()
    below, above = (t.a < 0) & (ratio < low), (t.a > 0) & (ratio > high)
    out = below | above
    weight = torch.where(out, 0.0, t.r.clamp(max=cap))
    return _weighted(t, weight, below, above, ~out & (t.r > cap))


def dppo_tv(t: Token, low: float, high: float, cap: float, both: float) -> Surrogate:
    """The mask from the change of the token's probability; both: of either sign of A."""
    moved = t.live.exp() - t.old.exp()
    above, below = moved > high, moved < -low
    if both == 0:
        above, below = above & (t.a > 0), below & ~(t.a > 0)
    out = below | above
    weight = torch.where(out, 0.0, t.r.clamp(max=cap))
    return _weighted(t, weight, below, above, ~out & (t.r > cap))


def dppo_kl(t: Token, low: float, high: float, cap: float) -> Surrogate:
    """The mask from KL(old || new) of the event that this token is taken."""
    p, q = t.live.exp(), t.old.exp()
    kl = q * (t.old - t.live) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    up = t.a > 0
    above, below = up & (kl > high) & (p > q), ~up & (kl > low) & (p < q)
    out = below | above
    weight = torch.where(out, 0.0, t.r.clamp(max=cap))
    return _weighted(t, weight, below, above, ~out & (t.r > cap))


def gamma_weight(
    t: Token, k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float, floor: float
) -> Surrogate:
    """-sg[phi(r)] A logprob, phi = exp(lambda + k z - lambda r), z at least floor."""
    k = _choose(t.a >= 0, k_pos, k_neg, t.r)
    rate = _choose(t.a >= 0, lambda_pos, lambda_neg, t.r)
    z = t.z.clamp(min=floor)
    none = torch.zeros_like(t.outside)
    return _weighted(t, (rate + k * z - rate * z.exp()).exp(), none, none, none)


def flipped(t: Token, low: float, high: float, cap: float) -> Surrogate:
    """A < 0: -A max(r, low); A > 0: -A / min(r, high); past cap -A cap logprob."""
    up, down = t.a > 0, t.a < 0
    below, above = down & (t.r < low), up & (t.r > high)
    held = torch.where(below, low, torch.where(above, high, t.r))
    weight = torch.where(up, 1 / held, held)
    capped = weight > cap
    # r / sg[r]^2: the value 1 / r, the derivative of one that grows with r
    live = torch.where(up & ~above, t.r / held.detach().square(), weight)
    value = torch.where(capped, cap * t.live, live)
    slope = torch.where(below | above | t.outside, 0.0, weight)
    slope = torch.where(capped, cap, slope)
    return Surrogate(-_times(t.a, value), -_times(t.a, slope), below, above, capped & (t.a != 0))


def quadratic(t: Token, coef: float) -> Surrogate:
    """-A r + coef (r - 1)^2."""
    pull = t.r - 1
    slope = -_times(t.a, t.r) + 2 * coef * pull * t.r
    slope = torch.where(t.outside, 0.0, slope)
    return _smooth(t, -_times(t.a, t.r) + coef * pull * pull, slope)


def regression(t: Token, beta: float) -> Surrogate:
    """-(A logprob - beta x^2 / 2)."""
    loss = 0.5 * beta * t.x * t.x - _times(t.a, t.live)
    return _smooth(t, loss, beta * t.x - t.a)


def dynamic(t: Token, epsilon_low: float, epsilon_high: float, cap: float) -> Surrogate:
    """`clip` with bounds from |(r - 1) q| <= epsilon, q the old probability."""
    q = t.old.exp()
    low = 0.5 + 0.5 * (1 - 4 * epsilon_low / q).clamp(min=0).sqrt()
    high = (0.5 + 0.5 * (1 + 4 * epsilon_high / q).sqrt()).clamp(max=max(cap, 10.0))
    return _clipped(t, low, high, cap)


def geometric(t: Token, low: float, high: float) -> Surrogate:
    """-A r, r = exp of the mean of x clipped to [low, high] on the side of A."""
    below, above = (t.a < 0) & (t.x < low), (t.a > 0) & (t.x > high)
    out = below | above | t.outside
    # the clipped tokens pass no gradient on: r through the others alone
    value = torch.where(out, t.r.detach(), t.r)
    slope = torch.where(out, 0.0, t.r)
    none = torch.zeros_like(out)
    return Surrogate(-_times(t.a, value), -_times(t.a, slope), below, above, none)


def reinforce(t: Token) -> Surrogate:
    """-A logprob."""
    return _smooth(t, -_times(t.a, t.live), -t.a)


def shaped(t: Token, gamma: float) -> Surrogate:
    """-A p / (p + gamma), p the probability."""
    p = t.live.exp()
    share = p / (p + gamma)
    return _smooth(t, -_times(t.a, share), -_times(t.a, gamma * share / (p + gamma)))


def balanced(t: Token, power: float) -> Surrogate:
    """-A rho sg[1 - p]^power, rho = 2 p / (q + (q + 1) / 2): tokens of unknown origin."""
    p, q = t.live.exp(), t.old.exp()
    weight = 2 * p / (1.5 * q + 0.5) * (1 - p.detach()).clamp(min=0) ** power
    return _smooth(t, -_times(t.a, weight), -_times(t.a, weight))


def squared(t: Token, kappa: float) -> Surrogate:
    """(kappa x - A)^2: A is the target."""
    gap = kappa * t.x - t.a
    return _smooth(t, gap * gap, 2 * kappa * gap)


def hinge(t: Token, pos_margin: float, neg_margin: float, neg_coef: float) -> Surrogate:
    """A > 0: A relu(pos_margin - x); A < 0: -A neg_coef relu(x + neg_margin)."""
    short, long = pos_margin - t.x, t.x + neg_margin
    up = t.a > 0
    gap = torch.where(up, short, neg_coef * long)
    idle = gap <= 0
    loss = torch.where(idle, 0.0, t.a.abs() * gap)
    slope = torch.where(idle, 0.0, t.a.abs() * _choose(up, -1.0, neg_coef, t.a))
    gone = torch.zeros_like(idle)
    return Surrogate(
        torch.where(t.a == 0, 0.0, loss),
        torch.where(t.a == 0, 0.0, slope),
        (t.a < 0) & idle,
        up & idle,
        gone,
    )


def tapered(t: Token, pos_weight: float, neg_weight: float) -> Surrogate:
    """-sg[weight] A logprob: pos_weight for A > 0, neg_weight min(r, 1) otherwise."""
    up = t.a > 0
    weight = torch.where(up, pos_weight, neg_weight * t.r.clamp(max=1))
    none = torch.zeros_like(t.outside)
    return _weighted(t, weight, none, ~up & (t.r > 1), none)


def banded(t: Token, width: float) -> Surrogate:
    """`clip` of exp(z) with |z| <= width sqrt(n), n the tokens of the sequence."""
    bound = (width * t.length.sqrt()).exp()
    return _clipped(t, 1 / bound, bound, math.inf)


# In the order of the codes; each takes as many of p0 to p5 as it names.
SURROGATES: tuple[tuple[Callable[..., Surrogate], int], ...] = (
    (clip, 3),
    (detached, 2),
    (soft_gate, 2),
    (hazard, 6),
    (mask, 3),
    (dppo_tv, 4),
    (dppo_kl, 3),
    (gamma_weight, 5),
    (flipped, 3),
    (quadratic, 1),
    (regression, 1),
    (dynamic, 3),
    (geometric, 2),
    (reinforce, 0),
    (shaped, 1),
    (balanced, 1),
    (squared, 1),
    (hinge, 3),
    (tapered, 2),
    (banded, 1),
)


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
    """(loss, metrics, grad_logprob, grad_entropy); gradients not wanted are empty."""
    do, n = Kinds(*kinds), Numbers(*numbers)
    kind = logprob.dtype if logprob.dtype == torch.float64 else torch.float32
    sequence, valid, num_sequences = _segments(logprob, cu_seqlens, mask)

    def tokens(value: Tensor | None) -> Tensor | None:
        # masked slots may hold NaN or inf: replaced before any arithmetic
        return None if value is None else torch.where(valid, value.reshape(-1).to(kind), 0.0)

    def total(value: Tensor) -> Tensor:
        out = torch.zeros(num_sequences, dtype=kind, device=logprob.device)
        return out.index_add(0, sequence, torch.where(valid, value, 0.0).to(kind))

    live, old = tokens(logprob), tokens(old_logprob)
    rollout, ref, h = tokens(rollout_logprob), tokens(ref_logprob), tokens(entropy)
    chosen = tokens(nll_weight)
    lengths = total(torch.ones_like(live))
    per_token = _is_per_token(advantages, logprob, cu_seqlens)
    advantage = tokens(advantages if per_token else advantages.to(kind)[sequence])

    correction, rejected = torch.ones_like(live), torch.zeros_like(valid)
    if rollout is not None:
        correction, rejected = _correct(live, old, rollout, advantage, sequence, total, do, n)
    anchor = rollout if do.from_rollout else old
    x = live - anchor
    blocks = (sequence, lengths)
    if cu_segments is not None:
        blocks = _segments(logprob, cu_segments, None)[::2]
        blocks = (blocks[0], torch.bincount(blocks[0], minlength=blocks[1]).to(kind))
    z = _level(x, live, advantage, valid, *blocks, do, n)
    # comparisons ask for what is outside, so that a NaN is not blocked
    outside = z.abs() > n.log_ratio_clamp
    bound = (-n.log_ratio_clamp, n.log_ratio_clamp)
    z = z.clamp(*bound)
    r = z.exp()
    decided = (live - old).clamp(*bound)
    token = Token(live, anchor, advantage, x, decided, z, r, outside, blocks[1][blocks[0]])
    surrogate, count = SURROGATES[do.surrogate]
    s = surrogate(token, *n[:count])
    loss, grad = correction * s.loss, correction * s.slope
    loss, grad = (torch.where(correction == 0, 0.0, value) for value in (loss, grad))
    if LEVELS[do.level] == "product" and surrogate in (clip, banded):
        # every token carries the loss of its sequence, and each of the n moves all of them
        grad = grad * blocks[1][blocks[0]]

    valid_all, valid = valid, valid & ~rejected
    kl = None
    if ref is not None:
        kl, kl_slope = _kl(live - ref, KL_TYPES[do.kl_type], n.kl_input_clamp, n.kl_output_clamp)
        if do.kl_times_ratio:
            mean = kl.detach()
            if LEVELS[do.level] == "sequence":
                # through the ratio every token of the sequence moves the KL of all others
                kept = torch.where(valid, kl, 0.0).detach()
                mean = (total(kept) / lengths.clamp(min=1))[sequence]
            kl_slope = r.detach() * (kl_slope + torch.where(outside, 0.0, mean))
            kl = kl * r.detach() + mean * (r - r.detach())
        if n.kl_coef != 0:
            loss, grad = loss + n.kl_coef * kl, grad + n.kl_coef * kl_slope
    if chosen is not None:
        loss, grad = loss - n.nll_coef * _times(chosen, live), grad - n.nll_coef * chosen
    grad_entropy = torch.zeros_like(live)
    if h is not None:
        under, over = n.entropy_low - h, h - n.entropy_high
        band = n.entropy_low_coef * under.clamp(min=0) + n.entropy_high_coef * over.clamp(min=0)
        free = h < n.entropy_from
        band = torch.where(free, 0.0, band)
        if n.entropy_coef != 0 or n.entropy_low_coef != 0 or n.entropy_high_coef != 0:
            loss = loss + band - n.entropy_coef * h
        outer, inner = ((over > 0) & ~free).to(kind), ((under > 0) & ~free).to(kind)
        grad_entropy = n.entropy_high_coef * outer - n.entropy_low_coef * inner - n.entropy_coef

    counted = lengths if do.count_rejected else total(valid.to(kind))
    weight = _weight(counted, sequence, do.denominator, bool(do.divide_by_length), n.scale)
    weight = torch.where(valid, weight, 0.0)
    total_loss = torch.where(valid, weight * loss, 0.0).sum()
    nothing = logprob.new_empty(0, dtype=kind)
    grad = torch.where(valid, weight * grad, 0.0).detach().view(logprob.shape)
    grad_entropy = (weight * grad_entropy).to(kind).detach().view(logprob.shape)
    metrics = _metrics(valid, valid_all, s, surrogate, decided, r, kl, h, correction, kind)
    return (
        total_loss,
        metrics,
        grad if want_grad else nothing,
        grad_entropy if want_entropy_grad else nothing,
    )


def _segments(
    logprob: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Of each token its sequence and whether it counts; the number of sequences."""
    position = torch.arange(logprob.numel(), device=logprob.device)
    valid = torch.ones_like(position, dtype=torch.bool)
    if mask is not None:
        valid = mask.reshape(-1)
    if cu_seqlens is not None:
        num_sequences = cu_seqlens.shape[0] - 1
        sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), position, right=True)
        valid = valid & (position >= cu_seqlens[0]) & (sequence < num_sequences)
        return sequence.clamp(max=max(num_sequences - 1, 0)), valid, num_sequences
    if logprob.ndim == 2:
        return position // max(logprob.shape[1], 1), valid, logprob.shape[0]
    return torch.zeros_like(position), valid, 1


def _is_per_token(advantages: Tensor, logprob: Tensor, cu_seqlens: Tensor | None) -> bool:
    if logprob.ndim == 2:
        return advantages.ndim == 2
    return cu_seqlens is None or advantages.shape[0] != cu_seqlens.shape[0] - 1


def _level(
    x: Tensor,
    live: Tensor,
    advantage: Tensor,
    valid: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    do: Kinds,
    n: Numbers,
) -> Tensor:
    """z: the value of the level's statistic, the derivative of the token's own log-prob."""
    level = LEVELS[do.level]
    if level == "token":
        return x
    own = live - live.detach()
    held = x.detach()
    if SURROGATES[do.surrogate][0] is geometric:
        held = torch.where(advantage > 0, held.clamp(max=n.p1), held)
        held = torch.where(advantage < 0, held.clamp(min=n.p0), held)
        held = torch.where(advantage == 0, 0.0, held)
    if SURROGATES[do.surrogate][0] is gamma_weight:
        held = held.clamp(-n.log_ratio_clamp, n.log_ratio_clamp)
    if level in ("sequence", "product"):
        value = torch.zeros_like(lengths).index_add(0, sequence, torch.where(valid, held, 0.0))
        if level == "sequence":
            value = value / lengths.clamp(min=1)
        else:
            own = own * lengths[sequence]
        value = value[sequence]
    elif level in ("prefix_min", "prefix_min_capped"):
        value = held.clone()
        for i in sequence[valid].unique().tolist():
            here = ((sequence == i) & valid).nonzero().flatten()
            least = held[here].cummin(0).values[:-1]
            if level == "prefix_min_capped":
                least = least.clamp(max=0.0)
            value[here[1:]] += least
    else:
        value = held.clone()
        for i in sequence[valid].unique().tolist():
            here = ((sequence == i) & valid).nonzero().flatten()
            count = torch.arange(1, here.numel() + 1, device=x.device)
            value[here] = (held[here].double().cumsum(0) / count).to(held)
    return torch.where(valid, own + value, 0.0)


def _correct(
    live: Tensor,
    old: Tensor,
    rollout: Tensor,
    advantage: Tensor,
    sequence: Tensor,
    total: Callable[[Tensor], Tensor],
    do: Kinds,
    n: Numbers,
) -> tuple[Tensor, Tensor]:
    """The constant that multiplies the surrogate, and which tokens are rejected."""
    bound = (-n.log_ratio_clamp, n.log_ratio_clamp)
    mismatch = (old - rollout).detach()
    count = total(torch.ones_like(live)).clamp(min=1)
    correction = torch.ones_like(live)
    if do.correction:
        d = mismatch
        if CORRECTIONS[do.correction] != "token":
            d = total(d)
            d = (d / count if CORRECTIONS[do.correction] == "geometric" else d)[sequence]
        correction = correction_weight(d, do, n)
    drift = (total((rollout - live).detach()) / count)[sequence]
    correction = torch.where((advantage < 0) & (drift > n.off_policy_limit), 0.0, correction)

    safe = mismatch.clamp(*bound)
    statistic = (None, -safe, 0.5 * safe * safe, torch.expm1(safe) - safe)
    rejected = torch.zeros_like(live, dtype=torch.bool)
    if do.token_rejection:
        value = statistic[do.token_rejection]
        rejected = (value < n.token_rejection_low) | (value > n.token_rejection_high)
    if do.sequence_rejection:
        value = statistic[do.sequence_rejection]
        if do.rejection_reduction == MAX:
            most = torch.full_like(count, -math.inf).scatter_reduce(0, sequence, value, "amax")
            value = most[sequence]
        else:
            value = total(value)
            value = (value / count if do.rejection_reduction == MEAN else value)[sequence]
        out = (value < n.sequence_rejection_low) | (value > n.sequence_rejection_high)
        rejected = rejected | out
    return correction, rejected


def correction_weight(d: Tensor, do: Kinds, n: Numbers) -> Tensor:
    """exp of the mismatch of a token or sequence, truncated to its bounds or 0 outside of them."""
    weight = d.clamp(-n.log_ratio_clamp, n.log_ratio_clamp).exp()
    if not do.correction_masks:
        return weight.clamp(n.correction_low, n.correction_high)
    outside = (weight < n.correction_low) | (weight > n.correction_high)
    return torch.where(outside, 0.0, weight)


def _weight(
    lengths: Tensor, sequence: Tensor, denominator: int, divide_by_length: bool, scale: float
) -> Tensor:
    weight = torch.full_like(lengths, scale)
    if denominator == TOKENS:
        weight = weight / lengths.sum().clamp(min=1)
    elif denominator == FILLED_SEQUENCES:
        weight = weight / (lengths > 0).sum().clamp(min=1)
    elif denominator == ALL_SEQUENCES:
        weight = weight / max(lengths.numel(), 1)
    if divide_by_length:
        weight = weight / lengths.clamp(min=1)
    return weight[sequence]


def _kl(
    delta: Tensor, kl_type: str, input_clamp: float, output_clamp: float
) -> tuple[Tensor, Tensor]:
    """KL estimate of each token and its derivative, 0 beyond either clamp."""
    whole = delta
    outside = delta.abs() > input_clamp
    delta = delta.clamp(-input_clamp, input_clamp)
    if kl_type in ("k1", "k1+"):
        value, slope = delta, torch.ones_like(delta)
    elif kl_type == "k2":
        value, slope = 0.5 * delta * delta, delta
    elif kl_type == "abs":
        value, slope = delta.abs(), delta.sign()
    else:
        value, slope = torch.expm1(-delta) + delta, -torch.expm1(-delta)
    slope = torch.where(outside | (value.abs() > output_clamp), 0.0, slope)
    value = value.clamp(-output_clamp, output_clamp)
    if kl_type.endswith("+"):
        # straight through: this value, the derivative of k2, which no clamp holds
        half = 0.5 * whole * whole
        value, slope = half - half.detach() + value.detach(), whole
    return value, slope


def _metrics(
    valid: Tensor,
    valid_all: Tensor,
    s: Surrogate,
    surrogate: Callable[..., Surrogate],
    x: Tensor,
    r: Tensor,
    kl: Tensor | None,
    entropy: Tensor | None,
    correction: Tensor,
    kind: torch.dtype,
) -> Tensor:
    """In the order of METRICS in op.py; every one is 0 where there are no tokens."""
    count = valid.sum().to(kind)
    all_count = valid_all.sum().to(kind)

    def mean(value: Tensor | None) -> Tensor:
        if value is None:
            return torch.zeros_like(count)
        return torch.where(valid, value.detach().to(kind), 0.0).sum() / count.clamp(min=1)

    def extreme(value: Tensor, reduce) -> Tensor:
        return reduce(value) if valid.numel() else torch.zeros_like(count)

    any_token = count > 0
    infinity = float("inf")
    least = extreme(torch.where(valid, r.detach(), infinity), torch.amin)
    most = extreme(torch.where(valid, r.detach(), -infinity), torch.amax)
    square = mean(correction.square())
    return torch.stack(
        [
            count,
            mean(s.low) + mean(s.high),
            mean(s.capped),
            mean(s.low),
            mean(s.high),
            mean(-x),
            mean(r),
            torch.where(any_token, least, 0.0),
            torch.where(any_token, most, 0.0),
            mean(kl),
            mean(entropy),
            mean(correction),
            torch.where(square > 0, mean(correction).square() / square, 0.0),
            (all_count - count) / all_count.clamp(min=1),
            mean((r - 1).square() if surrogate is quadratic else None),
        ]
    )
