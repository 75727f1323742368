"""The bench harness: what it measures is what it says, and a red op gives no ratio."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import error_table, harness, memory, memory_over_vocab, oracles, report  # noqa: E402
from bench.ops import bench_linear_logprob  # noqa: E402
from bench.shapes import HEADS, Head  # noqa: E402


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
    def render(result: dict, block: str = "some_op") -> str:
        path = tmp_path / "bench/results/box/some_op.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
        (tmp_path / "docs").mkdir()
        document = tmp_path / "docs/page.md"
        document.write_text(f"A\n<!-- bench:begin {block} -->\nold\n<!-- bench:end -->\nB\n")
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
    assert "beyond" not in text
    assert "(images/box-some_op.svg)" in text
    assert (tmp_path / "docs/images/box-some_op.svg").is_file()


def test_memory_beyond_what_is_returned_has_a_column(rendered):
    result = saved()
    for entry in result["benchmarks"]:
        entry["extra_info"]["returned_bytes"] = 2**20
    text = rendered(result)
    assert "| extra memory | beyond what is returned |" in text
    assert "| **rlkern** | 1.50× | 1.00× | 25% | 3.0 MiB | 2.0 MiB |" in text


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


def test_a_table_of_memory_over_the_vocabulary(rendered, tmp_path):
    result = saved() | {"kind": "memory", "shape": {"tokens": 3}}
    result["rows"] = [
        {"pass": "forward", "variant": variant, "vocab": vocab, "scratch_bytes": scratch * 2**20}
        for variant, scratches in (("rlkern", (0, 1)), ("eager", (64,)))
        for vocab, scratch in zip((1024, 2048), scratches)
    ]
    del result["benchmarks"], result["commit_info"]
    text = rendered(result)
    assert "| pass | variant | vocab 1,024 | vocab 2,048 |" in text
    assert "| forward | **rlkern** | 0.0 MiB | 1.0 MiB |" in text
    assert "| forward | eager | 64.0 MiB | – |" in text
    assert "Shape: tokens 3." in text
    assert "(images/box-some_op.svg)" in text
    assert (tmp_path / "docs/images/box-some_op.svg").is_file()


def test_the_summary_goes_from_best_to_worst(rendered):
    result = saved()
    for entry in saved()["benchmarks"]:
        # ours 6 ms, eager 9 ms, 1 MiB each
        entry["extra_info"] |= {"shape": "large", "peak_bytes": 2**20}
        entry["stats"]["median"] = {"limit": 2e-3, "rlkern": 6e-3, "eager": 9e-3}[
            entry["extra_info"]["variant"]
        ]
        result["benchmarks"].append(entry)
    for entry in saved(tests="not run")["benchmarks"]:
        entry["extra_info"]["dtype"] = "float16"
        result["benchmarks"].append(entry)
    text = rendered(result, "summary")
    figures = "1.50× – 3.00× | 1.50× – 15× | 1.0 MiB – 3.0 MiB | 1.0 MiB – 3.0 MiB"
    assert f"| [some_op](ops/some_op.md) | forward | float32 | copy | {figures} |" in text
    assert "float16" not in text


def measured(
    limit_seconds: float, seconds: float, monkeypatch, once=None, budget_s=0, **problem
) -> harness.Measured:
    """A case with a clock that says what it is told, in no time."""
    times = {"limit": limit_seconds, "rlkern": limit_seconds, "peer": seconds}
    variants = {name: lambda name=name: name for name in times}
    monkeypatch.setattr(harness, "_time_cpu", once or (lambda function, count: times[function()]))
    made = harness.Problem(variants, "matmul", {}, **problem)
    case = harness.Case("small", memory=True)
    monkeypatch.setattr(harness, "device", lambda: "cpu")
    monkeypatch.setattr(harness, "peak_apart", lambda problem, case, variant: 7)
    return harness.measure(lambda case, device: made, case, budget_s)


def test_long_cases_take_fewer_rounds(monkeypatch):
    def rounds(limit_seconds, seconds):
        found = measured(limit_seconds, seconds, monkeypatch)
        return {name: len(values) for name, values in found.seconds.items()}

    assert rounds(0.4, 9.0) == dict.fromkeys(("limit", "rlkern", "peer"), harness.MIN_ROUNDS)
    assert rounds(0.6, 1.1) == dict.fromkeys(("limit", "rlkern", "peer"), harness.LONG_ROUNDS)
    far = {"limit": harness.LONG_ROUNDS, "rlkern": harness.LONG_ROUNDS, "peer": harness.FAR_ROUNDS}
    assert rounds(0.6, 1.3) == far


def test_rounds_that_waited_for_a_core_are_left_out(monkeypatch):
    clock, runs = [0.0], []

    def once(function, count):
        # every other round of rlkern is three times as long, since another process ran
        runs.append(name := function())
        late = name == "rlkern" and runs.count(name) % 2
        clock[0] += 0.2 if late else 0.001
        return 0.3 if late else 0.1

    monkeypatch.setattr(harness, "_waited_seconds", lambda: clock[0])
    found = measured(0.1, 0.1, monkeypatch, once=once)
    rounds = harness.MIN_ROUNDS
    assert found.seconds["limit"] == [0.1] * rounds
    calm = rounds // 2  # too few of them: the least disturbed make up for it
    assert sorted(found.seconds["rlkern"]) == [0.1] * calm + [0.3] * (rounds - calm)
    assert found.disturbed == {"limit": 0, "rlkern": 1 - calm / rounds, "peer": 0}


def test_a_disturbed_case_takes_more_rounds(monkeypatch):
    clock, runs = [0.0], []

    def once(function, count):
        runs.append(function())
        time.sleep(1e-4)
        late = len(runs) % 2
        clock[0] += 0.2 if late else 0.0
        return 0.3 if late else 0.1

    monkeypatch.setattr(harness, "_waited_seconds", lambda: clock[0])
    found = measured(0.1, 0.1, monkeypatch, once=once, budget_s=0.5)
    assert all(set(times) == {0.1} for times in found.seconds.values())
    assert all(len(times) >= harness.MIN_ROUNDS for times in found.seconds.values())


def test_memory_of_the_chosen_variants(monkeypatch):
    assert measured(0.1, 0.1, monkeypatch).peak_bytes.keys() == {"limit", "rlkern", "peer"}
    some = frozenset({"rlkern", "not installed"})
    assert measured(0.1, 0.1, monkeypatch, memory_of=some).peak_bytes == {"rlkern": 7}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_apart_is_absent_where_a_peer_fails(capsys):
    case = harness.Case("smoke", "bfloat16")
    assert harness.peak_apart(bench_linear_logprob.problem, case, "a peer") is None
    assert "KeyError: 'a peer'" in capsys.readouterr().out
    unknown = harness.Case("no such shape")
    with pytest.raises(RuntimeError, match="no such shape-float32-forward: the process"):
        harness.peak_apart(bench_linear_logprob.problem, unknown, "rlkern")


def test_linear_logprob_is_held_against_the_matmuls_of_a_recomputing_backward():
    """Four to one: torch counts the flops."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(passes: str, variant: str) -> int:
        made = bench_linear_logprob.problem(harness.Case("smoke", "bfloat16", passes), "cpu")
        with FlopCounterMode(display=False) as counter:
            made.variants[variant]()
        return counter.get_total_flops()

    one = 2 * 32 * 64 * 1000
    assert flops("forward", "limit") == one
    assert flops("forward+backward", "limit") == 4 * one
    assert flops("forward+backward", "three matmuls") == 3 * one
    # at the shape that takes minutes, slow peers alone are left out
    huge = {c for c in bench_linear_logprob.CASES if c.shape == bench_linear_logprob.HUGE}
    assert len(huge) == 4
    for case in bench_linear_logprob.CASES:
        assert not {"limit", "rlkern", "eager", "compile"} & bench_linear_logprob.left_out(case)


