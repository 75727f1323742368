"""Renders bench/results/<machine>/<op>.json into README.md and docs: tables, and plots beside them.

    python -m bench.report            # rewrite them
    python -m bench.report --check    # exit 1 if a table is not what the JSON says

A table stands between `<!-- bench:begin OP -->` and `<!-- bench:end -->`; what is between is ours.
OP is also the name of another file there, such as `error_table`; `summary` is every op in a line.
Times are medians of rounds in which all variants took turns, given as multiples of the limit and
of rlkern; absolute times are shown for a named GPU alone.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
IMAGES = ROOT / "docs/images"
BLOCK = re.compile(r"(<!-- bench:begin ([\w-]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)
OURS, LIMIT = "rlkern", "limit"
# A plot of wider range than this is logarithmic.
LINEAR_RANGE = 20
NO_RATIO = "–"


class Row(NamedTuple):
    shape: str
    dtype: str
    passes: str
    variant: str
    seconds: float
    spread: float  # interquartile range over median
    limit_seconds: float | None
    limit: str
    peak_bytes: int | None
    returned_bytes: int | None
    green: bool
    sizes: dict[str, int] | None

    @property
    def case(self) -> tuple[str, str, str]:
        return self.shape, self.dtype, self.passes

    @property
    def scratch_bytes(self) -> int | None:
        """The peak but for what the call returns."""
        if self.peak_bytes is None or self.returned_bytes is None:
            return None
        return max(0, self.peak_bytes - self.returned_bytes)


class Result(NamedTuple):
    path: Path
    op: str
    machine: dict
    saved: dict
    rows: list[Row]


def load(path: Path) -> Result:
    saved = json.loads(path.read_text())
    rows = []
    for entry in saved["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        limit_ms = info.get("limit_ms")
        rows.append(
            Row(
                shape=info["shape"],
                dtype=info["dtype"],
                passes=info.get("pass", "forward"),
                variant=info["variant"],
                seconds=stats["median"],
                spread=stats["iqr"] / stats["median"],
                limit_seconds=None if limit_ms is None else limit_ms / 1e3,
                limit=info.get("limit", "copy"),
                peak_bytes=info.get("peak_bytes"),
                returned_bytes=info.get("returned_bytes"),
                green=info.get("tests") == "passed",
                sizes=info.get("sizes"),
            )
        )
    return Result(path, path.stem, saved["machine_info"], saved, rows)


def markdown(name: str, document: Path) -> str:
    """The text between the markers of `name` in `document`: one part a machine."""
    if name == "summary":
        return _summary(document)
    parts = []
    for path in sorted(RESULTS.glob(f"*/{name}.json")):
        saved = json.loads(path.read_text())
        if "benchmarks" in saved:
            parts.append(_section(load(path), document))
        elif render := TABLES.get(saved.get("kind")):
            parts.append(render(path, saved, document))
        else:
            raise SystemExit(f"{path.relative_to(ROOT)}: no table is known for such a result")
    return "\n".join(parts) if parts else "Not measured yet.\n"


def _errors(path: Path, saved: dict, document: Path) -> str:
    """Mean and largest absolute errors, of each variant on each kind of rows."""
    columns = [key for key in saved["rows"][0] if key not in ("rows", "dtype", "variant")]
    head = ["rows", "dtype", "variant", *(key.replace("_", ", ") for key in columns)]
    lines = [_source(path, saved, document), "", *_head(head)]
    for row in saved["rows"]:
        variant = f"**{OURS}**" if row["variant"] == OURS else row["variant"]
        cells = [row["rows"], row["dtype"], variant, *(_error(row[key]) for key in columns)]
        lines.append(_line(cells))
    sizes = ", ".join(f"{key} {value}" for key, value in saved["shape"].items())
    return "\n".join([*lines, "", f"Shape: {sizes}.", ""])


def _memory(path: Path, saved: dict, document: Path) -> str:
    """Scratch memory of each variant, a column a vocabulary; then the plot."""
    vocabs = list(dict.fromkeys(row["vocab"] for row in saved["rows"]))
    lines = [_source(path, saved, document), ""]
    lines += _head(["pass", "variant", *(f"vocab {vocab:,}" for vocab in vocabs)])
    for (passes, variant), scratch in _series(saved).items():
        name = f"**{OURS}**" if variant == OURS else variant
        lines.append(_line([passes, name, *(_mebibytes(scratch.get(v)) for v in vocabs)]))
    sizes = ", ".join(f"{key} {value}" for key, value in saved["shape"].items())
    lines += ["", f"Shape: {sizes}.", ""]
    image = _image(path, saved["machine_info"])
    if image.exists():
        alt = f"Extra memory over the vocabulary on {saved['machine_info']['name']}"
        lines += [f"![{alt}]({os.path.relpath(image, document.parent)})", ""]
    return "\n".join(lines)


def _series(saved: dict) -> dict[tuple[str, str], dict[int, int]]:
    """Scratch bytes by vocabulary, of every pass and variant."""
    series: dict[tuple[str, str], dict[int, int]] = {}
    for row in saved["rows"]:
        of_variant = series.setdefault((row["pass"], row["variant"]), {})
        of_variant[row["vocab"]] = row["scratch_bytes"]
    return series


def _summary(document: Path) -> str:
    """Each op and pass in a line: from the best of its cases to the worst."""
    head = ["op", "pass", "dtype", "limit", "time / limit", "eager / rlkern", "extra memory"]
    head.append("eager's")
    parts = []
    for folder in sorted(RESULTS.glob("*/")):
        # op-part.json holds a part of an op's cases
        files = [p for p in sorted(folder.glob("*.json")) if "-" not in p.stem and _is_bench(p)]
        results = [load(p) for p in files]
        lines = []
        for result in results:
            rows = [r for r in result.rows if r.green and r.limit_seconds]
            for passes, dtype, limit in dict.fromkeys((r.passes, r.dtype, r.limit) for r in rows):
                mine = [r for r in rows if (r.passes, r.dtype, r.limit) == (passes, dtype, limit)]
                ours = {r.case: r for r in mine if r.variant == OURS}
                eager = [r for r in mine if r.variant == "eager" and r.case in ours]
                figures = (
                    _range([r.seconds / r.limit_seconds for r in ours.values()], _times),
                    _range([r.seconds / ours[r.case].seconds for r in eager], _times),
                    _range([r.peak_bytes for r in ours.values()], _mebibytes),
                    _range([r.peak_bytes for r in eager], _mebibytes),
                )
                link = os.path.relpath(ROOT / f"docs/ops/{result.op}.md", document.parent)
                lines.append(_line([f"[{result.op}]({link})", passes, dtype, limit, *figures]))
        if lines:
            parts.append("\n".join([f"**{folder.name}**", "", *_head(head), *lines, ""]))
    return "\n".join(parts) if parts else "Not measured yet.\n"


def _range(values: list, show: Callable) -> str:
    shown = [show(value) for value in sorted(v for v in values if v is not None)]
    if not shown:
        return NO_RATIO
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} – {shown[-1]}"


def _parity(path: Path, saved: dict, document: Path) -> str:
    """How far other people's code and ours are apart: a table an area, then a count."""
    lines = [_source(path, saved, document), ""]
    head = ["peer", "case", "rlkern", "value", "gradient", "budget", ""]
    for area in dict.fromkeys(row["area"] for row in saved["rows"]):
        lines += [f"### {area.capitalize()}", "", *_head(head)]
        rows = [row for row in saved["rows"] if row["area"] == area]
        for row in sorted(rows, key=lambda row: row["peer"]):
            verdict = "agrees" if row["agrees"] else "**differs**"
            verdict += f": {row['note']}" * bool(row["note"])
            budgets = dict.fromkeys(_error(row[key]) for key in ("budget", "gradient_budget"))
            figures = [_error(row["value"]), _error(row["gradient"]), ", ".join(budgets)]
            lines.append(_line([row["peer"], row["case"], f"`{row['rlkern']}`", *figures, verdict]))
        lines.append("")
    agree = sum(row["agrees"] for row in saved["rows"])
    return "\n".join([*lines, f"{agree} of {len(saved['rows'])} cells agree.", ""])


