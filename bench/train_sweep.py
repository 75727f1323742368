"""Every preset of the policy loss on one task from one warm-up, through the command line.

    python -m bench.train_sweep          # in .venv-vllm: with vLLM too; <machine>/sweep.json

Sorting four digits, 20 steps of 16 x 16 samples at one learning rate, so no ranking of methods. The
first seed alone, but for COMPARED: rows that sample two steps ahead of training, or by vLLM, and
those that they stand beside. Where a preset leaves a number to the caller, it is that of NUMBERS. A
preset that needs inputs which the trainer does not have says so.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from bench.machine import machine
from rlkern.ops.policy_loss.presets import PRESETS
from rlkern.train import cli

RESULTS = Path(__file__).parent / "results"
WARMUP = 60
SETTINGS = {
    "data.size": "4",
    "data.train_size": "4000",
    "warmup.steps": str(WARMUP),
    "warmup.batch_size": "128",
    "rollout.prompts": "16",
    "rollout.max_new_tokens": "5",
    "optim.schedule": "constant",
    "eval.every": "0",
    "eval.k": "[]",
    "eval.min_accuracy": "0",
    "checkpoint.every": str(WARMUP),
    "log.tensorboard": "false",
}
AHEAD = ["--rollout.max_staleness", "2"]
NUMBERS = {
    "dr_grpo": "{ loss_scale_factor = 5 }",  # the longest response
    "hispo": "{ loss_scale_factor = 5 }",
    "fspo": "{ fspo_c = 0.3 }",
    "dro": "{ dro_beta = 0.3 }",
    "delta_hinge": "{ pos_margin = 0.2, neg_margin = 0.1 }",
    "reason_maxxer": "{ entropy_threshold = 0.7 }",
    "spine": "{ entropy_threshold = 0.7 }",
}
# name -> preset, its options, other words of the command line
RUNS = {name: (name, NUMBERS.get(name, "{}"), []) for name in PRESETS}
OTHERS = {
    "grpo, sampled by vLLM": ("grpo", "{}", ["--rollout.engine", "vllm"]),
    "grpo, two steps ahead": ("grpo", "{}", AHEAD),
    "decoupled_ppo, two steps ahead": ("decoupled_ppo", "{}", AHEAD),
    "minpro, two steps ahead": ("minpro", '{ ratio_anchor = "rollout" }', AHEAD),
}
RUNS |= OTHERS
COMPARED = {"grpo", "minpro", *OTHERS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="some of the rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    info, runs = machine(), []
    base = SETTINGS | {"run.steps": str(args.steps), "run.threads": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            warm = Path(folder) / f"{seed}-warm"
            settings = base | {"run.seed": str(seed), "run.dir": str(warm), "run.steps": "1"}
            words = [word for key, value in settings.items() for word in (f"--{key}", value)]
            code, _, err = quietly(["demo", *words])
            if code:
                raise SystemExit(err)
            for number, name in enumerate(args.runs):
                if seed != args.seeds[0] and name not in COMPARED:
                    continue
                where = Path(folder) / f"{seed}-{number}"
                runs.append({"run": name, "seed": seed, **measure(warm, where, name, args.steps)})
                print(json.dumps(runs[-1]), flush=True)
    info |= {"threads": args.threads, "transformers": transformers.__version__}
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    command = " ".join(["python -m bench.train_sweep", *map(shlex.quote, sys.argv[1:])])
    saved = {"kind": "sweep", "machine_info": info, "command": command}
    saved |= {"seeds": args.seeds, "steps": args.steps, "runs": runs}
    path = args.results / info["name"] / "sweep.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return 0


def measure(warm: Path, folder: Path, name: str, steps: int) -> dict:
    """Goes on from the warm-up with another objective."""
    at = f"checkpoints/step_{WARMUP:06d}"
    shutil.copytree(warm / at, folder / at)
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(warm / file, folder / file)
    preset, options, words = RUNS[name]
    words = ["--run.dir", str(folder), "--run.steps", str(steps), *words]
    words += ["--algorithm.objective", preset, "--algorithm.options", options]
    start = time.perf_counter()
    code, out, err = quietly(["--resume", str(folder), *words])
    wall = time.perf_counter() - start
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    shutil.rmtree(folder)
    rewards = [round(r["reward/mean"], 4) for r in records if r["phase"] == "rl"]
    greedy = [round(r["eval/greedy"], 4) for r in records if r["phase"] == "eval"]
    return {
        "options": options,
        "exit_code": code,
        "error": err.strip().split("\n")[0] * (code != 0),
        "notes": [line for line in out.split("\n") if line.startswith("NOTE step")],
        "wall_seconds": round(wall, 1),
        "rewards": rewards,
        "greedy_before": greedy[0],
        "greedy_after": greedy[-1] if len(greedy) > 1 else None,
    }


def quietly(words: list[str]) -> tuple[int, str, str]:
    """-> exit code, and what was said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except ValueError as error:  # an objective that needs more than the trainer has
            print(error, file=err)
            code = 1
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    sys.exit(main())
