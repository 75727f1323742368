"""`python -m rlkern`: versions, built libraries, and which kernel owns every op, and why.

With --self-test: whether they compute what the references say, as a table and an exit status.
"""

import argparse
import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import rlkern
from rlkern import _library, _native


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _library_line(name: str) -> str:
    path = _native.path_of(name)
    if path is None:
        return "not built"
    archs = _native.cuda_archs(path) if name == "_C_cuda" else platform.machine()
    return f"{path.name} ({archs})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlkern", description=__doc__)
    parser.add_argument(
        "--self-test", action="store_true", help="every op against its reference, on every device"
    )
    if parser.parse_args().self_test:
        from rlkern.testing import self_test

        return self_test.main()
    _report()
    return 0


def _report() -> None:
    if importlib.util.find_spec("transformers"):
        importlib.import_module("rlkern.rollout")  # whose decoder has ops of its own
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ("rlkern", rlkern.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", _version("triton")),
        ("transformers", _version("transformers")),
        ("CPU", torch.backends.cpu.get_cpu_capability()),
        ("GPU", ", ".join(gpus) or "none"),
        ("_C_cpu", _library_line("_C_cpu")),
        ("_C_cuda", _library_line("_C_cuda")),
        ("_C_host", _library_line("_C_host")),
        ("RLKERN_BACKEND", _native.BACKEND),
    ]
    if importlib.util.find_spec("triton") is None:
        rows.append(("note", "without triton, CUDA tensors are computed by the reference"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print()
    width = max(len(name) for name in _library.OWNERS)
    for name, owners in _library.OWNERS.items():
        for device, owner in owners.items():
            print(f"{name:<{width}}  {device:<5}  {owner.kernel:<9}  {owner.reason}")
            name = ""


if __name__ == "__main__":
    sys.exit(main())
