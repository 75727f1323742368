"""Generalised advantage estimation: token advantages and returns from rewards and a critic."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.gae import op as op

_OP = "gae"


class GaeOutput(NamedTuple):
    """Both float32, of the shape of the inputs, and 0 where a token does not count."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = False,
) -> GaeOutput:
    """Generalised advantage estimation, and the returns that a critic is fitted to.

        A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}       V and A are 0 past the end
        returns_t = A_t + V_t
        whitened: (A_t - mean) / sqrt(var + 1e-8)                 over all tokens that count

    t + 1 is the next token of the sequence that counts: observations between turns are stepped
    over. Equivalent torch program for one sequence without a mask::

        for t in reversed(range(T)):
            after = values[t + 1] if t + 1 < T else 0
            carry = rewards[t] + gamma * after - values[t] + gamma * lam * carry
            advantages[t] = carry

    Args:
        rewards: of each token. Packed (T,) with cu_seqlens, or padded (B, L). Most are 0 where only
            the whole answer is rewarded. Not differentiated, like values.
        values: same shape; the critic's value of the state before each token. Zeros and lam = 1
            give discounted returns, whitened those of REINFORCE++.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to T, not decreasing: sequence i is
            [cu_seqlens[i], cu_seqlens[i + 1]). The values are checked on the CPU only; on other
            devices tokens outside of all sequences do not count.
        mask: same shape as rewards, bool, True where a token counts; all count without it. Masked
            slots may hold anything, NaN included, rewards too.
        gamma: discount in [0, 1].
        lam: in [0, 1]; 0 is the one-step error, 1 the return less the value.
        whiten: standardise advantages over the whole call, as verl does. Returns stay as they are.

    Returns:
        GaeOutput(advantages, returns). A NaN reward or value reaches the tokens before it in its
        sequence; with whiten all advantages.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit.

    Computed in float64 and rounded once: two runs give the same bits, whatever the number of
    threads. Schulman et al., arXiv 1506.02438; verl's compute_gae_advantage_return.
    """
    _check.tensor(_OP, "rewards", rewards)
    _check.dtype(_OP, "rewards", rewards, _check.FLOATS)
    padded = rewards.ndim == 2
    if not padded and rewards.ndim != 1:
        _check.fail(_OP, "rewards", "of shape (T,) or (B, L)", tuple(rewards.shape))
    symbols = "(B, L)" if padded else "(T,)"
    for name, value, allowed in (("values", values, _check.FLOATS), ("mask", mask, (torch.bool,))):
        if value is None and name == "mask":
            continue
        _check.tensor(_OP, name, value)
        _check.dtype(_OP, name, value, allowed)
        _check.shape(_OP, name, value, rewards.shape, symbols)
        _check.same_device(_OP, name, value, "rewards", rewards.device)
    if padded:
        if cu_seqlens is not None:
            _check.fail(_OP, "rewards", "of shape (T,) with cu_seqlens", tuple(rewards.shape))
        rows, columns = rewards.shape
        cu_seqlens = torch.arange(rows + 1, device=rewards.device) * columns
    else:
        _check.offsets(_OP, cu_seqlens, "rewards", rewards)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{_OP}: expected {name} to be a number, got {type(value).__name__}")
        if not 0 <= value <= 1:
            _check.fail(_OP, name, "in [0, 1]", value)
    double = torch.float64 in (rewards.dtype, values.dtype)
    kind = torch.float64 if double else torch.float32
    advantages, returns = torch.ops.rlkern.gae(
        rewards.detach().to(kind).reshape(-1).contiguous(),
        values.detach().to(kind).reshape(-1).contiguous(),
        cu_seqlens.contiguous(),
        None if mask is None else mask.reshape(-1).contiguous(),
        float(gamma),
        float(lam),
        whiten,
    )
    return GaeOutput(advantages.float().view(rewards.shape), returns.float().view(rewards.shape))