def _error(value: float | None) -> str:
    return NO_RATIO if value is None else f"{value:.1e}"


def _demo(path: Path, saved: dict, document: Path) -> str:
    """The demo's runs: held-out accuracy before, on the way and after, and how long it took."""
    head = ["seed", "greedy after the warm-up", "then every 10 steps", "training", "whole command"]
    lines = [_source(path, saved, document), "", *_head([*head, "exit"])]
    for run in saved["runs"]:
        cells = [
            f"{run['seed']}{' (null control)' * run['null']}",
            f"{run['greedy_before']:.1%}",
            ", ".join(f"{value:.1%}" for value in run["greedy_every_10_steps"][1:]),
            f"{run['training_seconds']:.0f} s",
            f"{run['wall_seconds']:.0f} s",
            str(run["exit_code"]),
        ]
        lines.append(_line(cells))
    load = saved["machine_info"]["load_at_end"][-1]
    return "\n".join([*lines, "", f"Load average over the last 15 minutes: {load}.", ""])


def _precision(path: Path, saved: dict, document: Path) -> str:
    """The demo in each precision mode: what it learns, and how far the two policies are apart."""
    head = ["mode", "reward, first 5 steps", "last 5", "greedy every 10 steps"]
    lines = [_source(path, saved, document), ""]
    lines += _head([*head, "largest log-prob gap", "mean KL"])
    by_mode: dict[str, list[dict]] = {}
    for run in saved["runs"]:
        by_mode.setdefault(run["mode"], []).append(run)
    for mode, runs in by_mode.items():
        curves = zip(*(run["greedy_every_10_steps"] for run in runs))
        cells = [
            mode,
            _over_seeds([run["reward_first_5"] for run in runs], "{:.3f}".format),
            _over_seeds([run["reward_last_5"] for run in runs], "{:.3f}".format),
            ", ".join(_over_seeds(values, "{:.1%}".format) for values in curves),
            _over_seeds([run["largest_gap"] for run in runs], _gap),
            _over_seeds([run["mean_kl"] for run in runs], _gap),
        ]
        lines.append(_line(cells))
    seeds = saved.get("seeds") or [saved["seed"]]
    end = f"Seed {seeds[0]}."
    if len(seeds) > 1:
        named = ", ".join(str(seed) for seed in seeds)
        end = f"Seeds {named}: the mean and, in brackets, the smallest and the largest."
    return "\n".join([*lines, "", end, ""])


