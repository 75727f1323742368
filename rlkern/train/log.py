"""What a run leaves behind and shows: metrics.jsonl, samples.jsonl, TensorBoard, the terminal."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlkern.train import TrainError
from rlkern.train.config import Config


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL log; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().split("\n") if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_whole(path: Path, text: str) -> None:
    """Replaces a file: whoever is killed on the way leaves the old one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


class RunLog:
    """Appends to the logs of `folder`, first cut back to the records up to `step` (-1: none)."""

    def __init__(self, folder: Path, cfg: Config, step: int) -> None:
        self.cfg, self.files, self.board, self.bar = cfg, {}, None, None
        for name in ("metrics", "samples", "trees"):
            path = folder / f"{name}.jsonl"
            kept = [record for record in read_lines(path) if record["step"] <= step]
            write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
            self.files[name] = path.open("a")
        if cfg.log.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise TrainError(
                    "log.tensorboard = true needs tensorboard: pip install 'rlkern[train]', or "
                    "set --log.tensorboard false"
                ) from error
            # The viewer hides the events of steps that are about to be repeated.
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if sys.stderr.isatty():
            done = max(step, 0)
            self.bar = tqdm(total=cfg.total_steps, initial=done, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line of text that does not break the progress bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def metrics(self, record: dict[str, Any]) -> None:
        self._append("metrics", record)
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    tag = name if "/" in name else f"{record['phase']}/{name}"
                    self.board.add_scalar(tag, value, record["step"])
        self._show(record)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Logs the best and the worst."""
        ranked, n = sorted(samples, key=lambda s: -s["reward"]), self.cfg.log.samples
        self._append("samples", {"step": step, "best": ranked[:n], "worst": ranked[-n:]})

    def tree(self, step: int, tree: dict[str, Any] | None) -> None:
        """Logs what `trees.widest` has found."""
        if tree is not None:
            self._append("trees", {"step": step, **tree})

    def close(self) -> None:
        for resource in (*self.files.values(), self.board, self.bar):
            if resource is not None:
                resource.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self.files[name].write(json.dumps(record) + "\n")
        self.files[name].flush()

    def _show(self, record: dict[str, Any]) -> None:
        cfg, step, phase = self.cfg, record["step"], record["phase"]
        if phase == "eval":
            shown = {k[5:]: v for k, v in record.items() if k == "eval/greedy" or "@" in k}
            scores = "  ".join(f"{name} {value:.1%}" for name, value in shown.items())
            self.say(f"held-out after step {step}: {scores}")
            return
        if phase == "warmup":
            count, total = step, cfg.warmup.steps
            text = f"loss {record['loss']:.3f}  grad {record['grad_norm']:.2f}"
        else:
            count, total = step - cfg.warmup.steps, cfg.run.steps
            text = (
                f"reward {record['reward/mean']:.3f}  signal {record['signal/groups']:.0%}  "
                f"length {record['completion/length']:.1f}  "
                f"cut {record['completion/truncated']:.0%}  entropy {record['entropy']:.3f}  "
                f"gap {record['logprob_gap/max']:.0e}  grad {record['grad_norm']:.2f}  "
                f"{record['time/tokens_per_second']:,.0f} tok/s"
            )
        if self.bar is not None:
            self.bar.set_description(phase, refresh=False)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif count == 1 or count % cfg.log.every == 0 or count == total:
            print(f"{phase:<7} {count:>5}/{total}  {text}", flush=True)
