"""`quantize_nvfp4` against the time to copy its input, and the same in eager torch.

The limit copies the weight in its own dtype once; without an amax the weight must be read twice.
"""

from typing import NamedTuple

import pytest
import torch

import rlkern
from bench import harness, peers
from bench.harness import Case, Problem
from rlkern.ops.quantize_nvfp4.reference import RECIPES

OP = "quantize_nvfp4"


class Weight(NamedTuple):
    rows: int
    columns: int
    recipe: str
    amax_is_known: bool


SIZES = {"smoke": (128, 256), "1k": (1024, 3072), "4k": (4096, 4096)}
SHAPES = {f"{name} te": Weight(*size, "te", False) for name, size in SIZES.items()}
SHAPES |= {f"4k {recipe}, amax known": Weight(4096, 4096, recipe, True) for recipe in RECIPES}
CASES = [
    Case(shape, dtype)
    for shape, weight in SHAPES.items()
    for dtype in (("float32",) if weight.rows == 128 else ("bfloat16", "float32"))
]
VARIANTS = [harness.LIMIT, "rlkern", "eager", "compile"]


def eager(w: torch.Tensor, amax: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual program in torch: a chain of comparisons, then two codes to a byte."""
    amax = w.abs().max().float() if amax is None else amax
    blocks = w.float().view(w.shape[0], -1, 16)
    encode = 2688 / amax
    scale = (blocks.abs().amax(-1) / 6 * encode).to(torch.float8_e4m3fn)
    x = blocks / (scale.float() / encode)[..., None]
    a = x.abs()
    code = (a > 0.25).to(torch.uint8)
    code += a >= 0.75
    code += a > 1.25
    code += a >= 1.75
    code += a > 2.5
    code += a >= 3.5
    code += a > 5
    code |= x.signbit().to(torch.uint8) << 3
    code = code.view(w.shape)
    return code[:, ::2] | (code[:, 1::2] << 4), scale


def problem(case: Case, device: str) -> Problem:
    weight = SHAPES[case.shape]
    w = torch.randn(weight.rows, weight.columns, device=device) * 0.02
    w = w.to(getattr(torch, case.dtype))
    amax = w.abs().max().float() if weight.amax_is_known else None
    compiled = peers.compiled(eager)
    variants = {
        "rlkern": lambda: rlkern.quantize_nvfp4(w, weight.recipe, amax=amax),
        "eager": lambda: eager(w, amax),
        "compile": lambda: compiled(w, amax),
    }
    sizes = {"rows": weight.rows, "columns": weight.columns}
    return Problem(variants, "copy", sizes, 2 * w.numel() * w.element_size())


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
