"""Runs that are killed at a random moment and resumed, against one that was not: the same bits?

    python -m bench.survival              # 20 kills: bench/results/<machine>/survival.json

Synchronous runs, and runs that sample two steps ahead. Every third one is killed twice, every other
one while it writes a checkpoint. Compared are metrics (seconds aside), samples, rollouts, weights,
optimiser, random states and position in the data.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import machine
from rlkern.train import cli

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "model.layers": "1",
    "model.hidden_size": "32",
    "model.intermediate_size": "64",
    "model.heads": "2",
    "model.kv_heads": "2",
    "data.size": "3",
    "data.train_size": "200",
    "data.heldout_size": "20",
    "reward": "bench.survival:reward",
    "warmup.steps": "4",
    "warmup.batch_size": "16",
    "run.steps": "16",
    "run.threads": "1",
    "rollout.prompts": "4",
    "rollout.group_size": "4",
    "rollout.max_new_tokens": "4",
    "rollout.save": "true",
    "algorithm.options.kl_coef": "0.1",  # a reference model, which the run writes, too
    "optim.warmup_steps": "2",
    "optim.lr": "3e-3",
    "eval.every": "4",
    "eval.samples": "4",
    "eval.k": "[1, 4]",
    "eval.min_accuracy": "0",
    "checkpoint.every": "2",
    "log.tensorboard": "false",
}

RUNS: dict[str, dict[str, str]] = {
    "synchronous": {},
    "two steps ahead": {"rollout.max_staleness": "2"},
}


def reward(prompt: str, completion: str, answer: str) -> float:
    """Differs between almost any two answers, and draws from Python's own random stream."""
    return len(set(completion)) / 4 + completion.count(answer[0]) / 8 + random.random() / 16


class Runs:
    """Runs in processes that have imported everything before they begin."""

    def __init__(self, changes: dict[str, str] | None = None) -> None:
        self.settings = SETTINGS | (changes or {})
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["rlkern.train.cli"])

    def start(self, folder: Path, resume: bool) -> multiprocessing.Process:
        settings = self.settings | {"run.dir": str(folder)}
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        # killed before there was a run: the same command again
        words = ["--resume", str(folder)] if resume and (folder / "config.json").exists() else words
        process = self.context.Process(target=_train, args=(words, f"{folder}.log"))
        process.start()
        return process

    def whole(self, folder: Path) -> float:
        """-> seconds of a run that nobody stops."""
        begin = time.perf_counter()
        self.finish(folder, resume=False)
        return time.perf_counter() - begin

    def finish(self, folder: Path, resume: bool) -> None:
        process = self.start(folder, resume)
        process.join()
        if process.exitcode:
            raise RuntimeError(f"exit code {process.exitcode}: {Path(f'{folder}.log').read_text()}")

    def killed(self, folder: Path, rng: random.Random, kind: str, seconds: float) -> dict[str, Any]:
        """Starts or goes on, and kills it; {} where it was done before."""
        at = rng.uniform(0, seconds)
        process, begin = self.start(folder, folder.exists()), time.perf_counter()
        if kind == "writing":
            process.join(at)
            while process.is_alive() and not list(folder.glob("checkpoints/.part_*")):
                time.sleep(0.0005)
            process.join(rng.uniform(0, 0.03))
        else:
            process.join(at)
        if not process.is_alive():
            return {}
        process.kill()
        process.join()
        return {
            "at": kind,
            "seconds": round(time.perf_counter() - begin, 3),
            "records": len(records(folder)),
            "checkpoint_half_written": bool(list(folder.glob("checkpoints/.part_*"))),
        }


def _train(words: list[str], log: str) -> None:
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = cli.main(words)
    sys.exit(code)


def records(folder: Path) -> list[dict]:
    """Metrics without the seconds."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))}
        for line in lines
    ]


def differences(one: Path, other: Path) -> list[str]:
    """What two complete runs do not have in common."""
    found = ["metrics"] * (records(one) != records(other))
    found += _lists_differ(one, other, "checkpoints/*") + _lists_differ(one, other, "rollouts/*")
    names = ["samples.jsonl", *(str(p.relative_to(one)) for p in one.glob("rollouts/*"))]
    last = sorted((one / "checkpoints").iterdir())[-1].relative_to(one)
    names += [f"{last}/{name}" for name in ("model/model.safetensors", "trainer.safetensors")]
    found += [name for name in names if _bytes(one / name) != _bytes(other / name)]
    states = [json.loads((folder / last / "state.json").read_text()) for folder in (one, other)]
    for state in states:
        del state["config"]["run"]["dir"]
    return found + ["state.json"] * (states[0] != states[1])


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _lists_differ(one: Path, other: Path, pattern: str) -> list[str]:
    # a killed writer leaves a hidden file behind
    lists = [
        sorted(p.name for p in folder.glob(pattern) if p.name[0] != ".") for folder in (one, other)
    ]
    return [pattern] * (lists[0] != lists[1])


def outcomes(
    folder: Path, number: int, seed: int = 0, changes: dict[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Kills and resumes `number` runs -> what became of each."""
    runs, rng = Runs(changes), random.Random(seed)
    runs.whole(folder / "warm")  # the first one also starts the server
    seconds = runs.whole(folder / "whole")
    for i in range(number):
        run, kills, tries = folder / f"run{i}", [], 0
        wanted = 2 if i % 3 == 2 else 1
        while len(kills) < wanted:
            tries += 1
            share = 1 / (1 + len(kills))  # the second run is shorter
            kill = runs.killed(run, rng, ("any", "writing")[i % 2], seconds * share)
            kills += [kill] if kill else []
            if not kill:  # it was done: another one
                run = folder / f"run{i}-{tries}"
                kills = []
        runs.finish(run, resume=True)
        yield {"kills": kills, "different": differences(folder / "whole", run)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    info, done = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in RUNS.items():
            (where := Path(folder) / name).mkdir()
            for outcome in outcomes(where, args.kills, args.seed, changes):
                done.append({"run": name, **outcome})
                print(json.dumps(done[-1]), flush=True)
    passed = not any(outcome["different"] for outcome in done)
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    saved = {"kind": "survival", "machine_info": info, "command": "python -m bench.survival"}
    saved |= {"seed": args.seed, "passed": passed, "outcomes": done}
    path = RESULTS / info["name"] / "survival.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
