"""Losses that couple the rollouts of a prompt, and the clip range that balances a batch.

Tokens are reduced by `segment_reduce`; what is left is arithmetic on one number per rollout.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from rlkern import _check
from rlkern.ops.segment_reduce import segment_reduce

_OP = "group_policy_loss"
KINDS = ("real", "pacs")


def group_policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    correct: Tensor,
    group_ids: Tensor,
    *,
    kind: str = "real",
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    tau: float = 0.5,
    beta: float = 1.0,
    num_groups: int | None = None,
    log_ratio_clamp: float = 20.0,
) -> Tensor:
    """Rewards as labels: a classification of the rollouts of each prompt by their log-ratio.

    With x = logprob - old_logprob clamped to ±log_ratio_clamp:

        real  s = mean of x over the rollout;  L_g = log(1 + sum over correct exp(-s / tau))
              + log(1 + sum over incorrect exp(s / tau)),  0 for a group that lacks either
        pacs  c = beta sum of x;  z = c - mean of c over the other rollouts of the group;
              L_g = mean over the group of the logistic loss of z and correct

    and the mean of L_g over the groups that have a rollout.

    Args:
        logprob: packed (T,) with cu_seqlens, or padded (B, L) with or without mask.
        old_logprob: same shape.
        correct: (S,) or (B,) bool.
        group_ids: (S,) or (B,) int64 or int32 in [0, num_groups), in any order.
        kind: "real" (2602.05630; tau 0.5 as in ms-swift) or "pacs" (2509.02522; beta 1, 2 in some
            of its scripts; its class balancing is not here).
        cu_seqlens, mask: as in policy_loss.
        num_groups: by default the number of rollouts.

    Returns:
        A float32 scalar, differentiable with respect to logprob.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.
    """
    _check.one_of(_OP, "kind", kind, KINDS)
    for name, value in (("tau", tau), ("beta", beta), ("log_ratio_clamp", log_ratio_clamp)):
        _check.positive(_OP, name, value)
    _check.tensor(_OP, "logprob", logprob)
    _check.dtype(_OP, "logprob", logprob, _check.FLOATS)
    _check.tensor(_OP, "old_logprob", old_logprob)
    _check.shape(_OP, "old_logprob", old_logprob, logprob.shape, "like logprob")
    offsets = _offsets(logprob, cu_seqlens, mask)
    rows = offsets.shape[0] - 1
    for name, value, kinds in (
        ("correct", correct, (torch.bool,)),
        ("group_ids", group_ids, _check.INTEGERS),
    ):
        _check.tensor(_OP, name, value)
        _check.dtype(_OP, name, value, kinds)
        _check.shape(_OP, name, value, (rows,), "(S,)")
    count = rows if num_groups is None else num_groups

    wide = torch.promote_types(logprob.dtype, torch.float32)
    x = (logprob.to(wide) - old_logprob.to(wide)).flatten()
    keep = None if mask is None else mask.flatten()
    x = (
        x.clamp(-log_ratio_clamp, log_ratio_clamp)
        if keep is None
        else _clamped(x, keep, log_ratio_clamp)
    )
    statistic = segment_reduce(x, offsets, kind="mean" if kind == "real" else "sum", mask=keep)

    # the rollouts in the order of their groups, so that sums have one order
    order = group_ids.argsort(stable=True)
    ids = torch.arange(count + 1, device=group_ids.device, dtype=group_ids.dtype)
    groups = torch.searchsorted(group_ids[order].contiguous(), ids)
    s, right, group = statistic[order], correct[order], group_ids[order].long()

    def total(value: Tensor) -> Tensor:
        return segment_reduce(value, groups)

    size = groups.diff()
    filled = (size > 0).sum().clamp(min=1)
    if kind == "pacs":
        c = beta * s
        others = (total(c)[group] - c) / (size[group] - 1).clamp(min=1)
        loss = binary_cross_entropy_with_logits(c - others, right.to(c.dtype), reduction="none")
        return (total(loss) / size.clamp(min=1)).sum() / filled
    both = (total(right.to(s.dtype)) > 0) & (total((~right).to(s.dtype)) > 0)
    loss = s.new_zeros(())
    for side, u in ((right, -s / tau), (~right, s / tau)):
        # log(1 + sum exp(u)) with one shift for all groups: |u| is bounded
        shift = u.detach().clamp(min=0).amax() if rows else s.new_zeros(())
        inside = total(torch.where(side, (u - shift).exp(), 0.0))
        each = softplus((inside.clamp(min=torch.finfo(inside.dtype).tiny)).log() + shift)
        loss = loss + torch.where(both, each, 0.0).sum()
    return loss / filled


def _clamped(x: Tensor, keep: Tensor, bound: float) -> Tensor:
    # masked slots may hold NaN, whose clamp has a NaN gradient
    return torch.where(keep, x, 0.0).clamp(-bound, bound)


def _offsets(logprob: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
    if logprob.ndim == 2:
        if cu_seqlens is not None:
            _check.fail(_OP, "logprob", "of shape (T,) with cu_seqlens", tuple(logprob.shape))
        if mask is not None:
            _check.dtype(_OP, "mask", mask, (torch.bool,))
            _check.shape(_OP, "mask", mask, logprob.shape, "(B, L)")
        rows, columns = logprob.shape
        return torch.arange(rows + 1, device=logprob.device) * columns
    _check.ndim(_OP, "logprob", logprob, "(T,)")
    if cu_seqlens is None or mask is not None:
        _check.fail(_OP, "cu_seqlens", "and no mask with packed log-probs", cu_seqlens)
    return cu_seqlens


@torch.no_grad()
def balanced_clip(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    target: float = 1.0,
    low: tuple[float, float, float] = (0.6, 0.8, 0.05),
    high: tuple[float, float, float] = (1.2, 2.0, 0.05),
    drop_clipped: bool = False,
) -> dict[str, float]:
    """BAPO's search: the narrowest clip range at which positive tokens have their share.

        rho(c_low, c_high) = sum of min(r, c_high) A, A >= 0, over sum of max(r, c_low) |A|, A < 0

    Both bounds start at their first value; while rho is below target, c_low goes up by its step to
    its maximum, then c_high.

    Args:
        logprob, old_logprob, mask: as in policy_loss, of any shape.
        advantages: of the shape of logprob, or (B,) for (B, L).
        target: of rho. The paper's share rho0 of positive tokens is target = rho0 / (1 - rho0).
        low, high: first value, maximum, step: those of the configuration of 2510.18927's code.
        drop_clipped: measures negative tokens by what PPO leaves of them, r |A| where r >= c_low.
            Raising c_low then raises rho; in the published measure it lowers it, so that c_low
            always ends at its maximum where the target is not met.

    Returns:
        {"epsilon_low": 1 - c_low, "epsilon_high": c_high - 1}, for PolicyObjective.preset("bapo",
        **...). One pass makes the sums of every candidate; they cross to the host once.
    """
    a = advantages if advantages.shape == logprob.shape else advantages[:, None]
    valid = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    a = torch.where(valid, a.expand_as(logprob), 0.0).double()
    r = torch.where(valid, logprob.double() - old_logprob.double(), 0.0).clamp(-20, 20).exp()
    lows, highs = _candidates(*low), _candidates(*high)
    up, down = a.clamp(min=0), -a.clamp(max=0)
    gains = [(r.clamp(max=c) * up).sum() for c in highs]
    if drop_clipped:
        costs = [(torch.where(r >= c, r, 0.0) * down).sum() for c in lows]
    else:
        costs = [(r.clamp(min=c) * down).sum() for c in lows]
    sums = torch.stack([*gains, *costs]).tolist()
    gains, costs = sums[: len(highs)], sums[len(highs) :]

    def rho(i: int, j: int) -> float:
        return gains[j] / costs[i] if costs[i] > 0 else float("inf")

    i = j = 0
    while i + 1 < len(lows) and rho(i, j) < target:
        i += 1
    while j + 1 < len(highs) and rho(i, j) < target:
        j += 1
    return {"epsilon_low": 1.0 - lows[i], "epsilon_high": highs[j] - 1.0}


def _candidates(first: float, last: float, step: float) -> list[float]:
    out = [first]
    while out[-1] < last:
        out.append(min(out[-1] + step, last))
    return out


def self_reward_loss(
    logprob: Tensor,
    rewards: Tensor,
    *,
    beta: float = 0.1,
    reference: float = -23.0,
    coef: float = 0.1,
) -> Tensor:
    """LaSeR's last-token self-reward: coef times the mean of (beta (logprob - reference) - R)^2.

    Args:
        logprob: (S,) log-prob of the special token after each answer's end.
        rewards: (S,) of the verifier.
        beta, coef: 0.1 each. reference: the constant that stands for the reference policy's
            log-prob, about -23 for Qwen. The paper's class balancing of correct and incorrect
            answers is the caller's: pass a subset.

    Returns:
        A scalar to add to the policy loss. `beta * (logprob - reference)` is the self-reward that
        the advantages may mix in.
    """
    _check.shape("self_reward_loss", "rewards", rewards, logprob.shape, "(S,)")
    gap = beta * (logprob.float() - reference) - rewards.float()
    return coef * gap.square().sum() / max(gap.numel(), 1)
