"""A run as it goes on: lines, or on a terminal a dashboard that stands still."""

import time
from collections import defaultdict, deque
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 40  # values of a curve

# title -> (format, metrics that it shows)
ROWS = {
    "reward": ("{:.3f} ± {:.3f}, signal {:.0%}", "reward/mean", "reward/std", "signal/groups"),
    "held-out greedy": ("{:.1%}", "eval/greedy"),
    "length": ("{:.1f}, longest {:.0f}", "completion/length", "completion/length_max"),
    "cut off": ("{:.0%}", "completion/truncated"),
    "turns": ("{:.2f}, replies {:.0%}", "rollout/turns", "rollout/replied"),
    "entropy": ("{:.3f}", "entropy"),
    "KL of the update": ("{:.1e}", "policy/ppo_kl"),
    "mismatch": ("KL {:.1e}, largest gap {:.1e}", "logprob_gap/kl", "logprob_gap/max"),
    "staleness": ("{:.1f} steps, at most {:.0f}", "staleness/mean", "staleness/max"),
    "loss": ("{:.4f}", "loss"),
    "gradient norm": ("{:.2f}", "grad_norm"),
    "tokens a second": ("{:,.0f}", "time/tokens_per_second"),
    "seconds a step": ("{:.1f}", "time/step"),
    "of it": ("rollout {:.1f}, update {:.1f}", "time/rollout", "time/update"),
    "memory": ("{:.2f} GiB", "memory/gib"),
}


def line(record: dict[str, Any]) -> str:
    """What a record says, in a line."""
    if record["phase"] == "eval":
        shown = {k[5:]: v for k, v in record.items() if k == "eval/greedy" or "@" in k}
        scores = "  ".join(f"{name} {value:.1%}" for name, value in shown.items())
        return f"held-out after step {record['step']}: {scores}"
    if record["phase"] == "warmup":
        return f"loss {record['loss']:.3f}  grad {record['grad_norm']:.2f}"
    return (
        f"reward {record['reward/mean']:.3f}  signal {record['signal/groups']:.0%}  "
        f"length {record['completion/length']:.1f}  "
        f"cut {record['completion/truncated']:.0%}  entropy {record['entropy']:.3f}  "
        f"gap {record['logprob_gap/max']:.0e}  grad {record['grad_norm']:.2f}  "
        f"{record['time/tokens_per_second']:,.0f} tok/s"
    )


def curve(values: list[float]) -> str:
    """Bars between the lowest and the highest value."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


class Dashboard:
    """A table of the last values and their curves under a bar of progress, drawn by rich.

    console: of rich; default: the terminal.
    """

    def __init__(self, title: str, total: int, done: int, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.title, self.total, self.first, self.step = title, total, done, done
        self.phase, self.start = "", time.monotonic()
        self.last: dict[str, float] = {}
        self.history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self.console = console or Console()
        # the worker's and the reward's prints would tear the table
        self.live = Live(self.table(), console=self.console, refresh_per_second=2)
        self.live.start()

    def say(self, text: str) -> None:
        """A line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        self.step = record["step"]
        if record["phase"] != "eval":
            self.phase = record["phase"]
        for name, value in record.items():
            if isinstance(value, int | float):
                self.last[name] = value
                if value - value == 0:  # a number, not NaN nor Inf
                    self.history[name].append(value)
        self.live.update(self.table())

    def table(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        spent, done = time.monotonic() - self.start, self.step - self.first
        left = f", about {spent / done * (self.total - self.step):.0f} s to go" if done else ""
        head = f"{self.phase} {self.step}/{self.total}  {spent:.0f} s{left}  {self.title}"
        table = Table(box=None, show_header=False, pad_edge=False)
        for title, (form, *names) in ROWS.items():
            if all(name in self.last for name in names):
                values = [self.last[name] for name in names]
                history = list(self.history[names[0]])
                table.add_row(title, form.format(*values), curve(history) if history else "")
        bar = ProgressBar(total=max(1, self.total), completed=self.step, width=60)
        return Group(Text(head), bar, table)

    def close(self) -> None:
        self.live.stop()
