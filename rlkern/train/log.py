"""What a run leaves behind and shows: JSONL logs, TensorBoard, Weights & Biases, the terminal."""

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from rlkern.report import read_lines
from rlkern.report.boards import Boards
from rlkern.report.live import Dashboard, line
from rlkern.train.config import Config
from rlkern.train.diagnose import memory_held

LOGS = ("metrics", "samples", "trees", "gradients")
EDGES = [i / 5 for i in range(-20, 21)]  # of the histogram; what lies outside is in the last bins


def write_whole(path: Path, text: str) -> None:
    """Replaces a file: whoever is killed on the way leaves the old one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


class RunLog:
    """Appends to the logs of `folder`, first cut back to the records up to `step` (-1: none)."""

    def __init__(self, folder: Path, cfg: Config, step: int) -> None:
        self.cfg, self.files, self.screen = cfg, {}, None
        for name in LOGS:
            path = folder / f"{name}.jsonl"
            kept = [record for record in read_lines(path) if record["step"] <= step]
            write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
            self.files[name] = path.open("a")
        how = cfg.log.tensorboard, cfg.log.wandb, cfg.model_dump(), step
        self.boards = Boards(folder, *how)
        if sys.stdout.isatty():
            self.screen = Dashboard(str(folder), cfg.total_steps, max(step, 0))

    def say(self, text: str) -> None:
        """A line of text, above the dashboard where there is one."""
        if self.screen is None:
            print(text, flush=True)
        else:
            self.screen.say(text)

    def metrics(self, record: dict[str, Any]) -> None:
        record["memory/gib"] = memory_held() / 2**30
        self._append("metrics", record)
        self.boards.log(record)
        self._show(record)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Logs the best and the worst."""
        ranked, n = sorted(samples, key=lambda s: -s["reward"]), self.cfg.log.samples
        self._append("samples", {"step": step, "best": ranked[:n], "worst": ranked[-n:]})

    def tree(self, step: int, tree: dict[str, Any] | None) -> None:
        """Logs what `rollout.trees.widest` has found."""
        if tree is not None:
            self._append("trees", {"step": step, **tree})

    def gradients(self, step: int, weights: Tensor, idle: int) -> None:
        """Logs a histogram of tokens' gradient coefficients; idle: those that were not computed."""
        moved = weights[weights != 0].clamp(EDGES[0], EDGES[-1]).float().cpu()
        counts = moved.histc(len(EDGES) - 1, EDGES[0], EDGES[-1]).int().tolist()
        record = {"zero": len(weights) - len(moved) + idle, "edges": EDGES, "counts": counts}
        self._append("gradients", {"step": step, **record})

    def close(self) -> None:
        for resource in (*self.files.values(), self.boards, self.screen):
            if resource is not None:
                resource.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self.files[name].write(json.dumps(record) + "\n")
        self.files[name].flush()

    def _show(self, record: dict[str, Any]) -> None:
        """On the dashboard, or as a line where there is none."""
        cfg, step, phase = self.cfg, record["step"], record["phase"]
        if self.screen is not None:
            self.screen.show(record)
        if phase == "eval":
            return self.say(line(record))
        count = step if phase == "warmup" else step - cfg.warmup.steps
        total = cfg.warmup.steps if phase == "warmup" else cfg.run.steps
        if self.screen is None and (count in (1, total) or count % cfg.log.every == 0):
            print(f"{phase:<7} {count:>5}/{total}  {line(record)}", flush=True)
