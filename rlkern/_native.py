"""Loads the compiled libraries once, and remembers why one could not be loaded."""

import os
import re
from pathlib import Path

import torch

BACKENDS = ("auto", "reference", "triton", "native")
BACKEND = os.environ.get("RLKERN_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise RuntimeError(f"RLKERN_BACKEND: expected one of {', '.join(BACKENDS)}, got {BACKEND!r}")

REBUILD = "rebuild with `make setup`, or `pip install --no-build-isolation -e .`"


def path_of(library: str) -> Path | None:
    """Where the compiled library lies, or None."""
    return next(iter(sorted(Path(__file__).parent.glob(f"{library}*.so"))), None)


def cuda_archs(path: Path) -> str:
    """The architectures that `_C_cuda` was built for, without loading it (that needs libcuda)."""
    found = re.search(rb"rlkern_cuda_archs=(\w+);", path.read_bytes())
    return found[1].decode().replace("_", ", ") if found else "unknown architectures"


def _load(library: str) -> str:
    """'' when the library is loaded, else the reason why not."""
    path = path_of(library)
    if path is None:
        return f"{library} was not built ({REBUILD})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{library} could not be loaded: {error.__cause__ or error}"
    return ""


def _cpu_reason() -> str:
    if BACKEND in ("reference", "triton"):
        return f"RLKERN_BACKEND={BACKEND}"
    return _load("_C_cpu")


def _cuda_reason() -> str:
    if BACKEND != "native":
        # Triton owns CUDA until a measurement says that the CUDA C++ kernel is faster.
        return "CUDA C++ kernels are used with RLKERN_BACKEND=native only"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return _load("_C_cuda")


MISSING = {"CPU": _cpu_reason(), "CUDA": _cuda_reason()}
"""Why the native library of a dispatch key is not loaded; '' when it is."""
