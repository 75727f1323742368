"""Two processes of torchrun, FSDP2 over gloo: the run of one process, to rounding."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import arguments, cut, metrics, read
from safetensors.torch import load_file

from rlkern import _ranks
from rlkern.rollout import Rollouts
from rlkern.train import TrainError, cli
from rlkern.train.config import build_config

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
}
# what two processes add up in another order, or over other tokens
LOOSE = {"policy/rollout_is_eff_sample_size"}
# everything that divides a step's work otherwise
PACKED = {
    "optim__micro_tokens": 40,
    "optim__share_prefix": "true",
    "model__gradient_checkpointing": "true",
    "algorithm__options__kl_coef": 0.1,
    "rollout__max_staleness": 1,
    "run__steps": 4,
}
LORA = {"lora__rank": 4, "warmup__steps": 0, "algorithm__options__kl_coef": 0.1, "run__steps": 4}


def torchrun(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *map(str, words)],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_close_runs(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Same answers and rewards; losses, log-probs and weights to `tolerance`."""
    assert read(one / "samples.jsonl") == read(other / "samples.jsonl")
    records = metrics(one), metrics(other)
    assert len(records[0]) == len(records[1]) > 4
    for first, second in zip(*records):
        assert first.keys() == second.keys()
        assert first["phase"] == second["phase"]
        for name in first.keys() - LOOSE - {"phase"}:
            assert second[name] == pytest.approx(first[name], rel=tolerance, abs=tolerance), name
    step = f"step_{records[0][-1]['step']:06d}"
    folders = [folder / "checkpoints" / step for folder in (one, other)]
    for name in ("model/model.safetensors", "trainer.safetensors"):
        first, second = (load_file(folder / name) for folder in folders)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            if not key.startswith("rng/"):
                torch.testing.assert_close(second[key], tensor, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A folder of runs of two processes."""
    folder = tmp_path_factory.mktemp("runs")
    cut(tiny, folder / "of_one", 6)
    commands = [
        arguments(folder / "two"),
        ["cut", str(folder / "two"), str(folder / "again"), "6"],
        ["--resume", str(folder / "again")],
        ["--resume", str(folder / "of_one")],
        arguments(folder / "packed", **PACKED),
    ]
    if find_spec("peft"):
        commands.append(arguments(folder / "lora", **LORA))
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    done = torchrun(HERE / "in_processes.py", path)
    assert done.returncode == 0, done.stderr
    (folder / "output").write_text(done.stdout)
    return folder


def test_two_processes_run_what_one_runs(tiny, runs):
    assert_close_runs(tiny, runs / "two")
    # the log and the files are the first process's
    text = (runs / "output").read_text()
    assert text.count(f"run: {runs / 'two'}\n") == 1
    assert text.count(f"report: {runs / 'two' / 'report.html'}\n") == 1
    # the same format: every tensor whole, no pickle
    for name in ("model/model.safetensors", "trainer.safetensors"):
        one, two = (load_file(f / "checkpoints/step_000010" / name) for f in (tiny, runs / "two"))
        assert {k: (t.shape, t.dtype) for k, t in one.items()} == {
            k: (t.shape, t.dtype) for k, t in two.items()
        }


def test_two_processes_resume_bit_for_bit(runs):
    assert metrics(runs / "two") == metrics(runs / "again")
    name = "checkpoints/step_000010/model/model.safetensors"
    one, two = (load_file(runs / folder / name) for folder in ("two", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_checkpoints_fit_any_number_of_processes(tiny, runs, tmp_path):
    assert_close_runs(tiny, runs / "of_one")  # of one process, gone on with by two
    folder = cut(runs / "two", tmp_path / "of_two", 6)
    assert cli.main(["--resume", str(folder)]) == 0
    assert_close_runs(tiny, folder)


def test_packed_by_tokens_with_a_reference_and_rollouts_ahead(runs, tmp_path):
    assert cli.main(arguments(tmp_path / "one", **PACKED)) == 0
    assert_close_runs(tmp_path / "one", runs / "packed")


def test_adapters_in_two_processes(runs, tmp_path):
    pytest.importorskip("peft")
    assert cli.main(arguments(tmp_path / "one", **LORA)) == 0
    # AdamW's first steps are lr whatever the gradient, and those of B = 0 are rounding in part
    assert_close_runs(tmp_path / "one", runs / "lora", 2e-4)
    one, two = (
        load_file(folder / "checkpoints/step_000004/adapter/adapter_model.safetensors")
        for folder in (tmp_path / "one", runs / "lora")
    )
    assert len(one) == 14
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-4, atol=2e-4)


def test_an_error_in_one_process_ends_both_and_is_told_once(tmp_path):
    words = arguments(tmp_path / "run", reward="sample_rewards:fails_in_the_second_process")
    done = torchrun("-m", "rlkern.train", *words)
    assert done.returncode != 0
    assert done.stderr.count("error: the reward function raised KeyError: 'no such unit'") == 1
    assert "[rank0]: Traceback" not in done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(tmp_path, runs):
    """SIGKILL of one process: all begin again at the last checkpoint; the bits are the same."""
    folder = tmp_path / "run"
    folder.mkdir()
    words = arguments(folder, reward="sample_rewards:kills_the_second_process")
    done = torchrun(
        "--max-restarts=1", "-m", "rlkern.train", *words, "--resume",
        RLKERN_TEST_MARK=str(tmp_path / "mark"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists()
    assert "resumed at step" in done.stdout
    assert metrics(folder) == metrics(runs / "two")


def test_what_several_processes_cannot_do_is_refused():
    values = {"data": {"task": "sort"}}
    for changes, told in (
        ({"precision": "fp8-unified"}, "fp8-unified does not go with 2 processes: its layers"),
        ({"rollout.engine": "vllm"}, "vllm does not go with 2 processes"),
        ({"rollout.strategy": "april", "rollout.strategy_options": "{num_groups = 2}"}, "april"),
        ({"rollout.prompts": "1", "optim.updates": "1"}, "for each of 2 processes, got 1"),
    ):
        cfg = build_config(json.loads(json.dumps(values)), changes, "test")
        cfg.check_processes(1, 20)
        with pytest.raises(TrainError, match=told):
            cfg.check_processes(2, 20)
    with pytest.raises(TrainError, match=r"optim\.micro_tokens and optim\.micro_batch"):
        build_config(values, {"optim.micro_tokens": "64", "optim.micro_batch": "2"}, "test")


def test_parts_cover_everything_once(monkeypatch):
    for size in (1, 2, 3, 5):
        monkeypatch.setattr(_ranks, "size", lambda size=size: size)
        parts = []
        for rank in range(size):
            monkeypatch.setattr(_ranks, "rank", lambda rank=rank: rank)
            parts.append(list(range(11))[_ranks.part(11)])
        assert list(chain(*parts)) == list(range(11))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def rollouts_of(prompt_lengths: list[int], lengths: list[int], groups: list[int]) -> Rollouts:
    def offsets(counts):
        return torch.tensor([0, *counts]).cumsum(0)

    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    return Rollouts(
        prompt_tokens=torch.zeros(sum(prompt_lengths), dtype=torch.int64),
        prompt_cu_seqlens=offsets(prompt_lengths),
        tokens=tokens,
        cu_seqlens=offsets(lengths),
        logprob=tokens.float(),
        group_ids=torch.tensor(groups),
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
    )


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_token_batches_are_even_and_within_the_budget(seed, parts):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (40,), generator=random).tolist()
    groups = [i // 8 for i in range(40)]
    rollouts = rollouts_of([5, 3, 9, 1, 4], lengths, groups)
    prompts = [5, 3, 9, 1, 4]
    rows = torch.randperm(40, generator=random)[:31].tolist()
    batches = rollouts.token_batches(rows, 60, parts)
    sums = [sum(lengths[i] + prompts[groups[i]] for i in batch) for batch in batches]
    assert sorted(chain(*batches)) == sorted(rows)
    assert len(batches) % parts == 0
    assert max(sums) <= 60
    assert len(batches) < sum(sums) / 60 + parts + 2  # few of them
    if parts > 1:
        assert max(sums) - min(sums) <= 39  # the longest sequence

    # a sequence that is longer than the budget is alone; batches may be empty
    assert sorted(rollouts.token_batches([0, 1], 1, 3)) == [[], [0], [1]]

    # with whole groups a prompt counts once, and is cut by the budget alone
    whole = rollouts.token_batches(list(range(40)), 10**6, 1, whole_groups=True)
    assert [sorted(batch) for batch in whole] == [list(range(40))]
    few = rollouts.token_batches(list(range(40)), 200, parts, whole_groups=True)
    for batch in few:
        assert (
            sum(lengths[i] for i in batch) + sum(prompts[g] for g in {i // 8 for i in batch}) <= 200
        )
        for group in {i // 8 for i in batch}:
            if sum(lengths[8 * group : 8 * group + 8]) + prompts[group] <= 200:
                assert {8 * group + i for i in range(8)} <= set(batch)
