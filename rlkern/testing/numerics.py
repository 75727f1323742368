"""The error budget: element by element no worse than plain torch in the same dtype.

|ours - fp64| <= |torch - fp64| + slack
"""

import torch
from torch import Tensor

# Units in the last place of an element that ours may be off where torch happens to be exact.
# Sixteen in float32 cover a sum of 1e5 terms in another order; in 16 bits, one rounding.
SLACK_ULPS = {torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 2.0, torch.float64: 64.0}


def to_double(args: tuple) -> tuple:
    """The same arguments with every floating tensor in float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def assert_within_budget(
    what: str, ours: Tensor, truth: Tensor, torchs: Tensor, float32_ulps: float = 16.0
) -> None:
    """Fails with the name, the worst index and the three values there.

    float32_ulps: how far, in float32 units of the largest element, ours may be off where torch
    happens to be exact: more for results that are sums in another order.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    if ours.numel() == 0:
        return
    got, want, peer = ours.detach().double(), truth.detach().double(), torchs.detach().double()
    got, peer = got.to(want.device), peer.to(want.device)
    regular = want.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    assert bool((same | regular).all()), (
        f"{what}: {got[~regular & ~same][0].item()} where fp64 has {want[~regular & ~same][0]}"
    )
    eps = torch.finfo(ours.dtype).eps
    rounding = SLACK_ULPS[ours.dtype] * eps * want.abs()
    scale = want[regular].abs().max().clamp(min=1.0) if bool(regular.any()) else want.new_ones(())
    floor = float32_ulps * torch.finfo(torch.float32).eps * scale
    # a NaN of torch's own (it rounds to bf16, we do not) is no licence: treat it as exact
    budget = (peer - want).abs().nan_to_num(0.0, 0.0) + rounding + floor
    excess = torch.where(regular, (got - want).abs() - budget, 0.0)
    excess = torch.where(regular & got.isnan(), float("inf"), excess)
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape))
        ours_w, fp64_w, torch_w = (x.flatten()[worst].item() for x in (got, want, peer))
        raise AssertionError(
            f"{what}: at {index} ours {ours_w!r}, fp64 {fp64_w!r}, torch {torch_w!r}: "
            f"error {abs(ours_w - fp64_w):.3e} over a budget of {budget.flatten()[worst]:.3e}"
        )


def assert_same_bits(what: str, a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype, f"{what}: dtype {a.dtype}, not {b.dtype}"
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, not {tuple(b.shape)}"
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.detach().contiguous().view(kind) != b.detach().contiguous().view(kind)
    assert not bool(differ.any()), f"{what}: {int(differ.sum())} of {a.numel()} elements differ"
