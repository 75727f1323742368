"""Builds `_C_cpu` and, when a CUDA toolkit is present, `_C_cuda`, both on torch's stable ABI, and,
with pybind11, `_C_host` for the Python at hand.

Environment: RLKERN_BUILD_CUDA=auto|0|1 (auto: a toolkit exists; no GPU is looked for),
RLKERN_CUDA_ARCHS="80;90a;100a", RLKERN_PURE=1 (Python alone), DEBUG=1, MAX_JOBS. See docs/build.md.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()


def cuda_home() -> Path | None:
    """The toolkit's root: $CUDA_HOME, or where nvcc lies, or /usr/local/cuda."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    # A wrapper script named nvcc on the PATH says nothing of the toolkit's root: test for a header.
    candidates += [Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    for path in candidates:
        if path and (Path(path) / "include/cuda_runtime.h").exists():
            return Path(path).resolve()
    return None


def wants_cuda(home: Path | None) -> bool:
    mode = os.environ.get("RLKERN_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"RLKERN_BUILD_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "1" and home is None:
        raise SystemExit("RLKERN_BUILD_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
    return mode != "0" and home is not None


def nvcc(home: Path, *args: str) -> str:
    return subprocess.check_output([str(home / "bin/nvcc"), *args], text=True)


def cuda_archs(home: Path) -> list[str]:
    """RLKERN_CUDA_ARCHS, or every architecture of those that the build is tested for."""
    listed = nvcc(home, "--list-gpu-arch").replace("compute_", "").split()
    can = {arch + kind for arch in listed for kind in ("", "a") if not kind or int(arch) >= 90}
    can |= {f"{arch}f" for arch in listed if int(arch) >= 100}
    asked = [name for name in re.split("[;, ]+", os.environ.get("RLKERN_CUDA_ARCHS", "")) if name]
    if bad := [name for name in asked if name not in can]:
        names = ", ".join(sorted(can, key=lambda name: (int(name.rstrip("af")), name)))
        got = ", ".join(bad)
        raise SystemExit(f"RLKERN_CUDA_ARCHS: got {got}; nvcc {release(home)} can build {names}")
    return asked or [arch for arch in ("80", "90a", "100a") if arch in can]


def release(home: Path) -> str:
    return re.search(r"release (\d+\.\d+)", nvcc(home, "--version"))[1]


def gencode(names: list[str]) -> list[str]:
    """One cubin per architecture, and PTX of the lowest for GPUs newer than the list."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names]
    lowest = min(names, key=lambda a: int(a.rstrip("af")))
    if lowest.isdigit():
        flags.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    return flags


HOME = cuda_home()
PURE = os.environ.get("RLKERN_PURE", "0") == "1"
BUILD_CUDA = wants_cuda(HOME) and not PURE
if HOME:
    # torch reads CUDA_HOME when it is imported.
    os.environ["CUDA_HOME"] = str(HOME)

import torch.utils.cpp_extension as cpp_extension  # noqa: E402

DEBUG = os.environ.get("DEBUG", "0") == "1"
HOST = ["-std=c++20", "-O0" if DEBUG else "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"]
# 2.10: the first release whose stable ABI has parallel_for; the binary serves every later one.
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
CXX = [
    *("-std=c++20", "-g" if DEBUG else "-g0", "-O0" if DEBUG else "-O3"),
    # torch's headers and vector types as template arguments
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter", "-Wno-ignored-attributes"),
    # Neither changes a result; both keep loops from being vectorised.
    *("-fno-math-errno", "-fno-trapping-math"),
    # Error messages carry source paths: not the build machine's.
    f"-fmacro-prefix-map={ROOT}/=",
    *STABLE,
]
LINK, LIBRARIES = [], []
if sys.platform == "linux":
    LINK = [f"-Wl,--version-script={ROOT}/csrc/torch/exports.map"] + ["-Wl,-s"] * (not DEBUG)
    # before torch's: libc10 exports a few of its templates, which would be taken from there
    LIBRARIES = ["stdc++"]
INCLUDE = [str(ROOT / "csrc/include"), str(ROOT / "csrc/torch")]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(f"*{suffix}"))


def headers() -> list[str]:
    return [str(p) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")]


def stable(name: str, files: list[str], **options) -> Extension:
    """A library on torch's stable ABI: for every Python and every torch from 2.10 on."""
    options["include_dirs"] = INCLUDE + options.get("include_dirs", [])
    options["libraries"] = LIBRARIES + options.get("libraries", [])
    options["extra_link_args"] = LINK + options.get("extra_link_args", [])
    options |= {"depends": headers(), "py_limited_api": True}
    return cpp_extension.CppExtension(name, files, **options)


tag, extensions = "", []
if not PURE:
    cpu = stable("rlkern._C_cpu", sources("csrc/cpu", ".cpp"), extra_compile_args={"cxx": CXX})
    extensions.append(cpu)
if HAS_PYBIND := not PURE and importlib.util.find_spec("pybind11") is not None:
    import pybind11

    host = Extension("rlkern._C_host", sources("csrc/host", ".cpp"), [pybind11.get_include()])
    host.depends, host.extra_compile_args = headers(), {"cxx": HOST}
    host.extra_link_args = LINK[1:]
    extensions.append(host)
if BUILD_CUDA:
    # torch leaves it None when it has no CUDA itself: it can still build for a torch that has.
    cpp_extension.CUDA_HOME = str(HOME)
    archs = cuda_archs(HOME)
    tag = f"+cu{release(HOME).replace('.', '')}." + ".".join(f"sm{arch}" for arch in archs)
    prefix = f"-Xcompiler=-fPIC,-fmacro-prefix-map={ROOT}/="
    nvcc_flags = ["-std=c++20", "-O3", prefix, *STABLE, "-DUSE_CUDA", *gencode(archs)]
    cuda = stable(
        "rlkern._C_cuda",
        sources("csrc/cuda", ".cu") + sources("csrc/cuda", ".cpp"),
        include_dirs=[str(HOME / "include")],
        library_dirs=[str(HOME / "lib64"), str(HOME / "lib")],
        libraries=["cudart"],
        # by way of libtorch, which has libtorch_cuda with it where torch has CUDA: a CPU-only
        # torch can still build it
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
        define_macros=[("RLKERN_CUDA_ARCHS", "_".join(archs))],
        extra_compile_args={"cxx": CXX, "nvcc": nvcc_flags},
    )
    extensions.append(cuda)

options = {"egg_info": {"tag_build": tag}}
if extensions and not HAS_PYBIND:
    # a wheel without _C_host serves every Python from 3.11 on
    options["bdist_wheel"] = {"py_limited_api": "cp311"}
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    options=options,
)