def test_linear_logprob_peers_compute_the_same():
    """Every variant of the bench, those installed: our outputs, and our gradients."""
    for passes in bench_linear_logprob.BOTH:
        case = harness.Case("smoke", "float32", passes)
        made = harness.build(bench_linear_logprob.problem, case)
        ours = made.variants["rlkern"]()
        for name in made.variants.keys() - {"limit", "three matmuls", "rlkern"}:
            for got, want in zip(made.variants[name](), ours):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, msg=f"{name} {passes}")


def test_a_missing_peer_is_absent(monkeypatch):
    monkeypatch.setattr(oracles, "linear_peers", dict)
    made = bench_linear_logprob.problem(harness.Case("smoke", passes="forward+backward"), "cpu")
    assert made.variants.keys() == {"limit", "three matmuls", "rlkern", "eager", "compile"}


def test_memory_without_what_the_call_returns():
    head = HEADS[memory_over_vocab.SHAPES[0]]
    made = [memory_over_vocab.returned_bytes(memory_over_vocab.SHAPES[0], p) for p in ("forward",)]
    assert made == [2 * head.tokens * torch.float32.itemsize]
    gradients = (head.tokens + head.vocab) * head.hidden * torch.bfloat16.itemsize
    assert memory_over_vocab.returned_bytes(memory_over_vocab.SHAPES[0], "forward+backward") == (
        gradients
    )
    vocabs = [HEADS[shape].vocab for shape in memory_over_vocab.SHAPES]
    assert vocabs == [16384, 32768, 65536, 131072, 262144]


