"""Runs that are killed, starved or misled: what is left is whole, and the user is told."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import arguments, metrics, read
from test_run import ENVIRONMENT, assert_same_run, cut

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.survival import outcomes
from rlkern.rollout import NativeEngine, Rollouts
from rlkern.train import checkpoint as ckpt
from rlkern.train import cli, diagnose, log, loop

KILLS = int(os.environ.get("RLKERN_KILLS", "3"))


def rl(folder: Path) -> list[dict]:
    return [r for r in metrics(folder) if r["phase"] == "rl"]


# ---- kill -9 ----


def test_killed_at_random_moments(tmp_path):
    """bench/survival.py has the settings, and leaves the outcomes of 20 kills."""
    found = list(outcomes(tmp_path, KILLS))
    assert [outcome["different"] for outcome in found] == [[]] * KILLS
    assert sum(len(outcome["kills"]) for outcome in found) >= KILLS


def test_killed_before_the_first_checkpoint(tiny, tmp_path):
    """What the beginning logged, the evaluation before step 1 too, is not there twice."""
    changes = {"warmup__steps": 0, "run__steps": 2, "checkpoint__every": 0}
    folder = tmp_path / "run"
    assert cli.main(arguments(folder, **changes)) == 0
    whole = metrics(folder)
    shutil.rmtree(folder / "checkpoints")
    assert cli.main(["--resume", str(folder)]) == 0
    assert metrics(folder) == whole


def test_killed_before_old_checkpoints_were_dropped(tiny, tmp_path):
    folder = cut(tiny, tmp_path / "run", 10)
    assert cli.main(["--resume", str(folder), "--checkpoint.keep", "2"]) == 0
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step_000008", "step_000010"]


def test_logs_and_settings_are_replaced_whole(tiny, tmp_path, monkeypatch):
    """A kill while --resume cuts the logs back must not cost their records."""
    folder = cut(tiny, tmp_path / "run", 6)
    before = metrics(folder)

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    assert cli.main(["--resume", str(folder)]) == 130
    assert metrics(folder) == before
    with pytest.raises(KeyboardInterrupt):
        log.write_whole(folder / "config.json", "half of it")
    monkeypatch.undo()
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(tiny, folder)


# ---- checkpoints ----


def test_any_flipped_bit_of_a_manifest_is_seen(tiny, tmp_path):
    """The files that it lists have checksums; it has none of its own."""
    path = tmp_path / "checkpoint"
    shutil.copytree(tiny / "checkpoints" / "step_000006", path)
    ckpt.check_checkpoint(path)
    text = (path / "manifest.json").read_bytes()
    for at in range(len(text)):
        changed = bytearray(text)
        changed[at] ^= 2
        if changed[at : at + 1].isspace() and text[at : at + 1].isspace():
            continue
        (path / "manifest.json").write_bytes(changed)
        with pytest.raises(loop.TrainError, match="is unreadable"):
            ckpt.check_checkpoint(path)


def test_checkpoints_hold_no_pickle(tiny, tmp_path, monkeypatch):
    folder = cut(tiny, tmp_path / "run", 8)
    files = [p for p in (folder / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}

    def refuse(*arguments, **options):
        raise AssertionError("a checkpoint was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(tiny, folder)


def test_resume_takes_the_settings_of_the_optimiser_from_the_config(tiny, tmp_path):
    folder = cut(tiny, tmp_path / "run", 8)
    assert cli.main(["--resume", str(folder), "--optim.beta1", "0.5"]) == 0
    at = "checkpoints/step_000010/trainer.safetensors"
    assert (folder / at).read_bytes() != (tiny / at).read_bytes()


def test_a_full_disk_under_the_logs(tiny, tmp_path, capsys, monkeypatch):
    real = log.RunLog._append

    def full(self, name, record):
        if record["step"] == 7:
            self.files[name].write('{"step": 7, "ph')
            self.files[name].flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        real(self, name, record)

    monkeypatch.setattr(log.RunLog, "_append", full)
    assert cli.main(arguments(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert "Free some space, then use --resume" in err
    monkeypatch.undo()
    assert cli.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tiny, tmp_path / "run")


# ---- rewards ----

LATE = "TimeoutError: no answer within reward_timeout = 0.3 s"
RAISED = "the reward function raised KeyError: 'no such unit'"


@pytest.mark.parametrize("kind", ["sleeps", "sometimes_raises", "nan"])
def test_a_reward_that_fails_stops_the_run_and_names_the_sample(tmp_path, capsys, kind):
    words = {"sleeps": LATE, "sometimes_raises": RAISED, "nan": "returned nan, not a number"}[kind]
    changes = {"reward": f"sample_rewards:{kind}", "reward_timeout": 0.3 * (kind == "sleeps")}
    assert cli.main(arguments(tmp_path / "run", **changes)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "\n  on prompt '" in err
    assert "completion '" in err


@pytest.mark.parametrize("kind", ["sleeps", "sometimes_raises"])
@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_a_reward_that_fails_counts_as_zero_or_not_at_all(tmp_path, capsys, policy, kind):
    changes = {"reward": f"sample_rewards:{kind}", "reward_policy": policy, "run__steps": 1}
    changes |= {"reward_timeout": 0.3 * (kind == "sleeps"), "data__heldout_size": 2}
    changes |= {"eval__samples": 1, "eval__k": "[]", "rollout__prompts": 2, "warmup__steps": 1}
    folder = tmp_path / "run"
    assert cli.main(arguments(folder, **changes)) == 0
    out = capsys.readouterr().out
    assert f"completions got no reward: reward_policy = {policy}. the reward function raised" in out
    assert (LATE if kind == "sleeps" else "no such unit") in out
    rollouts, extra = Rollouts.load(folder / "rollouts" / "step_000002.safetensors")
    rewards = extra["rewards"]
    assert len(rewards) == len(rollouts.group_ids)
    if policy == "zero":
        assert len(rewards) == 8
        assert (rewards == 0).any()
    else:
        assert 0 < len(rewards) < 8
        assert (rewards > 0).all()
    assert rl(folder)[0]["reward/mean"] == pytest.approx(rewards.mean().item())


def test_a_reward_whose_process_dies(tmp_path, capsys):
    changes = {"reward": "sample_rewards:dies", "reward_timeout": 60}
    assert cli.main(arguments(tmp_path / "run", **changes)) == 2
    assert "the reward function raised EOFError" in capsys.readouterr().err


def test_the_process_of_a_reward_changes_no_bit(tiny, tmp_path):
    assert cli.main(arguments(tmp_path / "run", reward_timeout=60)) == 0
    assert_same_run(tiny, tmp_path / "run")


def test_when_no_completion_gets_a_reward(tmp_path, capsys):
    changes = {"reward": "sample_rewards:nan", "reward_policy": "skip"}
    assert cli.main(arguments(tmp_path / "run", **changes)) == 2
    assert "step 5: not one completion got a reward" in capsys.readouterr().err


# ---- guards ----


@pytest.mark.parametrize(
    ("guard", "limit", "metric"),
    [
        ("grad_norm", 1e-3, "grad_norm"),
        ("ratio", 1.0001, "policy/ratio_max"),
        ("kl", 1e-9, "policy/ppo_kl"),
        ("mismatch", 1e-30, "logprob_gap/kl"),
        ("max_entropy", 0.1, "entropy"),
        ("min_entropy", 100, "entropy"),
    ],
)
def test_a_guard_stops_the_run_and_leaves_its_state(tiny, tmp_path, capsys, guard, limit, metric):
    folder = cut(tiny, tmp_path / "run", 6)
    assert cli.main(["--resume", str(folder), f"--guard.{guard}", str(limit)]) == 2
    err = capsys.readouterr().err
    assert f"error: step 7: {metric} = " in err
    assert f"is beyond guard.{guard} = {limit:g}. " in err
    assert f"--resume goes on from: {folder / 'checkpoints' / 'step_000006'}" in err
    left = folder / "diverged"
    ckpt.check_checkpoint(left / "step_000007")
    _, extra = Rollouts.load(left / "rollouts.safetensors")
    assert extra["rewards"].mean().item() == pytest.approx(rl(tiny)[2]["reward/mean"])
    # a limit is no part of the numbers
    assert cli.main(["--resume", str(folder), f"--guard.{guard}", "nothing"]) == 2
    assert f"guard.{guard}: Input should be a valid number" in capsys.readouterr().err


def test_nan_is_beyond_every_guard():
    cfg = cli.load_config(cli.find_recipe("demo"), {"guard.min_entropy": "1", "guard.kl": "1"})
    nan = float("nan")
    assert "guard.min_entropy" in diagnose.diverged({"entropy": nan}, cfg)
    assert "guard.kl" in diagnose.diverged({"policy/ppo_kl": nan}, cfg)
    assert diagnose.diverged({"policy/ppo_kl": -0.5, "entropy": 1.0}, cfg) == ""
    assert "guard.kl" in diagnose.diverged({"policy/ppo_kl": -1.5}, cfg)


# ---- memory ----


def huge(*arguments, **options):
    return torch.empty(1 << 50, dtype=torch.uint8)


def test_out_of_memory_says_what_to_lower(tmp_path, capsys, monkeypatch):
    real, calls = loop.response_logprobs, []

    def sometimes(*arguments, **options):
        calls.append(1)
        return huge() if len(calls) == 6 else real(*arguments, **options)

    monkeypatch.setattr(loop, "response_logprobs", sometimes)
    assert cli.main(arguments(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert (
        "step 5: out of memory in the update: set optim.micro_batch to 4 (now 8 sequences)" in err
    )
    assert "model.gradient_checkpointing = true, optim.share_prefix = true" in err
    assert "1125899906842624 bytes were wanted beside the " in err
    monkeypatch.setattr(loop, "response_logprobs", huge)
    assert cli.main(arguments(tmp_path / "warm")) == 2
    assert (
        "out of memory in the warm-up: lower warmup.batch_size (now 16)" in capsys.readouterr().err
    )
    monkeypatch.setattr(loop, "response_logprobs", real)
    monkeypatch.setattr(NativeEngine, "forward", huge)
    changes = {"warmup__steps": 0}
    assert cli.main(arguments(tmp_path / "rollout", **changes)) == 2
    assert "the rollout: lower rollout.max_sequences (now 1024)" in capsys.readouterr().err


def test_words_of_cuda_about_memory():
    cfg = cli.load_config(cli.find_recipe("demo"), {})
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    assert "20.00 GiB were wanted" in diagnose.out_of_memory(error, cfg)
    assert diagnose.out_of_memory(RuntimeError("shape mismatch"), cfg) == ""


# ---- the engine ----


def break_engine(monkeypatch, at_calls: set[int]) -> None:
    """In the middle of a decode, with a cache that is half filled."""
    real, calls = NativeEngine.forward, []

    def broken(self, *arguments, **options):
        calls.append(1)
        if len(calls) in at_calls:
            raise RuntimeError("an illegal memory access")
        return real(self, *arguments, **options)

    monkeypatch.setattr(NativeEngine, "forward", broken)


def test_a_crashed_engine_is_built_again_and_the_step_repeated(tiny, tmp_path, capsys, monkeypatch):
    # steps of a token each: 8 in the two evaluations after the warm-up, then step 5
    break_engine(monkeypatch, {10})
    assert cli.main(arguments(tmp_path / "run")) == 0
    words = "NOTE step 5: the engine failed with RuntimeError: an illegal memory access. It begins"
    assert words in capsys.readouterr().out
    assert_same_run(tiny, tmp_path / "run")


def test_an_engine_that_crashes_twice_stops_the_run(tmp_path, capsys, monkeypatch):
    break_engine(monkeypatch, {10, 12})
    assert cli.main(arguments(tmp_path / "run")) == 2
    assert "and again after a restart: an illegal memory access" in capsys.readouterr().err


HANGING = """
import os, sys, time
from rlkern.rollout import NativeEngine
from rlkern.train import cli

real, calls = NativeEngine.generate, []

def hanging(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 4:  # after two evaluations: the second step of RL
        time.sleep(10000)
    return real(self, *arguments, **options)

NativeEngine.generate = hanging
sys.exit(cli.main(sys.argv[1:]))
"""


def hang(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", HANGING, *arguments(folder, rollout__timeout=20)]
    environment = ENVIRONMENT | environment
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


def test_a_hung_engine_starts_the_process_again(tiny, tmp_path):
    folder = tmp_path / "run"
    done = hang(folder)
    assert done.returncode == 0, done.stderr
    assert "NOTE step 6: no rollouts within rollout.timeout = 20 s: starting again" in done.stdout
    assert f"run: {folder}, resumed at step 4" in done.stdout
    assert_same_run(tiny, folder)


def test_an_engine_that_hangs_in_one_step_twice_stops_the_run(tmp_path):
    done = hang(tmp_path / "run", RLKERN_HUNG_AT="6")
    assert done.returncode == 2, done.stdout
    assert "error: step 6: no rollouts within" in done.stderr
    assert "for the second time" in done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rollout"]["timeout"] == 20
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 6
