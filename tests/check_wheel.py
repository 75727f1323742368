"""What a wheel says of itself is so, and it works where there is nothing but torch.

    python tests/check_wheel.py --python EMPTY_VENV/bin/python dist/*.whl

Of each wheel: its size is bounded; its libraries take nothing that another torch may lack; its
platform tag asks for the glibc that they need; its GPUs are those of its version. Then it is
installed, `python -m rlkern --self-test` is run outside the checkout, and it is uninstalled.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlkern.testing import abi

# MiB, over what was measured (docs/build.md) by about a half: a wheel beyond it has something in it
# that nobody meant to ship.
PURE_MIB, CPU_MIB, ARCH_MIB = 1.0, 4.0, 2.0


def check(wheel: Path) -> list[str]:
    """Problems of a wheel that is not installed; what it holds is printed."""
    name, version, *_, platform = wheel.stem.split("-")
    mebibytes = wheel.stat().st_size / 2**20
    tagged = re.search(r"\+cu\d+\.(.*)", version)
    archs = re.findall(r"sm(\d+[af]?)", tagged[1]) if tagged else []
    found, glibc = [], (0,)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        libraries = {p.name.split(".")[0]: p for p in sorted(Path(folder, name).glob("*.so"))}
        expected = {"_C_cpu", "_C_host"} | ({"_C_cuda"} if archs else set())
        if platform == "any":
            expected = set()
        if set(libraries) != expected:
            found.append(f"holds {sorted(libraries)}, expected {sorted(expected)}")
        for library, path in libraries.items():
            found += [f"{library} {problem}" for problem in abi.problems(library, path)]
            glibc = max(glibc, abi.needs(path).versions.get("GLIBC", (0,)))
        inside = []
        if "_C_cuda" in libraries:
            from rlkern.testing.cuda_resources import archs_of

            inside = archs_of(libraries["_C_cuda"])
            if inside != sorted(archs, key=lambda arch: int(arch.rstrip("af"))):
                found.append(f"has machine code for {inside}, its version says {archs}")
    if libraries:
        tag = re.match(r"manylinux_(\d+)_(\d+)_", platform)
        if tag is None:
            found.append(f"is tagged {platform}, which no index takes")
        elif (int(tag[1]), int(tag[2])) < glibc:
            found.append(f"is tagged {platform} and needs glibc {glibc}")
    bound = (CPU_MIB if libraries else PURE_MIB) + ARCH_MIB * len(archs)
    if mebibytes > bound:
        found.append(f"has {mebibytes:.1f} MiB, more than {bound}")
    needs = f", needs glibc {'.'.join(map(str, glibc))}" if libraries else ""
    code = f", machine code for {', '.join(inside)}" if inside else ""
    print(f"{wheel.name}: {mebibytes:.2f} MiB of at most {bound:g}{needs}{code}", flush=True)
    return found


def run_installed(wheel: Path, python: Path) -> list[str]:
    """Installs it, tests it from an empty folder, uninstalls it."""
    # -I: an egg-info of this folder is not what is installed
    pip = [str(python), "-I", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--force-reinstall", "--no-deps", str(wheel)], check=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [str(python), "-I", "-m", "rlkern", "--self-test"]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={})
    finally:
        subprocess.run([*pip, "uninstall", "--yes", "rlkern"], check=True)
    if run.returncode:
        return ["fails its self-test:\n" + run.stdout + run.stderr]
    print("  " + run.stdout.strip().replace("\n", "\n  "), flush=True)
    kernel = "reference" if wheel.name.endswith("-any.whl") else "native"
    wrong = [ln for ln in run.stdout.splitlines() if "  cpu  " in ln and kernel not in ln]
    return [f"computes on CPU by other kernels than {kernel}: {wrong}"] if wrong else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--python", type=Path, help="of a venv with torch and numpy alone")
    args = parser.parse_args()
    failed = False
    for wheel in args.wheels:
        found = check(wheel)
        if args.python and not found:
            found = run_installed(wheel.resolve(), args.python.absolute())
        for problem in found:
            print(f"{wheel.name} {problem}", file=sys.stderr)
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