@pytest.mark.parametrize("dtype", error_table.DTYPES)
def test_the_error_tables_tell_roundings_apart(dtype, monkeypatch):
    """At a small shape: float64 has no error, 16-bit logits have a large one; so for gradients."""
    small = Head(64, 32, 512)
    monkeypatch.setattr(error_table, "VALUES", small)
    monkeypatch.setattr(error_table, "GRADIENTS", small)
    found = {"exact": error_table.double, "rlkern": error_table.ours, "wide": error_table.wide}
    found["no entropy"] = lambda *args: (error_table.double(*args)[0], None)
    half = {"rounded": lambda h, w, t: error_table.wide(h.bfloat16(), w.bfloat16(), t)}
    monkeypatch.setattr(error_table, "implementations", lambda dtype: found | half)
    values = error_table.value_errors("typical", dtype)
    assert values["exact"] == dict.fromkeys(values["exact"], 0.0)
    assert values["no entropy"]["entropy_mean"] is None
    assert 0 < values["rlkern"]["logprob_mean"] < values["rlkern"]["logprob_max"] < 1e-5
    gradients = error_table.gradient_errors("typical", dtype)
    assert "no entropy" not in gradients
    eps = torch.finfo(dtype).eps
    for name in ("rlkern", "wide", "exact"):
        assert all(error < 2 * eps + 1e-6 for error in gradients[name].values()), gradients
    if dtype != torch.bfloat16:
        assert values["rounded"]["logprob_mean"] > 100 * values["rlkern"]["logprob_mean"]
        assert all(error > 1e-3 for error in gradients["rounded"].values()), gradients


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


def test_a_table_of_cuda_kernels(rendered):
    row = {"kernel": "fold_kernel", "dtype": "bfloat16", "specialisations": 6, "local_bytes": 0}
    row |= {"shared_bytes": 1056}
    rows = [
        row | {"arch": "100a", "registers": 32, "conversions": ["E2M1"]},
        row | {"arch": "90a", "registers": 40, "conversions": []},
    ]
    result = {"kind": "cuda_resources", "versions": {"nvcc": "13.0"}, "command": "this"}
    text = rendered(result | {"rows": rows})
    assert "| kernel | dtype | compiled | sm_90a | sm_100a | spilled |" in text
    assert "| fold | bfloat16 | 6 | 40, 1,056 B | 32, 1,056 B, cvt E2M1 | 0 B |" in text


def test_a_table_of_precision_modes_over_seeds(rendered):
    run = {"mode": "fp8", "reward_first_5": 0.01, "largest_gap": 0, "mean_kl": 0}
    runs = [
        run | {"reward_last_5": 0.8, "greedy_every_10_steps": [0.0, 0.5]},
        run | {"reward_last_5": 0.9, "greedy_every_10_steps": [0.0, 1.0], "largest_gap": 0.5},
    ]
    info = saved()["machine_info"] | {"load_at_end": [1, 1, 2.5]}
    result = {"kind": "precision", "machine_info": info, "seeds": [0, 1], "command": "this"}
    text = rendered(result | {"runs": runs})
    assert (
        "| fp8 | 0.010 | 0.850 (0.800–0.900) | 0.0%, 75.0% (50.0%–100.0%) | "
        "2.5e-01 (0–5.0e-01) | 0 |"
    ) in text
    assert "Seeds 0, 1: the mean and, in brackets, the smallest and the largest." in text


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
    command += [
        "--bench-green=another",
        "-k",
        "rlkern or limit or blocks",
        "-p",
        "no:cacheprovider",
    ]
    # pytest-benchmark times nothing in a worker of pytest-xdist
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
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
    # the command is there to the last option, but for where files of this machine lie
    results = ["--bench-results", tmp_path.name, "--bench-machine", "here", "--bench-green=another"]
    assert shlex.split(result["command"]) == [
        *("python", "-m", "pytest", "bench/ops/bench_group_advantage.py", "--benchmark-enable"),
        *("--bench-shapes", "smoke", "--bench-seconds", "0.1", "--bench-unchecked", *results),
        *("-k", "rlkern or limit or blocks", "-p", "no:cacheprovider"),
    ]


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
