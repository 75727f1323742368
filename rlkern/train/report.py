"""report.html: one file with summary, curves, samples and settings, that loads nothing else.
compare.html: the same of several runs.
"""

import html
import io
import json
import os
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from rlkern.train.config import Config, load_config
from rlkern.train.log import read_lines
from rlkern.train.trees import draw

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;color:#222}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}
table{border-collapse:collapse}code{font-size:13px}svg{width:100%;height:auto}"""

PANELS = {  # title -> label -> metric
    "Reward and accuracy": {"sampled reward": "reward/mean", "held-out greedy": "eval/greedy"},
    "Groups with a signal": {"share": "signal/groups"},
    "Warm-up loss (nats per token)": {"loss": "loss", "floor": "loss_floor"},
    "Entropy (nats per token)": {"entropy": "entropy"},
    "Completions": {"mean length": "completion/length", "share cut off": "completion/truncated"},
    "Gradient norm": {"norm": "grad_norm"},
    "Trainer and sampler (nats)": {"max |log-prob gap|": "logprob_gap/max", "KL": "logprob_gap/kl"},
    "Staleness (steps)": {"mean": "staleness/mean", "max": "staleness/max"},
    "Tokens of a rollout": {"computed": "rollout/computed", "used": "rollout/used"},
    "Share of KV reads saved": {"saved": "rollout/kv_saved"},
    "Seconds per step": {"step": "time/step", "rollout": "time/rollout", "update": "time/update"},
}
LINES = ["-", "--", ":"]


def write_report(run_dir: Path, cfg: Config, summary: dict[str, Any]) -> Path:
    samples = read_lines(run_dir / "samples.jsonl")
    settings = flat(cfg)
    parts = [f"<h1>{html.escape(run_dir.name)}</h1>", _rows(summary.items()), "<h2>Curves</h2>"]
    parts += [_curves({"": read_lines(run_dir / "metrics.jsonl")}), "<h2>Samples</h2>"]
    for record in samples[:1] + samples[1:][-1:]:
        picked = record["best"] + record["worst"]
        rows = [list(picked[0]), *(sample.values() for sample in picked)]
        parts += [f"<h3>Step {record['step']}: best and worst</h3>", _rows(rows)]
    if grown := read_lines(run_dir / "trees.jsonl"):
        parts += ["<h2>Trees</h2>", _trees(grown[:1] + grown[1:][-1:])]
    parts += ["<h2>Settings</h2>", _rows(settings.items())]
    return _page(run_dir / "report.html", run_dir.name, parts)


def report(folders: list[Path]) -> Path:
    """Writes the report of a run as it stands, or beside several runs what compares them."""
    configs = [load_config(folder / "config.json", {}) for folder in folders]
    logs = [read_lines(folder / "metrics.jsonl") for folder in folders]
    if len(folders) == 1:
        done = folders[0] / "summary.json"
        return write_report(
            folders[0], configs[0], json.loads(done.read_text()) if done.is_file() else {}
        )
    above = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    names = [str(folder.resolve().relative_to(above)) for folder in folders]
    rows = [("run", "RL steps", "reward, last 5 steps", "held-out greedy, first and last")]
    for name, log in zip(names, logs, strict=True):
        rewards = [r["reward/mean"] for r in log if r["phase"] == "rl"]
        last = f"{sum(rewards[-5:]) / len(rewards[-5:]):.3f}" if rewards else ""
        greedy = [f"{r['eval/greedy']:.1%}" for r in log if r["phase"] == "eval"]
        rows.append((name, len(rewards), last, ", ".join(greedy[:1] + greedy[1:][-1:])))
    settings = [flat(cfg) for cfg in configs]
    differ = [key for key in settings[0] if any(s[key] != settings[0][key] for s in settings)]
    table = [("setting", *names)]
    table += [(key, *(s[key] for s in settings)) for key in differ if key != "run.dir"]
    parts = [f"<h1>{len(names)} runs</h1>", _rows(rows), "<h2>Settings that differ</h2>"]
    parts += [_rows(table), "<h2>Curves</h2>", _curves(dict(zip(names, logs, strict=True)))]
    return _page(above / "compare.html", f"{len(names)} runs", parts)


def _page(path: Path, title: str, parts: list[str]) -> Path:
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    path.write_text("\n".join(["<!doctype html>", head, *parts]), encoding="utf-8")
    return path


def flat(cfg: Config) -> dict[str, Any]:
    """{section.key: value}, as on the command line."""
    settings = {}
    for name, value in cfg.model_dump().items():
        inner = value if isinstance(value, dict) else {"": value}
        settings |= {f"{name}.{key}".rstrip("."): setting for key, setting in inner.items()}
    return settings


def _curves(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Records of each run, by a name that is told where there are several: a colour each."""
    rows = -(-len(PANELS) // 2)
    figure = Figure(figsize=(11, 2.8 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2).flat)
    for spare in grid[len(PANELS) :]:
        spare.set_visible(False)
    for axes, (title, series) in zip(grid, PANELS.items()):
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
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records):
        draw(axes, record)
        title = f"step {record['step']}: the group that shared most, red to green by reward"
        axes.set_title(title, fontsize=10)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "rlkern"}):  # the same run gives the same picture
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _rows(rows: Any) -> str:
    cells = ([v if isinstance(v, str) else json.dumps(v) for v in row] for row in rows)
    lines = ("".join(f"<td><code>{html.escape(c)}</code></td>" for c in row) for row in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
