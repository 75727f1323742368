"""What the compiled libraries need of a machine: which symbols of torch, which glibc and libstdc++.

    python -m rlkern.testing.abi            # of the built libraries

torch keeps the C functions `aoti_torch_*` and `torch_*` and nothing else from one release to the
next. What a library takes of torch must be among them, or in ALLOWED with a reason.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from rlkern import _native

STABLE = re.compile(r"(aoti_)?torch_[a-z]\w*")
PYTHON = re.compile(r"_?Py[A-Z_]\w*")
ALLOWED = {
    "__gmon_start__": "weak: gcc's start-up code, for profilers",
    "_ITM_deregisterTMCloneTable": "weak: gcc's start-up code, for transactional memory",
    "_ITM_registerTMCloneTable": "weak: gcc's start-up code, for transactional memory",
}
"""What else is taken without a version, and why it is harmless."""


LIBRARIES = {
    "_C_cpu": {"libtorch_cpu.so", "libc10.so"},
    "_C_cuda": {"libtorch_cpu.so", "libtorch.so", "libc10.so", "libcudart.so"},
    "_C_host": set(),
}
SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}


class Needs(NamedTuple):
    torch: list[str]  # of the stable ABI
    python: list[str]
    other: list[str]  # without a version, and none of these
    versions: dict[str, tuple[int, ...]]  # GLIBC, GLIBCXX, CXXABI, GCC: the newest
    libraries: list[str]


def needs(library: Path) -> Needs:
    """Read off the dynamic symbols of a shared library."""
    torch, python, other, versions = [], [], [], {}
    for line in _run("objdump", "-T", str(library)).splitlines():
        if "*UND*" not in line:
            continue
        _, *version, name = line.split("*UND*")[1].split()
        found = re.fullmatch(r"\(?([A-Z]+)_([\d.]+)\)?", version[0]) if version else None
        if found:
            number = tuple(int(part) for part in found[2].split("."))
            versions[found[1]] = max(number, versions.get(found[1], ()))
        elif STABLE.fullmatch(name):
            torch.append(name)
        elif PYTHON.fullmatch(name):
            python.append(name)
        elif version in ([], ["Base"]):
            other.append(name)
    libraries = re.findall(r"NEEDED\s+(\S+)", _run("objdump", "-p", str(library)))
    return Needs(sorted(torch), sorted(python), sorted(other), versions, libraries)


def exported(library: Path) -> list[str]:
    """The symbols that other libraries could take from this one."""
    lines = _run("objdump", "-T", str(library)).splitlines()
    return [ln.split()[-1] for ln in lines if re.match("[0-9a-f]+ ", ln) and "*UND*" not in ln]


def problems(name: str, library: Path) -> list[str]:
    """What could keep `name` (_C_cpu, _C_cuda, _C_host) from working with another torch."""
    found, result = needs(library), []
    result += [f"takes {symbol} from a torch" for symbol in found.other if symbol not in ALLOWED]
    if name != "_C_host":
        result += [f"takes {symbol} of Python" for symbol in found.python]
        result += [f"exports {symbol}" for symbol in exported(library)]
    for other in found.libraries:
        if other not in SYSTEM and re.sub(r"\.so\..*", ".so", other) not in LIBRARIES[name]:
            result.append(f"needs {other}")
    return result


def _run(*command: str) -> str:
    return subprocess.check_output(command, text=True)


def main() -> None:
    for name in LIBRARIES:
        path = _native.path_of(name)
        if path is None:
            continue
        found = needs(path)
        print(f"{path.name}  {path.stat().st_size / 2**20:.1f} MiB")
        versions = (f"{kind} {'.'.join(map(str, n))}" for kind, n in sorted(found.versions.items()))
        print(f"  versions   {', '.join(versions)}")
        print(f"  libraries  {', '.join(found.libraries)}")
        print(
            f"  torch      {len(found.torch)} functions of the stable ABI: {', '.join(found.torch)}"
        )
        if found.python:
            print(f"  Python     {len(found.python)} functions")
        for symbol in found.other:
            print(f"  {symbol}: {ALLOWED.get(symbol, 'NOT ALLOWED')}")
        for problem in problems(name, path):
            print(f"  PROBLEM: {problem}")


if __name__ == "__main__":
    main()