def _gap(value: float) -> str:
    return "0" if value == 0 else _error(value)


def _over_seeds(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, and the ends where they are seen to differ."""
    ends = show(min(values)), show(max(values))
    mean = show(sum(values) / len(values))
    return mean if ends[0] == ends[1] else f"{mean} ({ends[0]}–{ends[1]})"


def _weight_sync(path: Path, saved: dict, document: Path) -> str:
    """Time over that of a copy of as many bytes, and how much of them a packet holds."""
    head = ["recipe", "weights", "time / copy", "with statistics", "with packets"]
    head += ["code bytes changed", "packet / codes", "packet / bf16 weights"]
    lines = [_source(path, saved, document), "", *_head(head)]
    for row in saved["rows"]:
        cells = [row["recipe"], row["source"]]
        cells += [
            _times(row[key] / row["copy_seconds"]) for key in ("plain", "statistics", "delta")
        ]
        cells += [f"{row['changed_bytes'] / row['code_bytes']:.2%}"]
        cells += [f"{row['packet_bytes'] / row[key]:.2%}" for key in ("code_bytes", "bf16_bytes")]
        lines.append(_line(cells))
    shape = ", ".join(f"{key} {value:,}" for key, value in saved["shape"].items())
    end = f"{shape}; one update of ±{saved['learning_rate']:g} of every master weight."
    return "\n".join([*lines, "", end, ""])


def _sweep(path: Path, saved: dict, document: Path) -> str:
    """What every preset has learnt after the same number of steps."""
    head = ["preset", "reward, first 5 steps", "last 5", "least of the last 5", "greedy after"]
    head.insert(1, "with")
    lines = [_source(path, saved, document), "", *_head(head)]
    for name in dict.fromkeys(run["run"] for run in saved["runs"]):
        runs = [run for run in saved["runs"] if run["run"] == name]
        if any(run["greedy_after"] is None for run in runs):
            error = next(run["error"] for run in runs if run["greedy_after"] is None)
            lines.append(_line([f"`{name}`", error.replace("|", "/"), "", "", "", ""]))
            continue
        curves = [run["rewards"] for run in runs]
        cells = [
            f"`{name}`",
            runs[0]["options"].strip("{ }"),
            _over_seeds([sum(c[:5]) / 5 for c in curves], "{:.3f}".format),
            _over_seeds([sum(c[-5:]) / 5 for c in curves], "{:.3f}".format),
            _over_seeds([min(c[-5:]) for c in curves], "{:.3f}".format),
            _over_seeds([run["greedy_after"] for run in runs], "{:.1%}".format),
        ]
        lines.append(_line(cells))
    seeds = ", ".join(str(seed) for seed in saved["seeds"])
    end = (
        f"{saved['steps']} steps. Rows with a range: seeds {seeds}; the others: the first of them."
    )
    return "\n".join([*lines, "", end, ""])


def _survival(path: Path, saved: dict, document: Path) -> str:
    """How many runs were killed how often, and how many of them ended in the same bits."""
    head = ["runs", "killed", "of them while writing a checkpoint", "records logged by then"]
    lines = [_source(path, saved, document), "", *_head([*head, "same bits at the end"])]
    for name in dict.fromkeys(outcome["run"] for outcome in saved["outcomes"]):
        outcomes = [outcome for outcome in saved["outcomes"] if outcome["run"] == name]
        kills = [kill for outcome in outcomes for kill in outcome["kills"]]
        logged = sorted(kill["records"] for kill in kills)
        same = sum(not outcome["different"] for outcome in outcomes)
        cells = [name, f"{len(kills)} times"]
        cells += [str(sum(kill["checkpoint_half_written"] for kill in kills))]
        cells += [f"{logged[0]} – {logged[-1]}", f"{same} of {len(outcomes)}"]
        lines.append(_line(cells))
    return "\n".join([*lines, ""])


def _trees(path: Path, saved: dict, document: Path) -> str:
    """The demo with plain groups and with trees: what it learns, and what sampling takes."""
    head = ["rollouts", "reward, first 5 steps", "last 5", "greedy every 10 steps"]
    head += ["tokens computed", "used", "KV reads saved", "rollouts take", "updates take"]
    lines = [_source(path, saved, document), "", *_head(head)]
    for run in saved["runs"]:
        cells = [
            run["strategy"],
            f"{run['reward_first_5']:.3f}",
            f"{run['reward_last_5']:.3f}",
            ", ".join(f"{value:.1%}" for value in run["greedy_every_10_steps"]),
            f"{run['computed_tokens']:,}",
            f"{run['used_tokens']:,}",
            f"{run['kv_saved']:.0%}",
            f"{run['rollout_seconds']:.0f} s",
            f"{run['update_seconds']:.0f} s",
        ]
        lines.append(_line(cells))
    load = saved["machine_info"]["load_at_end"][-1]
    end = f"Seed {saved['seed']}. Load average over the last 15 minutes: {load}."
    return "\n".join([*lines, "", end, ""])


def _rollout(path: Path, saved: dict, document: Path) -> str:
    """Tokens a second of the native engine over those of transformers' generate."""
    head = ["model", "dtype", "prompts x samples", "prompt", "new tokens"]
    head += ["rlkern / generate", "unshared / generate", "KV reads saved"]
    head += ["rlkern / vLLM"] if "vllm" in saved else []
    lines = [_source(path, saved, document), "", *_head(head)]
    for row in saved["rows"]:
        rates = row["tokens_per_second"]
        cells = [row["model"], row["dtype"], f"{row['prompts']} x {saved['group']}"]
        cells += [f"{row['prompt']:,}", f"{row['new']:,}", _times(row["speedup"])]
        cells += [_times(rates["unshared"] / rates["generate"]), f"{row['kv_saved']:.0%}"]
        cells += [_times(row["over_vllm"])] if "vllm" in saved else []
        lines.append(_line(cells))
    load = saved["machine_info"]["load_at_end"][-1]
    peers = f"transformers {saved['transformers']}"
    if "vllm" in saved:
        peers += f", vLLM {saved['vllm']} on the CPU, without torch.compile"
    end = f"{peers}. Load average over 15 minutes: {load}."
    return "\n".join([*lines, "", end, ""])


def _train_trl(path: Path, saved: dict, document: Path) -> str:
    """The reference trainer's tokens a second, memory and rewards beside GRPOTrainer's."""
    head = ["case", "seed", "tokens/s over TRL's", "step, rlkern", "step, TRL"]
    head += ["peak memory, rlkern", "TRL", "reward of the last 5 steps, rlkern", "TRL"]
    lines = [_source(path, saved, document), "", *_head(head)]
    for row in saved["rows"]:
        sides = row["rlkern"], row["trl"]
        cells = [row["case"], str(row["seed"]), _times(row["speedup"])]
        cells += [f"{sum(side['seconds']) / len(side['seconds']):.2f} s" for side in sides]
        cells += [f"{side['peak_mib']:,} ({side['imports_mib']:,}) MiB" for side in sides]
        cells += [f"{side['last_rewards']:.3f}" for side in sides]
        lines.append(_line(cells))
    shapes = "; ".join(
        f"`{name}`: {case['steps']} steps of {case['prompts']} x {case['group']} samples of at "
        f"most {case['new']} tokens, {case['updates']} updates each"
        f"{', with optim.share_prefix' * case['share_prefix']}"
        for name, case in saved["cases"].items()
    )
    load = saved["machine_info"]["load_at_end"][-1]
    end = f"{shapes}. In brackets a process that imports the trainer and no more. TRL "
    end += f"{saved['trl']}, with transformers {saved['trl_transformers']}. Load average over 15 "
    return "\n".join([*lines, "", f"{end}minutes: {load}.", ""])


def _share_prefix(path: Path, saved: dict, document: Path) -> str:
    """A training step with the prompt once, over one with a copy for each response."""
    head = ["dtype", "unshared / shared", "rows of the model", "gradients differ by"]
    lines = [_source(path, saved, document), "", *_head(head)]
    for row in saved["rows"]:
        rows = f"{row['unshared_tokens']:,} -> {row['shared_tokens']:,}"
        cells = [row["dtype"], _times(row["speedup"]), rows, _error(row["gradient_difference"])]
        lines.append(_line(cells))
    shape = ", ".join(
        f"{key} {value:,}" for key, value in (saved["shape"] | saved["model"]).items()
    )
    load = saved["machine_info"]["load_at_end"][-1]
    return "\n".join([*lines, "", f"{shape}. Load average over 15 minutes: {load}.", ""])


def _kernel_resources(path: Path, saved: dict, document: Path) -> str:
    """A line a kernel and dtype: registers a thread and shared memory on each architecture."""
    versions = ", ".join(f"{name} {number}" for name, number in saved["versions"].items())
    link = os.path.relpath(path, document.parent)
    made = _made(None, None, saved)
    lines = [f"{versions}{made}. From [{path.name}]({link}): `{saved['command']}`.", ""]
    found: dict[tuple, dict[int, dict]] = {}
    for row in saved["rows"]:
        key = (row["op"], row["kernel"], row["dtype"], row["specialisations"])
        found.setdefault(key, {})[row["capability"]] = row
    capabilities = sorted({row["capability"] for row in saved["rows"]})
    head = ["op", "kernel", "dtype", "compiled", *(f"sm_{c}" for c in capabilities), "spilled"]
    lines += _head(head)
    for (op, kernel, dtype, count), rows in found.items():
        used = (rows[c] for c in capabilities)
        cells = [f"{row['registers']}, {row['shared_bytes']:,} B" for row in used]
        spilled = max(row["local_bytes"] for row in rows.values())
        lines.append(_line([op, kernel, dtype, str(count), *cells, f"{spilled} B"]))
    limits = {row["capability"]: row["shared_limit"] // 1024 for row in saved["rows"]}
    named = ", ".join(f"sm_{c} {limits[c]} KiB" for c in capabilities)
    return "\n".join(
        [*lines, "", f"A block may have 255 registers a thread and, of memory: {named}.", ""]
    )


def _cuda_resources(path: Path, saved: dict, document: Path) -> str:
    """A line a kernel and dtype: registers, shared memory and conversions on each architecture."""
    versions = ", ".join(f"{name} {number}" for name, number in saved["versions"].items())
    link = os.path.relpath(path, document.parent)
    found: dict[tuple, dict[str, dict]] = {}
    for row in saved["rows"]:
        found.setdefault((row["kernel"], row["dtype"]), {})[row["arch"]] = row
    archs = sorted({row["arch"] for row in saved["rows"]}, key=lambda a: int(a.rstrip("af")))
    made = _made(None, None, saved)
    lines = [f"{versions}{made}. From [{path.name}]({link}): `{saved['command']}`.", ""]
    lines += _head(["kernel", "dtype", "compiled", *(f"sm_{arch}" for arch in archs), "spilled"])
    for (kernel, dtype), rows in found.items():
        cells = []
        for arch in archs:
            row = rows[arch]
            converts = "".join(f", cvt {kind}" for kind in row["conversions"])
            cells.append(f"{row['registers']}, {row['shared_bytes']:,} B{converts}")
        count = max(row["specialisations"] for row in rows.values())
        spilled = max(row["local_bytes"] for row in rows.values())
        name = kernel.removesuffix("_kernel")
        lines.append(_line([name, dtype, str(count), *cells, f"{spilled} B"]))
    return "\n".join([*lines, ""])


TABLES: dict[str, Callable[[Path, dict, Path], str]] = {
    "errors": _errors,
    "parity": _parity,
    "memory": _memory,
    "demo": _demo,
    "precision": _precision,
    "weight_sync": _weight_sync,
    "share_prefix": _share_prefix,
    "trees": _trees,
    "sweep": _sweep,
    "survival": _survival,
    "rollout": _rollout,
    "train_trl": _train_trl,
    "kernel_resources": _kernel_resources,
    "cuda_resources": _cuda_resources,
}


def _source(path: Path, saved: dict, document: Path) -> str:
    """Which machine, versions, commit and command; a link to the JSON."""
    machine = saved["machine_info"]
    built = f"torch {machine['torch']}"
    if machine["gpu"]:
        where = f"{machine['gpu']}, {built}, CUDA {machine['cuda']}, triton {machine['triton']}"
    else:
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {built}"
    where += "".join(f", {name} {number}" for name, number in saved.get("versions", {}).items())
    where += _made(saved.get("commit_info"), saved.get("datetime"), machine)
    link = os.path.relpath(path, document.parent)
    return f"**{machine['name']}** ({where}). From [{path.name}]({link}): `{saved['command']}`."


def _made(commit_info: dict | None, when: str | None, made: dict) -> str:
    """Commit and date: pytest-benchmark's or bench.machine's; the oldest results have none."""
    commit = made.get("commit") or ""
    if commit_info and commit_info.get("id"):
        commit = commit_info["id"][:9] + "-dirty" * bool(commit_info.get("dirty"))
    date = (when or made.get("date") or "")[:10]
    commit = commit.removesuffix("-dirty") + " with changes" * commit.endswith("-dirty")
    return (f"; commit {commit}" if commit else "") + (f"; {date}" if date else "")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|---" * len(cells) + "|"]


def _section(result: Result, document: Path) -> str:
    lines = [_source(result.path, result.saved, document), "", *_table(result), ""]
    sizes = {r.shape: r.sizes for r in result.rows if r.sizes}
    if sizes:
        named = (f"{s}: " + ", ".join(f"{k} {v}" for k, v in d.items()) for s, d in sizes.items())
        lines += ["Shapes: " + "; ".join(named) + ".", ""]
    if not all(r.green for r in result.rows):
        lines += ["Ratios are withheld where the op's tests were not run before the bench.", ""]
    image = _image(result.path, result.machine)
    if image.exists():
        alt = f"{result.op} on {result.machine['name']}: time over the limit"
        lines += [f"![{alt}]({os.path.relpath(image, document.parent)})", ""]
    return "\n".join(lines)


def _table(result: Result) -> list[str]:
    gpu = bool(result.machine["gpu"])
    memory = any(r.peak_bytes is not None for r in result.rows)
    scratch = any(r.scratch_bytes is not None for r in result.rows)
    head = ["shape", "dtype", "pass", "variant", "time / limit", "time / rlkern", "spread"]
    head += ["ms"] * gpu + ["extra memory"] * memory + ["beyond what is returned"] * scratch
    lines = _head(head)
    ours = {r.case: r for r in result.rows if r.variant == OURS}
    for r in result.rows:
        base = ours.get(r.case)
        variant = f"limit: bare {r.limit}" if r.variant == LIMIT else r.variant
        if r.variant == OURS:
            variant = f"**{OURS}**"
        cells = [
            r.shape,
            r.dtype,
            r.passes,
            variant,
            _ratio(r.seconds, r.limit_seconds, r.green),
            _ratio(r.seconds, base and base.seconds, r.green),
            f"{r.spread:.0%}",
        ]
        cells += [f"{r.seconds * 1e3:.3g}"] * gpu
        cells += [_mebibytes(r.peak_bytes)] * memory
        cells += [_mebibytes(r.scratch_bytes)] * scratch
        lines.append(_line(cells))
    return lines


def _ratio(seconds: float, base: float | None, green: bool) -> str:
    return NO_RATIO if base is None or not green else _times(seconds / base)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:,.0f}×"


def _mebibytes(num_bytes: int | None) -> str:
    return NO_RATIO if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"


def _is_bench(path: Path) -> bool:
    return "benchmarks" in json.loads(path.read_text())


def _image(path: Path, machine: dict) -> Path:
    return IMAGES / f"{machine['name']}-{path.stem}.svg"


def _pyplot():
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # the same bytes for the same numbers
    plt.rcParams["svg.hashsalt"] = "rlkern"
    return plt


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)


