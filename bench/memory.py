"""Peak growth of this process's resident memory during one call of one variant.

    python -m bench.memory '{"module": ..., "case": ..., "variant": ...}'     # prints bytes

The call is made once before, so that code pages, thread stacks and library caches are not counted;
what it returns is.
"""

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

from bench import harness


def main() -> None:
    function = harness.load(sys.argv[1])
    function()
    gc.collect()
    # hand freed heap back, or the next call would reuse it unseen
    ctypes.CDLL(None).malloc_trim(0)
    print(peak_growth(function))


def peak_growth(function) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = _status("VmRSS")
    kept = function()
    peak = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del kept
    return max(0, peak - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
