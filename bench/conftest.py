"""Collects bench_*.py, times the variants of a case in turns, and saves JSON without local names.

    python -m pytest bench --benchmark-enable --bench-results bench/results

An op whose tests are red is not timed.
"""

import io
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bench import harness
from bench.machine import machine
from bench.oracles import versions

ROOT = Path(__file__).parents[1]
_MEASURED: dict[tuple, harness.Measured] = {}
_TESTS: dict[str, str] = {}  # op -> "passed", "failed", "not run"


class _Nowhere(io.BytesIO):
    """An open file to older releases of pytest-benchmark, a path to newer ones."""

    def __fspath__(self) -> str:
        return os.devnull


def pytest_addoption(parser):
    group = parser.getgroup("rlkern benches")
    group.addoption("--bench-results", metavar="DIR", help="write DIR/<machine>/<op>.json")
    group.addoption(
        "--bench-machine", metavar="NAME", help="instead of a name read off the machine"
    )
    group.addoption(
        "--bench-shapes", metavar="A,B", help="these shapes alone (default: all but smoke)"
    )
    group.addoption(
        "--bench-seconds", type=float, default=8.0, help="for all variants of a case together"
    )
    group.addoption(
        "--bench-unchecked", action="store_true", help="do not run the op's tests: prints no ratio"
    )
    group.addoption(
        "--bench-green", metavar="A,B", default="", help="ops whose tests have just passed"
    )


def pytest_configure(config):
    # pytest-benchmark calls the hook that writes our files only when it writes one of its own
    if config.getoption("bench_results") and not config.option.benchmark_json:
        config.option.benchmark_json = _Nowhere()


def pytest_collect_file(file_path, parent):
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        # a file named on the command line is collected by pytest itself
        if parent.session.isinitpath(file_path):
            return None
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("bench_shapes")
    kept, dropped = [], []
    for item in items:
        if "race" not in getattr(item, "fixturenames", ()):
            kept.append(item)
            continue
        item.add_marker(pytest.mark.benchmark(timer=harness.clock))
        case = item.callspec.params["case"]
        if wanted:
            keep = case.shape in wanted.split(",")
        else:
            keep = case.shape != "smoke" and case.device in ("any", harness.device())
        (kept if keep else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def race(request, benchmark):
    """race(op, problem, case, variant): measures the whole case once, reports one variant."""

    def run(op: str, problem, case: harness.Case, variant: str) -> None:
        tests = _tests_of(op, request.config)
        if tests == "failed":
            pytest.fail(f"tests/ops/test_{op}.py is red: nothing is timed", pytrace=False)
        if benchmark.disabled:
            variants = harness.build(problem, case).variants
            benchmark(variants[variant]) if variant in variants else pytest.skip("not installed")
            return
        key = (op, case)
        if key not in _MEASURED:
            _MEASURED.clear()
            budget = request.config.getoption("bench_seconds")
            _MEASURED[key] = harness.measure(problem, case, budget)
        measured = _MEASURED[key]
        seconds = measured.seconds.get(variant, harness.Failure("not installed, or left out here"))
        if isinstance(seconds, harness.Failure):
            pytest.skip(f"{variant}: {seconds.reason}")
        benchmark.group = f"{op} {case}"
        benchmark.extra_info |= {
            "op": op,
            "shape": case.shape,
            "dtype": case.dtype,
            "pass": case.passes,
            "variant": variant,
            "sizes": measured.problem.sizes,
            "limit": measured.problem.limit,
            "limit_bytes": measured.problem.limit_bytes,
            "limit_ms": statistics.median(measured.seconds[harness.LIMIT]) * 1e3,
            "disturbed": round(measured.disturbed[variant], 3),
            "peak_bytes": measured.peak_bytes.get(variant),
            "returned_bytes": measured.problem.returned_bytes,
            "tests": tests,
        }
        harness.clock.pending.extend(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
        assert not harness.clock.pending

    return run


def _tests_of(op: str, config) -> str:
    if op in config.getoption("bench_green").split(","):
        return "passed"
    if config.getoption("bench_unchecked"):
        return "not run"
    if op not in _TESTS:
        command = [sys.executable, "-m", "pytest", f"tests/ops/test_{op}.py", "-x", "-q"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        _TESTS[op] = "passed" if run.returncode == 0 else "failed"
        if run.returncode:
            print(run.stdout[-3000:])
    return _TESTS[op]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info |= machine(config.getoption("bench_machine"))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Trims pytest-benchmark's JSON in place, and writes it op by op."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        # the cases are dataclasses: extra_info says the same in words
        entry.pop("params", None)
        entry["options"].pop("timer", None)
        _fill_limit(entry["extra_info"])
    commit = output_json.get("commit_info") or {}
    output_json["commit_info"] = {key: commit.get(key) for key in ("id", "dirty")}
    output_json["versions"] = versions()
    output_json["command"] = _command(config)
    folder = config.getoption("bench_results")
    if not folder:
        return
    by_op: dict[str, list] = {}
    for entry in output_json["benchmarks"]:
        by_op.setdefault(entry["extra_info"].get("op", "other"), []).append(entry)
    for op, entries in by_op.items():
        path = Path(folder) / output_json["machine_info"]["name"] / f"{op}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(output_json | {"benchmarks": entries}, indent=1) + "\n")


def _fill_limit(info: dict) -> None:
    """A bench that gave limit_bytes and no limit_ms gets the time of a copy of as many bytes."""
    if info.get("limit_ms") is None and info.get("limit_bytes"):
        copy = harness.copy_of(info["limit_bytes"], harness.device())
        timed = harness._time_cuda if harness.device() == "cuda" else harness._time_cpu
        rounds = [timed(copy, 3) for _ in range(15)]
        info |= {"limit": "copy", "limit_ms": statistics.median(rounds) * 1e3}


def _command(config) -> str:
    """The whole command line; paths from the repository's root, those outside by name alone."""
    kept = []
    for arg in map(str, config.invocation_params.args):
        option, equals, value = arg.partition("=") if arg[:2] == "--" else ("", "", arg)
        if os.path.isabs(value):
            path = Path(value)
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        kept.append(option + equals + value)
    return shlex.join(["python", "-m", "pytest", *kept])
