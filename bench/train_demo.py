"""The demo on five seeds and its null control, through the command line, into one JSON.

python -m bench.train_demo            # bench/results/<machine>/demo.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from bench.machine import machine

RESULTS = Path(__file__).parent / "results"
SEEDS = range(5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    info, runs = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed, null in [*((seed, False) for seed in SEEDS), (0, True)]:
            run = measure(Path(folder) / f"{seed}{null}", seed, null, args.threads)
            runs.append(run)
            print(json.dumps(run), flush=True)
    passed = all(run["passed"] for run in runs)
    info |= {"threads": args.threads, "transformers": transformers.__version__}
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    saved = {"kind": "demo", "machine_info": info, "command": "python -m bench.train_demo"}
    saved |= {"passed": passed, "runs": runs}
    path = RESULTS / info["name"] / "demo.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return 0 if passed else 1


def measure(folder: Path, seed: int, null: bool, threads: int) -> dict:
    words = [sys.executable, "-m", "rlkern.train", "demo", "--run.dir", str(folder)]
    words += ["--run.seed", str(seed), "--run.threads", str(threads), *["--null"] * null]
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["greedy_before"], summary["greedy_after"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [round(r["eval/greedy"], 4) for r in records if r["phase"] == "eval"]
    learnt = before <= 0.1 and after >= 0.95 and summary["training_seconds"] <= 90
    return {
        "seed": seed,
        "null": null,
        "exit_code": done.returncode,
        "wall_seconds": round(wall, 1),
        "training_seconds": round(summary["training_seconds"], 1),
        "greedy_before": before,
        "greedy_after": after,
        "greedy_every_10_steps": curve,
        "passed": done.returncode == 0 and (after <= 0.05 if null else learnt),
    }


if __name__ == "__main__":
    sys.exit(main())
