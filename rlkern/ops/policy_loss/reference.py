"""The policy loss in plain torch: the specification.

    x = clamp(logprob - old_logprob),  r = exp(x)     or, per sequence, r = exp(clamp(mean x))
    clip:      L = -A min(r, high) for A > 0,  -A min(max(r, low), cap) for A < 0,  0 for A = 0
    detached:  L = -A sg[clip(r, low, high)] logprob
    loss = sum w (L + kl_coef KL - entropy_coef H),  w = scale / denominator [/ n_i]

Computed in float32, or in float64 for float64 log-probs. `forward` also returns
grad_logprob = d loss / d logprob in closed form, which autograd through its loss reproduces.
"""

import torch
from torch import Tensor

NOTHING, TOKENS, FILLED_SEQUENCES, ALL_SEQUENCES = range(4)


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
    """(loss, metrics, grad_logprob, grad_entropy); gradients not wanted are empty."""
    kind = logprob.dtype if logprob.dtype == torch.float64 else torch.float32
    sequence, valid, num_sequences = _segments(logprob, cu_seqlens, mask)

    def tokens(value: Tensor) -> Tensor:
        # masked slots may hold NaN or inf: replaced before any arithmetic
        return torch.where(valid, value.reshape(-1).to(kind), 0.0)

    live, old = tokens(logprob), tokens(old_logprob)
    lengths = torch.zeros(num_sequences, dtype=kind, device=logprob.device)
    lengths = lengths.index_add(0, sequence, valid.to(kind))
    per_token = _is_per_token(advantages, logprob, cu_seqlens)
    advantage = tokens(advantages if per_token else advantages.to(kind)[sequence])

    weight = _weight(lengths, sequence, denominator, divide_by_length, scale)
    weight = torch.where(valid, weight, 0.0)

    # x: what the metric ppo_kl averages; log_ratio: what the surrogate sees
    x = live - old
    log_ratio = x
    if sequence_level:
        mean = torch.zeros_like(lengths).index_add(0, sequence, x) / lengths.clamp(min=1)
        # the value of the sequence's mean, the derivative of the token's own log-prob
        log_ratio = torch.where(valid, live - live.detach() + mean.detach()[sequence], 0.0)
    # comparisons ask for what is outside, so that a NaN is not blocked
    outside = log_ratio.abs() > log_ratio_clamp
    x = x.clamp(-log_ratio_clamp, log_ratio_clamp)
    r = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()

    up, down = advantage > 0, advantage < 0
    low, high = r < ratio_low, r > ratio_high
    capped = down & (r > ratio_cap)
    if surrogate == 0:
        clipped = torch.where(up, r.clamp(max=ratio_high), r.clamp(ratio_low).clamp(max=ratio_cap))
        low, high = low & down, high & up
        loss = -advantage * clipped
        blocked = low | high | capped | outside
        slope = torch.where(blocked, 0.0, r)
    else:
        slope = r.clamp(ratio_low, ratio_high).detach()
        capped = torch.zeros_like(capped)
        loss = -advantage * slope * live
    loss = torch.where(advantage == 0, 0.0, loss)
    grad = torch.where(advantage == 0, 0.0, -advantage * slope)

    kl = None
    if ref_logprob is not None:
        kl, kl_slope = _kl(live - tokens(ref_logprob), kl_type, kl_input_clamp, kl_output_clamp)
        if kl_coef != 0:
            loss = loss + kl_coef * kl
            grad = grad + kl_coef * kl_slope
    if entropy is not None and entropy_coef != 0:
        loss = loss - entropy_coef * tokens(entropy)

    total = (weight * loss).sum()
    nothing = logprob.new_empty(0, dtype=kind)
    grad = (weight * grad).detach().view(logprob.shape) if want_grad else nothing
    grad_entropy = (-entropy_coef * weight).view(logprob.shape) if want_entropy_grad else nothing
    metrics = _metrics(
        valid, low, high, capped, x, r, kl, None if entropy is None else tokens(entropy), kind
    )
    return total, metrics, grad, grad_entropy


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
    delta: Tensor, kl_type: int, input_clamp: float, output_clamp: float
) -> tuple[Tensor, Tensor]:
    """KL estimate of each token and its derivative, 0 beyond either clamp."""
    outside = delta.abs() > input_clamp
    delta = delta.clamp(-input_clamp, input_clamp)
    if kl_type == 1:
        value, slope = delta, torch.ones_like(delta)
    elif kl_type == 2:
        value, slope = 0.5 * delta * delta, delta
    else:
        value, slope = torch.expm1(-delta) + delta, -torch.expm1(-delta)
    slope = torch.where(outside | (value.abs() > output_clamp), 0.0, slope)
    return value.clamp(-output_clamp, output_clamp), slope


def _metrics(
    valid: Tensor,
    low: Tensor,
    high: Tensor,
    capped: Tensor,
    x: Tensor,
    r: Tensor,
    kl: Tensor | None,
    entropy: Tensor | None,
    kind: torch.dtype,
) -> Tensor:
    """In the order of METRICS in op.py; every one is 0 where there are no tokens."""
    count = valid.sum().to(kind)

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
    return torch.stack(
        [
            count,
            mean(low) + mean(high),
            mean(capped),
            mean(low),
            mean(high),
            mean(-x),
            mean(r),
            torch.where(any_token, least, 0.0),
            torch.where(any_token, most, 0.0),
            mean(kl),
            mean(entropy),
        ]
    )
