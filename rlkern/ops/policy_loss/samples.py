"""Inputs of `policy_loss`: every objective; packed, padded, masked with NaN, empty, long."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkern.ops.policy_loss.reference import Kinds, Numbers

# Fields of the schema's kinds and numbers that samples set, over the defaults of Kinds and Numbers.
FULL = {"kl_coef": 0.25, "entropy_coef": 0.5, "want_entropy_grad": True}
TOKEN_MEAN = {"denominator": 1, "divide_by_length": 0}
GSPO = {"level": 1, "p0": 0.97, "p1": 1.04}
CISPO = {"surrogate": 1, "p0": float("-inf"), "p1": 1.5, **TOKEN_MEAN}
# A line for each surrogate from the third on: what it reads, and the level it is written for.
SURROGATES = {
    "soft_gate": {"p0": 1.0, "p1": 1.05},
    "hazard": {"p0": 1.5, "p1": 1.5, "p2": 1.0, "p3": 2.0, "p4": 0.8, "p5": 1.0},
    "mask": {"p0": 0.8, "p1": 1.27, "p2": 1.5, "from_rollout": 1},
    "dppo_tv": {"p0": 0.02, "p1": 0.03, "p2": 1.4},
    "dppo_kl": {"p0": 0.002, "p1": 0.003, "p2": 1.4},
    "gamma_weight": {"level": 2, "p0": 2.0, "p1": 3.0, "p2": 3.0, "p3": 2.0, "p4": -18.42},
    "flipped": {"p0": 0.8, "p1": 1.2, "p2": 1.3},
    "quadratic": {"p0": 0.3},
    "regression": {"p0": 0.4},
    "dynamic": {"p0": 0.02, "p1": 0.03, "p2": 10.0, "log_ratio_clamp": float("inf")},
    "geometric": {"level": 1, "p0": -0.1, "p1": 0.12},
    "reinforce": {},
    "shaped": {"p0": 0.1},
    "balanced": {"p0": 0.5},
    "squared": {"p0": 0.9},
    "hinge": {"p0": 0.11, "p1": 0.07, "p2": 0.6},
    "tapered": {"p0": 0.9, "p1": 0.7},
    "banded": {"level": 2, "p0": 0.31},
}
CORRECTIONS = {
    "truncated by token": {"correction": 1, "correction_high": 1.2},
    "masked by token": {
        "correction": 1,
        "correction_masks": 1,
        "correction_low": 0.9,
        "correction_high": 1.2,
    },
    "truncated by sequence": {"correction": 2, "correction_low": 0.5, "correction_high": 1.5},
    "masked by the geometric mean": {
        "correction": 3,
        "correction_masks": 1,
        "correction_low": 0.97,
        "correction_high": 1.2,
    },
    "tokens rejected": {
        "token_rejection": 1,
        "token_rejection_low": -0.1,
        "token_rejection_high": 0.2,
        "correction": 1,
    },
    "sequences rejected": {
        "sequence_rejection": 2,
        "rejection_reduction": 2,
        "sequence_rejection_high": 0.02,
        "count_rejected": 1,
    },
    "both rejected": {
        "token_rejection": 3,
        "token_rejection_high": 0.03,
        "sequence_rejection": 3,
        "rejection_reduction": 3,
        "sequence_rejection_high": 0.15,
    },
    "off-policy sequences": {"off_policy_limit": 0.01},
}


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
        cu_segments: Tensor | None = None,
        rollout: bool = False,
        want_grad: bool = True,
        want_entropy_grad: bool = False,
        **options,
    ) -> tuple:
        """The rollout's log-probs where asked for, KL and entropy where they have a term."""
        logprob = -0.05 - self.normal(*shape).abs() * 1.5
        old = (logprob + self.normal(*shape, scale=spread)).clamp(max=-0.01)
        behind = old + self.normal(*shape, scale=0.1) if rollout else None
        chosen = self.normal(*shape).relu() if options.get("nll_coef") else None
        full = options.get("kl_coef", 0.0) != 0
        ref = logprob + self.normal(*shape, scale=0.5) if full else None
        entropy = self.normal(*shape).abs() if full else None
        if mask is not None:
            for value in (logprob, old, behind, ref, entropy, chosen):
                if value is not None:
                    value[~mask] = float("nan")
        kinds = Kinds(**{k: v for k, v in options.items() if k in Kinds._fields})
        numbers = Numbers(**{k: v for k, v in options.items() if k in Numbers._fields})
        return (
            *(logprob, old, advantages, cu_seqlens, mask, behind, ref, entropy, chosen),
            *(cu_segments, list(kinds), list(numbers), want_grad, want_entropy_grad),
        )

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
    yield "advantage per token", make.packed(30, 4, 61, per_token=True, **TOKEN_MEAN)
    yield "padded", make.padded(5, 23)
    yield "padded, several blocks", make.padded(3, 1111, **FULL)
    yield "padded, advantage per token", make.padded(4, 33, per_token=True, **FULL)
    yield "no columns", make.padded(3, 0)
    nothing = torch.zeros(4, 19, dtype=torch.bool, device=device)
    yield "everything masked", make.args((4, 19), make.normal(4), mask=nothing, **FULL)
    yield "token sum", make.packed(8, 24, denominator=0, divide_by_length=0, scale=0.125)
    yield "sequence sum", make.packed(8, 0, 24, divide_by_length=0, scale=0.125)
    yield "count empty", make.packed(8, 0, 24, denominator=3)
    yield "gspo", make.packed(90, 7, 0, 1200, spread=0.2, **GSPO)
    yield "gspo, padded", make.padded(6, 50, spread=0.2, **GSPO, **FULL)
    yield "cispo", make.packed(64, 9, **CISPO)
    yield "cispo, padded", make.padded(3, 40, **CISPO, **FULL)
    for kl_type in range(6):
        options = {"kl_type": kl_type, "kl_input_clamp": 0.9, "kl_output_clamp": 0.3}
        yield f"KL {kl_type} with clamps", make.packed(20, 33, **FULL, **options)
    corrected = {"kl_times_ratio": 1, **FULL}
    yield "KL times ratio", make.packed(20, 33, **corrected)
    yield "KL times sequence ratio", make.padded(5, 33, **corrected, **GSPO)
    band = {"entropy_low": 0.4, "entropy_high": 0.9}
    band |= {"entropy_low_coef": 0.3, "entropy_high_coef": 0.2}
    yield "entropy band", make.packed(20, 33, **FULL, **band)
    yield "entropy band from a threshold", make.padded(4, 33, **FULL, **band, entropy_from=0.3)
    yield "likelihood", make.packed(20, 0, 33, nll_coef=0.3)
    yield "likelihood, padded", make.padded(5, 33, nll_coef=0.3, **FULL)
    for number, (name, options) in enumerate(SURROGATES.items()):
        options = {"surrogate": 2 + number, "rollout": "from_rollout" in options, **options}
        if number % 3:
            yield name, make.packed(41, 0, 24, **options)
        else:
            yield f"{name}, padded", make.padded(3, 20, per_token=True, **FULL, **options)
    for number, (name, options) in enumerate(CORRECTIONS.items()):
        if number % 2:
            yield name, make.packed(30, 0, 26, 3, rollout=True, **options)
        else:
            yield f"{name}, padded", make.padded(5, 20, rollout=True, **FULL, **options)
    prefixes = ((3, "prefix minimum"), (4, "prefix mean"), (5, "capped prefix minimum"))
    for level, name in prefixes:
        options = CISPO | {"level": level, "p1": 1.1}
        yield name, make.packed(40, 0, 1, 2500, 9, **options)
        yield f"{name}, padded", make.padded(4, 37, rollout=True, from_rollout=1, **options)
    segments = make.offsets(4, 30, 0, 16, 6, 14)
    yield "segments", make.packed(50, 20, cu_segments=segments, **GSPO)
    segments = make.offsets(5, 0, 61)
    yield (
        "segments, advantage per token",
        make.packed(40, 26, per_token=True, cu_segments=segments, **FULL, **GSPO),
    )
    yield "wide ratios", make.packed(50, 50, spread=3.0, log_ratio_clamp=2.0)
    flat = make.args((45,), make.normal(45), **TOKEN_MEAN)
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
