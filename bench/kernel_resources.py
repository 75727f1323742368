"""What every Triton kernel takes of a GPU: bench/results/cross-compile/kernel_resources.json.

    python -m bench.kernel_resources

Every launch over the ops' samples is compiled for GPUs that are not here
(rlkern/testing/cross_compile.py), without TRITON_INTERPRET. A row is the largest figure among a
kernel's specialisations for one dtype and architecture.
"""

import json
import os
import sys

import torch
import triton

from bench.harness import ROOT
from bench.machine import made
from rlkern.testing.cross_compile import CAPABILITIES, compile_launch, launches_of
from rlkern.testing.implementations import OPS

DTYPES = (torch.bfloat16, torch.float32)
LARGEST = ("registers", "shared_bytes", "local_bytes")


def rows_of(op: str, dtype: torch.dtype) -> list[dict]:
    rows: dict[tuple[str, int], dict] = {}
    for launch in launches_of(op, dtype):
        for capability in CAPABILITIES:
            found = compile_launch(launch, capability)
            name = found.pop("kernel").strip("_").removesuffix("_kernel")
            first = {"op": op, "kernel": name, "dtype": str(dtype).removeprefix("torch.")}
            row = rows.setdefault((name, capability), first | found | {"specialisations": 0})
            row |= {key: max(row[key], found[key]) for key in LARGEST}
            row["specialisations"] += 1
    return list(rows.values())


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("kernel_resources: unset TRITON_INTERPRET, which compiles nothing")
    rows = []
    for op in OPS:
        for dtype in DTYPES:
            rows += rows_of(op, dtype)
            print(f"{op} {dtype}", flush=True)
    saved = {
        "kind": "kernel_resources",
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "command": "python -m bench.kernel_resources",
        **made(),
        "rows": rows,
    }
    path = ROOT / "bench/results/cross-compile/kernel_resources.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
