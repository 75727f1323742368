"""Inputs of `policy_loss`: every objective; packed, padded, masked with NaN, empty, long."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Positions of the schema's scalars, in its order.
SCALARS = {
    "sequence_level": False,
    "surrogate": 0,
    "ratio_low": 0.8,
    "ratio_high": 1.28,
    "ratio_cap": 3.0,
    "log_ratio_clamp": 20.0,
    "kl_type": 3,
    "kl_coef": 0.0,
    "kl_input_clamp": 20.0,
    "kl_output_clamp": float("inf"),
    "entropy_coef": 0.0,
    "denominator": 2,
    "divide_by_length": True,
    "scale": 1.0,
    "want_grad": True,
    "want_entropy_grad": False,
}
FULL = {"kl_coef": 0.25, "entropy_coef": 0.5, "want_entropy_grad": True}
GSPO = {"sequence_level": True, "ratio_low": 0.97, "ratio_high": 1.04}
CISPO = {"surrogate": 1, "ratio_low": float("-inf"), "ratio_high": 1.5, "denominator": 1}


@dataclass
class _Maker:
    device: str
    dtype: torch.dtype
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.random) * scale
        return values.to(self.dtype).float().to(self.device)

    def args(
        self,
        shape: tuple[int, ...],
        advantages: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        spread: float = 0.3,
        **scalars,
    ) -> tuple:
        """All four token inputs where the objective has a KL or entropy term, else two."""
        logprob = self.normal(*shape) - 2.0
        old = logprob + self.normal(*shape, scale=spread)
        full = scalars.get("kl_coef", 0.0) != 0
        ref = logprob + self.normal(*shape, scale=0.5) if full else None
        entropy = self.normal(*shape).abs() if full else None
        if mask is not None:
            for value in (logprob, old, ref, entropy):
                if value is not None:
                    value[~mask] = float("nan")
        tensors = (logprob, old, advantages, cu_seqlens, mask, ref, entropy)
        return (*tensors, *(SCALARS | scalars).values())

    def offsets(self, *lengths: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(self.device, dtype)

    def packed(self, *lengths: int, per_token: bool = False, **options) -> tuple:
        tokens = sum(lengths)
        advantages = self.normal(tokens if per_token else len(lengths))
        return self.args((tokens,), advantages, self.offsets(*lengths), **options)

    def padded(self, rows: int, columns: int, per_token: bool = False, **options) -> tuple:
        advantages = self.normal(rows, columns) if per_token else self.normal(rows)
        lengths = torch.randint(columns + 1, (rows,), generator=self.random)
        # holes, as tool output leaves them
        holes = torch.rand(rows, columns, generator=self.random) < 0.2
        mask = (torch.arange(columns) < lengths[:, None]) & ~holes
        return self.args((rows, columns), advantages, mask=mask.to(self.device), **options)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call.

    The op itself computes in float32: `dtype` rounds the values.
    """
    make = _Maker(device, dtype)
    yield "packed", make.packed(3, 17, 1, 40)
    yield "several blocks", make.packed(700, 2049, 5, 1500, **FULL)
    yield "empty sequences", make.packed(0, 0, 5, 0, 9, 0, **FULL)
    yield "all empty", make.packed(0, 0, 0)
    yield "no sequences", make.packed()
    yield "one token", make.packed(1)
    yield "advantage per token", make.packed(30, 4, 61, per_token=True, denominator=1)
    yield "padded", make.padded(5, 23)
    yield "padded, several blocks", make.padded(3, 1111, **FULL)
    yield "padded, advantage per token", make.padded(4, 33, per_token=True, **FULL)
    yield "no columns", make.padded(3, 0)
    nothing = torch.zeros(4, 19, dtype=torch.bool, device=device)
    yield "everything masked", make.args((4, 19), make.normal(4), mask=nothing, **FULL)
    yield "token sum", make.packed(8, 24, denominator=0, divide_by_length=False, scale=0.125)
    yield "sequence sum", make.packed(8, 0, 24, denominator=2, divide_by_length=False, scale=0.125)
    yield "count empty", make.packed(8, 0, 24, denominator=3)
    yield "gspo", make.packed(90, 7, 0, 1200, spread=0.2, **GSPO)
    yield "gspo, padded", make.padded(6, 50, spread=0.2, **GSPO, **FULL)
    yield "cispo", make.packed(64, 9, **CISPO)
    yield "cispo, padded", make.padded(3, 40, **CISPO, **FULL)
    for kl_type in (1, 2, 3):
        options = {"kl_type": kl_type, "kl_input_clamp": 0.9, "kl_output_clamp": 0.3}
        yield f"k{kl_type} with clamps", make.packed(20, 33, **FULL, **options)
    yield "wide ratios", make.packed(50, 50, spread=3.0, log_ratio_clamp=2.0)
    flat = make.args((45,), make.normal(45), denominator=1, divide_by_length=False)
    yield "no cu_seqlens", flat
    plain = list(make.packed(12, 20))
    plain[-2] = False
    yield "no gradient", tuple(plain)
    wide = list(make.packed(12, 20))
    wide[3] = wide[3].long()
    yield "int64 cu_seqlens", tuple(wide)


def bytes_and_flops(tokens: int, inputs: int, itemsize: int = 4) -> tuple[int, int]:
    """What forward and backward must move and compute: `inputs` per-token tensors read, one
    gradient written; some 70 flops a token."""
    return (inputs + 1) * tokens * itemsize, 70 * tokens
