"""The bench harness: what it measures is what it says, and a red op gives no ratio."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import harness, memory, report  # noqa: E402


def saved(tests: str = "passed", gpu: str | None = None) -> dict:
    """A result with one case: limit 2 ms, ours 3 ms, eager 45 ms."""

    def entry(variant: str, seconds: float) -> dict:
        info = {
            "op": "some_op",
            "shape": "small",
            "dtype": "float32",
            "pass": "forward",
            "variant": variant,
            "limit": "copy",
            "limit_ms": 2.0,
            "peak_bytes": 3 * 2**20,
            "tests": tests,
            "sizes": {"rows": 7},
        }
        return {"extra_info": info, "stats": {"median": seconds, "iqr": seconds / 4}}

    machine = {"name": "box", "cpu": "Some CPU", "cores": 2, "threads": 2, "torch": "2.13"}
    return {
        "machine_info": machine | {"gpu": gpu, "cuda": "13.0", "triton": "3.6"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "command": "python -m pytest bench",
        "benchmarks": [entry("limit", 2e-3), entry("rlkern", 3e-3), entry("eager", 45e-3)],
    }


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    def render(result: dict) -> str:
        path = tmp_path / "bench/results/box/some_op.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
        (tmp_path / "docs").mkdir()
        document = tmp_path / "docs/page.md"
        document.write_text("A\n<!-- bench:begin some_op -->\nold\n<!-- bench:end -->\nB\n")
        monkeypatch.setattr(report, "ROOT", tmp_path)
        monkeypatch.setattr(report, "RESULTS", tmp_path / "bench/results")
        monkeypatch.setattr(report, "IMAGES", tmp_path / "docs/images")
        monkeypatch.setattr(sys, "argv", ["report", "--check"])
        assert report.main() == 1
        monkeypatch.setattr(sys, "argv", ["report"])
        assert report.main() == 0
        monkeypatch.setattr(sys, "argv", ["report", "--check"])
        assert report.main() == 0
        return document.read_text()

    return render


def test_a_table_holds_ratios_the_command_and_a_plot(rendered, tmp_path):
    text = rendered(saved())
    assert text.startswith("A\n<!-- bench:begin some_op -->\n**box** (Some CPU, 2 cores")
    assert text.endswith("<!-- bench:end -->\nB\n")
    assert "old" not in text
    assert "(../bench/results/box/some_op.json): `python -m pytest bench`" in text
    assert "| **rlkern** | 1.50× | 1.00× | 25% | 3.0 MiB |" in text
    assert "| eager | 22× | 15× | 25% | 3.0 MiB |" in text
    assert " ms " not in text
    assert "small: rows 7" in text
    assert "(images/box-some_op.svg)" in text
    assert (tmp_path / "docs/images/box-some_op.svg").is_file()


def test_absolute_times_are_those_of_a_named_gpu(rendered):
    text = rendered(saved(gpu="Some GPU"))
    assert "| ms |" in text
    assert "| 1.50× | 1.00× | 25% | 3 | 3.0 MiB |" in text


def test_no_ratio_without_green_tests(rendered, tmp_path):
    text = rendered(saved(tests="not run"))
    assert "×" not in text
    assert "Ratios are withheld" in text
    assert not (tmp_path / "docs/images/box-some_op.svg").exists()


def test_a_table_of_errors(rendered):
    errors = {"rows": "flat", "dtype": "bfloat16", "logprob_mean": 1.25e-7, "logprob_max": 2e-6}
    result = saved() | {"kind": "errors", "shape": {"tokens": 3}}
    result["rows"] = [errors | {"variant": "rlkern"}]
    del result["benchmarks"], result["commit_info"]
    text = rendered(result)
    assert "| rows | dtype | variant | logprob, mean | logprob, max |" in text
    assert "| flat | bfloat16 | **rlkern** | 1.2e-07 | 2.0e-06 |" in text
    assert "Shape: tokens 3." in text


def test_a_table_of_kernel_resources(rendered):
    row = {"op": "some_op", "kernel": "fold", "dtype": "bfloat16", "specialisations": 3}
    found = {"registers": 40, "shared_bytes": 1536, "shared_limit": 99 * 1024, "local_bytes": 0}
    rows = [row | found | {"capability": 120}, row | found | {"capability": 80, "local_bytes": 8}]
    versions = {"triton": "3.9.0"}
    result = {"kind": "kernel_resources", "versions": versions, "command": "this", "rows": rows}
    text = rendered(result)
    assert "triton 3.9.0. From [some_op.json](../bench/results/box/some_op.json): `this`." in text
    assert "| op | kernel | dtype | compiled | sm_80 | sm_120 | spilled |" in text
    assert "| some_op | fold | bfloat16 | 3 | 40, 1,536 B | 40, 1,536 B | 8 B |" in text


def test_the_clock_replays_and_then_runs():
    clock = harness.Clock()
    clock.pending.extend([0.5, 0.25])
    durations = []
    while clock.pending:
        start = clock()
        durations.append(clock() - start)
    assert durations == [0.5, 0.25]
    assert clock() < clock()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call():
    code = (
        "import torch; from bench.memory import peak_growth as p; "
        "print(p(lambda: [torch.ones(50 * 2**20, dtype=torch.uint8).max() for _ in 'ab']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert abs(int(run.stdout) / 2**20 - 50) < 10
    assert memory._status("VmRSS") > 0


def test_the_smallest_bench_runs_and_leaves_nothing_local(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench/ops/bench_group_advantage.py"]
    command += ["--benchmark-enable", "--bench-shapes", "smoke", "--bench-seconds", "0.1"]
    command += ["--bench-unchecked", "--bench-results", str(tmp_path), "--bench-machine", "here"]
    command += ["-k", "rlkern or limit or blocks", "-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:]
    text = (tmp_path / "here/group_advantage.json").read_text()
    result = json.loads(text)
    variants = {e["extra_info"]["variant"]: e for e in result["benchmarks"]}
    assert set(variants) == {"limit", "rlkern", "eager-blocks"}
    limit = variants["limit"]
    assert limit["stats"]["median"] * 1e3 == pytest.approx(limit["extra_info"]["limit_ms"])
    assert all(e["stats"]["rounds"] >= harness.MIN_ROUNDS for e in variants.values())
    assert "data" not in limit["stats"]
    for local in (str(tmp_path), str(ROOT), str(Path.home())):
        assert local not in text
    assert result["machine_info"]["torch"] == torch.__version__


def test_an_op_with_red_tests_is_not_timed(tmp_path):
    """A bench of an op whose test file does not exist: pytest fails there."""
    bench = ROOT / "bench/ops"
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pytest
from bench.ops import bench_group_advantage as b
b.OP = "an_op_without_tests"
sys.exit(pytest.main([{str(bench / "bench_group_advantage.py")!r}, "--benchmark-enable",
    "--bench-shapes", "smoke", "-k", "rlkern", "-p", "no:cacheprovider"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 1, run.stdout[-2000:]
    assert "tests/ops/test_an_op_without_tests.py is red: nothing is timed" in run.stdout
