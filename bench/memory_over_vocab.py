"""Peak memory of `linear_logprob` over the vocabulary: results/<machine>/memory_over_vocab.json.

    python -m bench.memory_over_vocab

Each figure is the peak growth of the resident memory of a process of its own (bench/memory.py)
during one call, less the bytes of what the call returns: log-probs and entropies, or the gradients
of the hidden states and of the weight. Those are all held when the call ends, so what is left is
scratch, and never negative but for the page that a tensor begins in. It is a lower bound where the
peak came before the gradients were complete.

TRL's function has a figure where TRL is installed.
"""

import json
import sys

from bench.harness import ROOT, Case, peak_apart
from bench.machine import machine
from bench.ops.bench_linear_logprob import BOTH, TRL, problem
from bench.oracles import installed, versions
from bench.shapes import HEADS

DTYPE, ITEM_BYTES = "bfloat16", 2
SHAPES = [shape for shape in HEADS if shape.startswith("vocab-")]
VARIANTS = ["rlkern", "eager", TRL]


def returned_bytes(shape: str, passes: str) -> int:
    tokens, hidden, vocab = HEADS[shape]
    return 2 * 4 * tokens if passes == "forward" else ITEM_BYTES * hidden * (tokens + vocab)


def main() -> int:
    rows = []
    for passes in BOTH:
        for variant in VARIANTS:
            if variant == TRL and not installed("trl"):
                continue
            for shape in SHAPES:
                peak = peak_apart(problem, Case(shape, DTYPE, passes), variant)
                if peak is None:
                    continue
                returned = returned_bytes(shape, passes)
                row = {"pass": passes, "variant": variant, "vocab": HEADS[shape].vocab}
                row |= {"peak_bytes": peak, "returned_bytes": returned}
                rows.append(row | {"scratch_bytes": max(0, peak - returned)})
                print(rows[-1], flush=True)
    info = machine()
    tokens, hidden, _ = HEADS[SHAPES[0]]
    saved = {
        "kind": "memory",
        "machine_info": info,
        "versions": versions(),
        "command": "python -m bench.memory_over_vocab",
        "shape": {"tokens": tokens, "hidden": hidden, "dtype": DTYPE},
        "rows": rows,
    }
    path = ROOT / "bench/results" / info["name"] / "memory_over_vocab.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
