"""The demo with plain groups, LATR's trees and CURE's: bench/results/<machine>/trees.json.

    python -m bench.train_trees

Rewards, held-out accuracy, tokens that went through the model while sampling against those of the
sequences (each shared one once, prompts included), and the share of the reads of keys that sharing
saved. Plain groups run twice: with and without the prompt of a group shared in training.
"""

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
CHUNK = ("--rollout.chunk", "4")
RUNS = {
    "groups": ["demo"],
    "groups, shared prompts": ["demo", *CHUNK, "--optim.share_prefix", "true"],
    "LATR": ["latr"],
    "CURE": ["cure"],
}


def main() -> int:
    info, runs = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, words) in enumerate(RUNS.items()):
            runs.append({"strategy": name, **measure(Path(folder) / str(number), words)})
            print(json.dumps(runs[-1]), flush=True)
    info |= {"threads": torch.get_num_threads(), "transformers": transformers.__version__}
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    saved = {"kind": "trees", "machine_info": info, "seed": 0}
    saved |= {"command": "python -m bench.train_trees", "runs": runs}
    path = RESULTS / info["name"] / "trees.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return 0 if all(run["exit_code"] == 0 for run in runs) else 1


def measure(folder: Path, words: list[str]) -> dict:
    command = [sys.executable, "-m", "rlkern.train", *words, "--run.dir", str(folder)]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["phase"] == "rl"]

    def total(metric: str) -> float:
        return sum(r[metric] for r in steps)

    trees = folder / "trees.jsonl"
    return {
        "exit_code": done.returncode,
        "wall_seconds": round(wall, 1),
        "rollout_seconds": round(total("time/rollout"), 1),
        "update_seconds": round(total("time/old_logprob") + total("time/update"), 1),
        "greedy_every_10_steps": [
            round(r["eval/greedy"], 4) for r in records if r["phase"] == "eval"
        ],
        "reward_first_5": sum(r["reward/mean"] for r in steps[:5]) / 5,
        "reward_last_5": sum(r["reward/mean"] for r in steps[-5:]) / 5,
        "computed_tokens": int(total("rollout/computed")),
        "used_tokens": int(total("rollout/used")),
        "response_tokens": int(total("completion/tokens")),
        "kv_saved": total("rollout/kv_saved") / len(steps),
        "steps_with_forks": len(trees.read_text().splitlines()) if trees.is_file() else 0,
    }


if __name__ == "__main__":
    sys.exit(main())
