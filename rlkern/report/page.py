"""report.html: one file with summary, curves, samples, gradients, trees and settings, that loads
nothing else and runs no script. compare.html: curves and settings of several runs.
"""

import html
import io
import json
import os
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlkern.report.records import read_lines, read_settings
from rlkern.report.trees import draw

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;color:#222}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}
table{border-collapse:collapse}code{font-size:13px;white-space:pre-wrap}svg{width:100%;height:auto}
summary{cursor:pointer}mark{background:#dde;color:#556}"""

PANELS = {  # title -> label -> metric
    "Reward and accuracy": {"sampled reward": "reward/mean", "held-out greedy": "eval/greedy"},
    "Groups with a signal": {"share": "signal/groups"},
    "Warm-up loss (nats per token)": {"loss": "loss", "floor": "loss_floor"},
    "Entropy (nats per token)": {"entropy": "entropy"},
    "Completions": {"mean length": "completion/length", "share cut off": "completion/truncated"},
    "Gradient norm": {"norm": "grad_norm"},
    "KL of the update (nats)": {"KL": "policy/ppo_kl"},
    "Trainer and sampler (nats)": {"max |log-prob gap|": "logprob_gap/max", "KL": "logprob_gap/kl"},
    "Staleness (steps)": {"mean": "staleness/mean", "max": "staleness/max"},
    "Tokens of a rollout": {"computed": "rollout/computed", "used": "rollout/used"},
    "Share of KV reads saved": {"saved": "rollout/kv_saved"},
    "Turns of a completion": {"turns": "rollout/turns", "share replied": "rollout/replied"},
    "Seconds per step": {"step": "time/step", "rollout": "time/rollout", "update": "time/update"},
    "Memory held (GiB)": {"memory": "memory/gib"},
}
LINES = ["-", "--", ":"]
SHOWN = 40  # steps whose samples are shown


def report(folders: list[Path]) -> Path:
    """Writes the report of a run as it stands, or beside several runs what compares them.

    Raises:
        ReportError: a folder that holds no run.
    """
    settings = [read_settings(folder) for folder in folders]
    logs = [read_lines(folder / "metrics.jsonl") for folder in folders]
    if len(folders) == 1:
        return _of_one(folders[0], settings[0], logs[0])
    above = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    names = [str(folder.resolve().relative_to(above)) for folder in folders]
    rows = [("run", "RL steps", "reward, last 5 steps", "held-out greedy, first and last")]
    for name, log in zip(names, logs, strict=True):
        rewards = [r["reward/mean"] for r in log if r["phase"] == "rl"]
        last = f"{sum(rewards[-5:]) / len(rewards[-5:]):.3f}" if rewards else ""
        greedy = [f"{r['eval/greedy']:.1%}" for r in log if r["phase"] == "eval"]
        rows.append((name, len(rewards), last, ", ".join(greedy[:1] + greedy[1:][-1:])))
    keys = dict.fromkeys(key for one in settings for key in one if key != "run.dir")
    values = ((key, *(one.get(key, "") for one in settings)) for key in keys)
    table = [("setting", *names), *(row for row in values if any(v != row[1] for v in row[2:]))]
    parts = [f"<h1>{len(names)} runs</h1>", _rows(rows), "<h2>Settings that differ</h2>"]
    parts += [_rows(table), "<h2>Curves</h2>", _curves(dict(zip(names, logs, strict=True)))]
    return _page(above / "compare.html", f"{len(names)} runs", parts)


def _of_one(folder: Path, settings: dict[str, Any], log: list[dict[str, Any]]) -> Path:
    done = folder / "summary.json"
    summary = json.loads(done.read_text()) if done.is_file() else {}
    parts = [f"<h1>{html.escape(folder.name)}</h1>", _rows(summary.items())]
    parts += ["<h2>Curves</h2>", _curves({"": log}), "<h2>Samples</h2>"]
    parts += _samples(read_lines(folder / "samples.jsonl"))
    if counted := read_lines(folder / "gradients.jsonl"):
        parts += ["<h2>Gradient coefficients</h2>", _gradients(counted)]
    if grown := read_lines(folder / "trees.jsonl"):
        parts += ["<h2>Trees</h2>", _trees(grown[:1] + grown[1:][-1:])]
    parts += ["<h2>Settings</h2>", _rows(settings.items())]
    return _page(folder / "report.html", folder.name, parts)


def _samples(records: list[dict[str, Any]]) -> list[str]:
    """Best and worst of steps from the first to the last; these two are open."""
    shown = [records[i] for i in _spread(len(records), SHOWN)]
    parts = []
    for record in shown:
        best, worst = record["best"], record["worst"]
        title = f"Step {record['step']}: best {best[0]['reward']:g}, worst {worst[-1]['reward']:g}"
        is_open = " open" if record in (shown[0], shown[-1]) else ""
        rows = [("", "reward", "prompt", "completion", "answer")]
        for name, samples in (("best", best), ("worst", worst)):
            for one in samples:
                reward = f"{one['reward']:g}"
                if turns := one.get("turns"):
                    reward += " turns " + " ".join(f"{turn:g}" for turn in turns)
                said = Marked(one.get("parts") or [(one["completion"], True)])
                rows.append((name, reward, one["prompt"], said, one["answer"]))
        parts.append(f"<details{is_open}><summary>{title}</summary>{_rows(rows)}</details>")
    if any("parts" in one for record in shown for one in record["best"] + record["worst"]):
        said = "<p><mark>Marked</mark>: read by the policy and not drawn by it, not trained.</p>"
        parts.insert(0, said)
    return parts


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


class Marked(list):
    """[(text, whether it was drawn)]"""

    def __str__(self) -> str:
        pieces = ((html.escape(text), drawn) for text, drawn in self)
        return "".join(piece if drawn else f"<mark>{piece}</mark>" for piece, drawn in pieces)


def _gradients(records: list[dict[str, Any]]) -> str:
    """Of the first step, one in the middle and the last one."""
    picked = [records[i] for i in dict.fromkeys(_spread(len(records), 3))]
    figure, grid = _axes(1, len(picked), 3)
    for axes, record in zip(grid, picked):
        axes.stairs(record["counts"], record["edges"], fill=True)
        axes.set_yscale("symlog")
        total = max(1, sum(record["counts"]) + record["zero"])
        title = f"step {record['step']}: {record['zero'] / total:.0%} of {total:,} tokens are 0"
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("- d loss / d log-prob, 1: a token's even share")
    return _svg(figure)


def _page(path: Path, title: str, parts: list[str]) -> Path:
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    path.write_text("\n".join(["<!doctype html>", head, *parts]), encoding="utf-8")
    return path


def _curves(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Records of each run, by a name that is told where there are several: a colour each."""
    names = {name for records in runs.values() for record in records for name in record}
    panels = {title: series for title, series in PANELS.items() if names & {*series.values()}}
    rows = max(1, -(-len(panels) // 2))
    figure, grid = _axes(rows, 2, 2.8 * rows)
    for spare in grid[len(panels) :]:
        spare.set_visible(False)
    for axes, (title, series) in zip(grid, panels.items()):
        in_warmup = title.startswith("Warm-up")
        for i, (run, records) in enumerate(runs.items()):
            ends = [r["step"] for r in records if r["phase"] == "warmup"]
            offset = 0 if in_warmup else max(ends, default=0)
            for j, (label, name) in enumerate(series.items()):
                shown = [r for r in records if name in r and (r["phase"] == "warmup") == in_warmup]
                how = {"marker": "." if len(shown) < 30 else "", "label": label}
                if run:
                    how |= {"label": f"{run}: {label}", "color": f"C{i}", "ls": LINES[j]}
                axes.plot([r["step"] - offset for r in shown], [r[name] for r in shown], **how)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _svg(figure)


def _trees(records: list[dict[str, Any]]) -> str:
    figure, grid = _axes(1, len(records), 4)
    for axes, record in zip(grid, records):
        draw(axes, record)
        title = f"step {record['step']}: the group that shared most, red to green by reward"
        axes.set_title(title, fontsize=10)
    return _svg(figure)


def _axes(rows: int, columns: int, inches: float) -> tuple[Figure, list[Axes]]:
    """A grid of axes, with room for titles and labels: matplotlib's own layout takes seconds."""
    figure = Figure(figsize=(11, inches))
    room = {"left": 0.06, "right": 0.99, "top": 1 - 0.3 / inches, "bottom": 0.5 / inches}
    room |= {"hspace": 0.3, "wspace": 0.15}
    return figure, list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=room).flat)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "rlkern"}):  # the same run gives the same picture
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _rows(rows: Any) -> str:
    lines = ("".join(f"<td><code>{_cell(v)}</code></td>" for v in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, Marked):
        return str(value)
    return html.escape(value if isinstance(value, str) else json.dumps(value))
