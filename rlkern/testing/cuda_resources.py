"""What nvcc made of the CUDA C++ kernels: registers, memory, and which conversion instructions.

python -m rlkern.testing.cuda_resources              # of the built _C_cuda, a JSON object a line
"""

import json
import os
import re
import subprocess
from pathlib import Path

import triton

from rlkern import _native

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# what tells a conversion in SASS: F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C
_CONVERSION = re.compile(r"\bF2FP\.SATFINITE\.(E\dM\d)\.")


def _cuobjdump(*args: str) -> str:
    # it calls nvdisasm, which lies beside it
    env = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.check_output([TOOLS / "cuobjdump", *args], text=True, env=env)


def archs_of(library: Path) -> list[str]:
    """Those that a library has machine code for: ["90a", "100a"]."""
    found = re.findall(r"\.sm_(\d+[af]?)\.cubin", _cuobjdump("--list-elf", str(library)))
    return sorted(set(found), key=lambda arch: int(arch.rstrip("af")))


def _name_and_dtype(symbol: str) -> tuple[str, str]:
    """Of _ZN6rlkern12nvfp4_kernelIN3c108BFloat16ELb0EE..."""
    name, rest = re.search(r"\d([a-z][a-z0-9_]*_kernel)(.*)", symbol.split("rlkern", 1)[1]).groups()
    kinds = (("8BFloat16E", "bfloat16"), ("4HalfE", "float16"), ("If", "float32"))
    return name, next((dtype for mark, dtype in kinds if mark in rest), "")


def resources(library: Path, arch: str) -> list[dict]:
    """A row for each kernel in a library's machine code for one architecture."""
    usage = _cuobjdump("--dump-resource-usage", "-arch", f"sm_{arch}", str(library))
    rows: dict[str, dict] = {}
    for symbol, line in re.findall(r"Function (\S+):\n\s*(REG:.*)", usage):
        fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        name, dtype = _name_and_dtype(symbol)
        rows[symbol] = {
            "kernel": name,
            "dtype": dtype,
            "arch": arch,
            "registers": fields["REG"],
            "shared_bytes": fields["SHARED"],
            "local_bytes": fields["STACK"] + fields["LOCAL"],
            "conversions": {},
        }
    sass = _cuobjdump("-sass", "-arch", f"sm_{arch}", str(library))
    for part in sass.split("Function : ")[1:]:
        counts = rows[part.split("\n", 1)[0].strip()]["conversions"]
        for kind in _CONVERSION.findall(part):
            counts[kind] = counts.get(kind, 0) + 1
    return list(rows.values())


def main() -> None:
    library = _native.path_of("_C_cuda")
    if library is None:
        raise SystemExit("_C_cuda was not built: RLKERN_BUILD_CUDA=1 make setup")
    for arch in archs_of(library):
        for row in resources(library, arch):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
