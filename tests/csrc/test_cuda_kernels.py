"""CUDA C++ kernels without a GPU: run thread by thread on the CPU against the reference; and what
nvcc made of them for the GPUs that they are for: instructions, spills."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ops import checks
from ops.test_quantize_fp8 import awkward as awkward_fp8
from ops.test_quantize_nvfp4 import awkward as awkward_nvfp4
from torch.utils import cpp_extension

from rlkern import _native
from rlkern.ops.quantize_fp8 import reference as fp8
from rlkern.ops.quantize_fp8 import samples as fp8_samples
from rlkern.ops.quantize_nvfp4 import reference as nvfp4
from rlkern.ops.quantize_nvfp4 import samples as nvfp4_samples
from rlkern.testing.numerics import assert_same_bits

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("g++")
INCLUDE = [f"-I{ROOT / 'csrc/include'}", *(f"-I{p}" for p in cpp_extension.include_paths())]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT64, FLOAT, BOOL = ctypes.c_int64, ctypes.c_float, ctypes.c_bool


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The CUDA kernels as a library for the CPU."""
    if COMPILER is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("cuda") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror"]
    source = str(HERE / "cuda_quantize.cpp")
    subprocess.run([COMPILER, *flags, *INCLUDE, source, "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.rlk_fp8_grid.restype = library.rlk_nvfp4_grid.restype = INT64
    return library


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def counters(wanted, grid):
    """(rows, sums) full of NaN."""
    rows = torch.full((grid if wanted else 0, 5), float("nan"))
    return rows, torch.full((5 if wanted else 0,), float("nan"), dtype=torch.float64)


def run_fp8(library, w, amax, previous, high, wide, order, *rule):
    *floors, power_of_two, statistics = rule
    rows, columns = w.shape
    down = -(-rows // high) if high else min(rows, 1)
    across = -(-columns // wide) if wide else min(columns, 1)
    codes = torch.full((rows, columns), 0xA5, dtype=torch.uint8)
    mx = order >= fp8.FIRST_MX
    scales = torch.full((down, across), 0xA5 if mx else float("nan"))
    scales = scales.to(torch.uint8) if mx else scales
    args = (INT64(high), INT64(wide), INT64(rows), INT64(columns))
    counts, sums = counters(statistics, library.rlk_fp8_grid(*args))
    most = torch.zeros(1, dtype=torch.int32) if (high, wide) == (0, 0) and amax is None else None
    library.rlk_quantize_fp8(
        KINDS[w.dtype],
        *(pointer(x) for x in (w, amax, previous, codes)),
        *((None, pointer(scales)) if mx else (pointer(scales), None)),
        pointer(counts),
        *(INT64(n) for n in (rows, columns, high, wide, order)),
        *(FLOAT(x) for x in floors),
        BOOL(power_of_two),
        pointer(most),
        pointer(sums) if statistics else None,
    )
    return codes, scales, sums


def run_nvfp4(library, w, amax, previous, recipe, square, rule, stochastic, seed, statistics):
    rows, columns = w.shape
    codes = torch.full((rows, columns // 2), 0xA5, dtype=torch.uint8)
    scales = torch.full((rows, columns // 16), 0xA5, dtype=torch.uint8)
    decode = torch.full((), float("nan"))
    grid = library.rlk_nvfp4_grid(INT64(rows), INT64(columns), BOOL(square))
    counts, sums = counters(statistics, grid)
    most = torch.zeros(1, dtype=torch.int32) if amax is None else None
    library.rlk_quantize_nvfp4(
        KINDS[w.dtype],
        *(pointer(x) for x in (w, amax, previous, codes, scales, decode, counts)),
        *(INT64(n) for n in (rows, columns, recipe)),
        BOOL(square),
        INT64(rule),
        BOOL(stochastic),
        INT64(seed),
        pointer(most),
        pointer(sums) if statistics else None,
    )
    return codes, scales, decode, sums


def misaligned(w):
    """The same values from an address that is not a multiple of 16."""
    return torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_fp8_writes_the_bytes_of_the_reference(kernels, dtype):
    cases = list(fp8_samples.sample_inputs("cpu", dtype))
    hard = awkward_fp8(256, 640).to(dtype)
    before = torch.randint(0, 256, hard.shape, dtype=torch.uint8)
    for high, wide in ((0, 0), (1, 0), (1, 128), (128, 128), (1, 32)):
        for order in range(fp8.RCEIL, 8) if wide == 32 else range(fp8.RCEIL):
            rest = (None, before, high, wide, order, 0.0, 0.0, 1.0, order % 2 == 1, True)
            cases.append((f"awkward {high} x {wide}, order {order}", (hard, *rest)))
            cases.append((f"misaligned {high} x {wide}", (misaligned(hard), *rest)))
    # more than a step of a row's threads
    long = torch.randn(3, 9000).to(dtype)
    cases.append(("long rows", (long, None, None, 1, 0, fp8.DIVIDE, 0.0, 0.0, 1.0, False, True)))
    for name, args in cases:
        ours, want = run_fp8(kernels, *args), fp8.forward(*args)
        assert_same_bits(f"{name} scales", ours[1], want[1])
        assert_same_bits(f"{name} codes", ours[0], want[0])
        checks.assert_same_counts(name, ours[2], want[2])


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_nvfp4_writes_the_bytes_of_the_reference(kernels, dtype):
    cases = list(nvfp4_samples.sample_inputs("cpu", dtype))
    hard = awkward_nvfp4(48, 1104).to(dtype)
    before = torch.randint(0, 256, (48, 552), dtype=torch.uint8)
    given = [None, *(torch.tensor(a) for a in (3.0, float("nan"), 1e-37))]
    for recipe, name in enumerate(nvfp4.RECIPES):
        for square in (False, True):
            for i, amax in enumerate(given):
                args = (hard, amax, before, recipe, square, 0, i % 2 == 1, 2**62 + 3, True)
                cases.append((f"awkward {name} {square} {amax}", args))
            args = (misaligned(hard), None, misaligned(before), recipe, square, 0, False, 0, True)
            cases.append((f"misaligned {name} {square}", args))
        for rule in (1, 2) if name in ("te", "fouroversix") else ():
            args = (hard, None, None, recipe, False, rule, False, 0, True)
            cases.append((f"awkward {name} rule {rule}", args))
    for name, args in cases:
        ours, want = run_nvfp4(kernels, *args), nvfp4.forward(*args)
        assert_same_bits(f"{name} scales", ours[1], want[1])
        assert_same_bits(f"{name} codes", ours[0], want[0])
        torch.testing.assert_close(ours[2], want[2], rtol=0, atol=0, equal_nan=True, msg=name)
        checks.assert_same_counts(name, ours[3], want[3])


@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_compiled_kernels_convert_by_instruction_and_spill_nothing(arch):
    library = _native.path_of("_C_cuda")
    tools = pytest.importorskip("rlkern.testing.cuda_resources", reason="triton has cuobjdump")
    if library is None or arch not in tools.archs_of(library):
        pytest.skip(f"_C_cuda was not built for {arch}")
    rows = tools.resources(library, arch)
    assert {row["local_bytes"] for row in rows} == {0}
    converts = {"fp8": {"E4M3"}, "nvfp4": {"E2M1"} if arch == "100a" else set()}
    for row in rows:
        kinds = converts.get(row["kernel"].split("_")[0], set())
        assert set(row["conversions"]) == kinds, row
