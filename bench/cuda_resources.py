"""What every CUDA C++ kernel takes of a GPU: bench/results/cross-compile/cuda_resources.json.

    RLKERN_BUILD_CUDA=1 RLKERN_CUDA_ARCHS="90a;100a" make setup && python -m bench.cuda_resources

A row is the largest figure among a kernel's specialisations for one dtype and architecture.
"""

import json
import subprocess
import sys

from bench.harness import ROOT
from bench.machine import made
from rlkern import _native
from rlkern.testing.cuda_resources import archs_of, resources

LARGEST = ("registers", "shared_bytes", "local_bytes")


def main() -> int:
    library = _native.path_of("_C_cuda")
    if library is None:
        raise SystemExit("cuda_resources: _C_cuda was not built")
    rows: dict[tuple, dict] = {}
    for arch in archs_of(library):
        for found in resources(library, arch):
            kinds = sorted(found.pop("conversions"))
            key = (found["kernel"], found["dtype"], arch)
            row = rows.setdefault(key, found | {"conversions": [], "specialisations": 0})
            row |= {name: max(row[name], found[name]) for name in LARGEST}
            row["conversions"] = sorted({*row["conversions"], *kinds})
            row["specialisations"] += 1
    compiler = subprocess.check_output(["nvcc", "--version"], text=True).split("release ")[1]
    saved = {
        "kind": "cuda_resources",
        "versions": {"nvcc": compiler.split(",")[0]},
        "command": "python -m bench.cuda_resources",
        **made(),
        "rows": [rows[key] for key in sorted(rows)],
    }
    path = ROOT / "bench/results/cross-compile/cuda_resources.json"
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