def plot(result: Result) -> None:
    """Bars of time over the limit, a panel a case."""
    rows = [r for r in result.rows if r.variant != LIMIT and r.limit_seconds and r.green]
    if not rows:
        return
    plt = _pyplot()
    cases = list(dict.fromkeys(r.case for r in rows))
    heights = [sum(r.case == case for r in rows) for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(7, 0.55 * len(cases) + 0.28 * sum(heights) + 0.4),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    ratios = [r.seconds / r.limit_seconds for r in rows]
    for axis, case in zip(axes[:, 0], cases):
        mine = [r for r in rows if r.case == case]
        widths = [r.seconds / r.limit_seconds for r in mine]
        colours = ["#c2410c" if r.variant.startswith(OURS) else "#94a3b8" for r in mine]
        bars = axis.barh([r.variant for r in mine], widths, color=colours)
        axis.bar_label(bars, [_ratio(w, 1.0, True) for w in widths], padding=3, fontsize=8)
        axis.axvline(1.0, color="#334155", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(", ".join(case), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if max(ratios) > LINEAR_RANGE * min(ratios):
        axes[0, 0].set_xscale("log")
    axes[0, 0].set_xlim(right=max(ratios) * (2.5 if axes[0, 0].get_xscale() == "log" else 1.15))
    limits = " or ".join(dict.fromkeys(r.limit for r in rows))
    axes[-1, 0].set_xlabel(f"time / bare {limits} ({result.machine['name']})", fontsize=8)
    _save(figure, _image(result.path, result.machine))


def plot_memory(path: Path, saved: dict) -> None:
    """Lines of scratch memory over the vocabulary, a panel a pass, logarithmic."""
    plt = _pyplot()
    series = _series(saved)
    panels = list(dict.fromkeys(passes for passes, _ in series))
    vocabs = list(dict.fromkeys(row["vocab"] for row in saved["rows"]))
    others = [v for v in dict.fromkeys(variant for _, variant in series) if v != OURS]
    colours = {OURS: "#c2410c"} | dict(zip(others, ("#94a3b8", "#334155", "#0f766e", "#7c3aed")))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7, 3), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels):
        for (passes, variant), scratch in series.items():
            if passes == panel:
                mebibytes = [size / 2**20 for size in scratch.values()]
                axis.plot(list(scratch), mebibytes, "o-", color=colours[variant], label=variant)
        axis.set_xscale("log", base=2)
        # a variant may need nothing at all
        axis.set_yscale("symlog", linthresh=1)
        axis.set_xticks(vocabs, [f"{vocab // 1024}k" for vocab in vocabs], fontsize=8)
        axis.set_title(panel, fontsize=9, loc="left")
        axis.set_xlabel("vocabulary", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"MiB ({saved['machine_info']['name']})", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False)
    _save(figure, _image(path, saved["machine_info"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    check = parser.parse_args().check
    if not check:
        for path in sorted(RESULTS.glob("*/*.json")):
            saved = json.loads(path.read_text())
            if "benchmarks" in saved:
                plot(load(path))
            elif saved.get("kind") == "memory":
                plot_memory(path, saved)
    stale = []
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = document.read_text() if document.exists() else ""
        after = BLOCK.sub(lambda m, d=document: m[1] + markdown(m[2], d) + m[3], before)
        if after != before:
            stale.append(str(document.relative_to(ROOT)))
            if not check:
                document.write_text(after)
    if stale:
        print(("stale: " if check else "rewrote ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
