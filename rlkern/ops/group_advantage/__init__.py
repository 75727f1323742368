"""Advantages of rollouts relative to the other rollouts of the same prompt."""

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.group_advantage import op as op
from rlkern.ops.group_advantage.reference import KINDS

_OP = "group_advantage"


def group_advantage(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    kind: str = "grpo",
    num_groups: int | None = None,
    epsilon: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantage of each rollout over its group, which is the rollouts of one prompt.

        grpo       (r - mean_g) / (std_g + epsilon)
        dr_grpo     r - mean_g
        rloo        r - mean of the other rows of the group
        batch_std  (r - mean_g) / (std of all rows + epsilon)

    mean_g and std_g are of the row's group; std has n - 1 in its denominator. Equivalent torch
    program when every group is G consecutive rows::

        r = rewards.float().view(-1, G)
        grpo = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + epsilon)

    Args:
        rewards: (N,) float32, bfloat16, float16 or float64; not differentiated.
        group_ids: (N,) int64 or int32 in [0, num_groups), in any order. Groups may have any size,
            and may be empty.
        kind: "grpo", "dr_grpo", "rloo" or "batch_std".
        num_groups: by default N, which is enough for ids without gaps.
        epsilon: added to a standard deviation; at least 0.
        mask: (N,) bool; a False row counts nowhere, may hold NaN, and has advantage 0.

    Returns:
        (N,) float32. A group of one row, and a group of equal rewards, have advantages of exactly
        0, whatever the kind and epsilon. A NaN or infinite reward makes its group NaN, and with
        "batch_std" every row.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or number that does not fit; on CPU also
            an id out of range. On other devices, and under torch.compile, the values of ids are not
            looked at: a row whose id is out of range gets NaN and counts nowhere.

    Sums are taken in float64, in row order within each group: two runs give the same bits, and
    mixing the rows of different groups in another order changes none.
    """
    _check.tensor(_OP, "rewards", rewards)
    _check.dtype(_OP, "rewards", rewards, _check.FLOATS)
    _check.ndim(_OP, "rewards", rewards, "(N,)")
    rows = rewards.shape[0]
    _check.tensor(_OP, "group_ids", group_ids)
    _check.dtype(_OP, "group_ids", group_ids, _check.INTEGERS)
    _check.shape(_OP, "group_ids", group_ids, (rows,), "(N,)")
    _check.same_device(_OP, "group_ids", group_ids, "rewards", rewards.device)
    _check.one_of(_OP, "kind", kind, KINDS)
    if num_groups is None:
        num_groups = rows
    elif isinstance(num_groups, bool) or not isinstance(num_groups, int | torch.SymInt):
        got = type(num_groups).__name__
        raise TypeError(f"{_OP}: expected num_groups to be an int, got {got}")
    elif num_groups < 0:
        _check.fail(_OP, "num_groups", "to be at least 0", num_groups)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
        raise TypeError(f"{_OP}: expected epsilon to be a number, got {type(epsilon).__name__}")
    if not 0 <= epsilon < float("inf"):
        _check.fail(_OP, "epsilon", "to be finite and at least 0", epsilon)
    if mask is not None:
        _check.tensor(_OP, "mask", mask)
        _check.dtype(_OP, "mask", mask, (torch.bool,))
        _check.shape(_OP, "mask", mask, (rows,), "(N,)")
        _check.same_device(_OP, "mask", mask, "rewards", rewards.device)
        mask = mask.contiguous()
    group_ids = group_ids.long().contiguous()
    if rows and group_ids.is_cpu and not torch.compiler.is_compiling():
        _check_range(group_ids, mask, num_groups)
    advantages = torch.ops.rlkern.group_advantage(
        rewards.detach().contiguous(),
        group_ids,
        mask,
        KINDS.index(kind),
        num_groups,
        float(epsilon),
    )
    return advantages.float()


def _check_range(group_ids: Tensor, mask: Tensor | None, num_groups: int) -> None:
    low, high = torch.aminmax(group_ids)
    if low >= 0 and high < num_groups:
        return
    outside = (group_ids < 0) | (group_ids >= num_groups)
    if mask is not None:
        outside &= mask
    if not outside.any():
        return
    where = int(outside.nonzero()[0])
    got = f"{int(group_ids[where])} at position {where}"
    _check.fail(_OP, "group_ids", f"in [0, num_groups = {num_groups})", got)
