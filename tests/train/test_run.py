"""Whole runs: the same bits again, killed, interrupted or replayed; and every failure."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments, cut, metrics, read
from safetensors.torch import load_file

import rlkern
from rlkern.train import checkpoint as ckpt
from rlkern.train import cli, loop

COMMAND = [sys.executable, "-m", "rlkern.train"]
# Rewards of the tests are imported from here; waiting threads give way to others.
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(Path(__file__).parent)}


def weights(folder: Path, step: int = 10) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "model" / "model.safetensors")


def assert_same_run(one: Path, other: Path, step: int = 10) -> None:
    assert metrics(one) == metrics(other)
    assert read(one / "samples.jsonl") == read(other / "samples.jsonl")
    first, second = weights(one, step), weights(other, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_metrics_of_a_run(tiny):
    records = read(tiny / "metrics.jsonl")
    phases = [(r["phase"], r["step"]) for r in records]
    assert phases == [
        *(("warmup", step) for step in (1, 2, 3, 4)),
        ("eval", 4),
        *(("rl", step) for step in (5, 6, 7)),
        ("eval", 7),
        *(("rl", step) for step in (8, 9, 10)),
        ("eval", 10),
    ]
    for record in records:
        if record["phase"] == "rl":
            assert record["signal/groups"] > 0
            assert record["grad_norm"] > 0
            assert record["logprob_gap/max"] < 1e-4
            assert 0 < record["entropy"] < 3
            assert record["time/tokens_per_second"] > 0
            assert 1 <= record["completion/length"] <= 4
    assert records[0]["loss_floor"] == pytest.approx(1.791759 / 4)  # log(3!) over 4 tokens
    assert {"eval/greedy", "eval/pass@1", "eval/pass@4"} < records[4].keys()
    moved, before = weights(tiny), weights(tiny, 8)
    assert any(not torch.equal(moved[name], before[name]) for name in moved)


def test_tensorboard_holds_the_curves(tiny):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tiny / "tensorboard")).Reload()
    rewards = {event.step: event.value for event in board.Scalars("reward/mean")}
    logged = {r["step"]: r["reward/mean"] for r in metrics(tiny) if r["phase"] == "rl"}
    assert rewards == pytest.approx(logged)


def test_report_is_one_file_that_loads_nothing(tiny):
    text = (tiny / "report.html").read_text()
    assert text.count("<svg") == 2  # curves, gradients
    for loading in ("src=", "<link", "<script", "@import", "url(http", "<image"):
        assert loading not in text, loading
    assert "optim.grad_clip" in text
    sample = read(tiny / "samples.jsonl")[-1]["best"][0]
    assert sample["prompt"] in text
    assert "greedy_after" in text
    summary = json.loads((tiny / "summary.json").read_text())
    assert summary["passed"] is True
    assert summary["training_seconds"] > 0


def test_runs_are_compared_in_one_page(tiny, tmp_path, capsys):
    for name, step in (("one", 10), ("two", 6)):
        cut(tiny, tmp_path / "runs" / name, step)
    log = tmp_path / "runs" / "two" / "metrics.jsonl"  # it is not done
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:7]) + '{"step": 7, "pha')
    path = tmp_path / "runs" / "two" / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.003', '"lr": 0.25'))
    assert cli.main(["report", *(str(tmp_path / "runs" / name) for name in ("one", "two"))]) == 0
    page = tmp_path / "runs" / "compare.html"
    assert capsys.readouterr().out == f"report: {page}\n"
    text = page.read_text()
    assert text.count("<svg") == 1
    for name in ("one", "two"):
        assert text.count(f"<!-- {name}: sampled reward -->") == 1  # of the legend
    row = "".join(f"<td><code>{cell}</code></td>" for cell in ("optim.lr", 0.003, 0.25))
    assert f"<tr>{row}</tr>" in text
    assert "run.dir" not in text
    rewards = [r["reward/mean"] for r in metrics(tiny) if r["phase"] == "rl"]
    assert f"<td><code>{sum(rewards[-5:]) / 5:.3f}</code></td>" in text
    assert f"<td><code>{sum(rewards[:2]) / 2:.3f}</code></td>" in text
    # of one run alone, also of one that goes on
    (tmp_path / "runs" / "two" / "summary.json").unlink()
    assert cli.main(["report", str(tmp_path / "runs" / "two")]) == 0
    assert "optim.grad_clip" in (tmp_path / "runs" / "two" / "report.html").read_text()
    assert cli.main(["report"]) == 2
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "config.json: cannot be read" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny, tmp_path):
    assert cli.main(arguments(tmp_path / "again")) == 0
    assert_same_run(tiny, tmp_path / "again")
    assert cli.main(arguments(tmp_path / "other", run__seed=1)) == 0
    assert metrics(tmp_path / "other")[0] != metrics(tiny)[0]


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_resume_continues_bit_for_bit(tiny, tmp_path, step):
    folder = cut(tiny, tmp_path / "run", step)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "pha')  # a line that the kill cut short
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(tiny, folder)


def test_resume_from_a_named_checkpoint_drops_the_later_ones(tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny, folder)
    older = folder / "checkpoints" / "step_000004"
    assert cli.main(["--resume", str(older), "--run.steps", "1"]) == 0
    assert [p.name for p in ckpt.list_checkpoints(folder / "checkpoints")] == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]
    assert metrics(folder)[-1]["step"] == 5


def test_resume_with_other_settings_says_so(tiny, tmp_path, capsys):
    folder = cut(tiny, tmp_path / "run", 8)
    assert cli.main(["--resume", str(folder), "--optim.lr", "1e-4"]) == 0
    assert "NOTE resumed with other settings in: optim\n" in capsys.readouterr().out
    assert metrics(folder)[-2]["lr"] == pytest.approx(1e-4 / 4)


def test_resume_with_a_reference_model(tmp_path):
    changes = {"algorithm__options__kl_coef": 0.1}
    assert cli.main(arguments(tmp_path / "whole", **changes)) == 0
    kl = [r["policy/kl"] for r in metrics(tmp_path / "whole") if r["phase"] == "rl"]
    assert kl[0] < kl[-1]
    folder = cut(tmp_path / "whole", tmp_path / "cut", 6)
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(tmp_path / "whole", folder)


def start(folder: Path, **changes: object) -> subprocess.Popen:
    words = COMMAND + arguments(folder, checkpoint__every=3, **changes)
    return subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_lines(folder: Path, number: int) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, "the run wrote no metrics"
        time.sleep(0.01)


def test_killed_and_resumed(tmp_path):
    """SIGKILL at any moment: the run that goes on is the run that was never killed."""
    process = start(tmp_path / "killed", run__steps=30)
    wait_for_lines(tmp_path / "killed", 14)
    process.kill()
    process.wait()
    assert len(metrics(tmp_path / "killed")) < 40
    assert cli.main(["--resume", str(tmp_path / "killed")]) == 0
    assert cli.main(arguments(tmp_path / "whole", run__steps=30)) == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_exits(tmp_path, signum):
    folder = tmp_path / "run"
    process = start(folder, run__steps=30)
    wait_for_lines(folder, 7)
    process.send_signal(signum)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, out
    step = metrics(folder)[-1]["step"]
    assert ckpt.latest_checkpoint(folder / "checkpoints").name == f"step_{step:06d}"
    assert f"saved at step {step}; go on: python -m rlkern.train --resume {folder}" in out
    assert "Traceback" not in out
    assert step < 34


def test_replayed_rollouts_give_the_same_updates(tiny, tmp_path):
    changes = {"rollout__replay": tiny / "rollouts", "rollout__save": "false"}
    # No reward is called and no token is drawn for training: other seeds would not matter.
    assert cli.main(arguments(tmp_path / "run", **changes)) == 0
    replayed, sampled = metrics(tmp_path / "run"), metrics(tiny)
    for record in sampled:  # what sampling took
        for name in [name for name in record if name.startswith("rollout/")]:
            del record[name]
    assert replayed == sampled
    first, second = weights(tiny), weights(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_replay_of_what_is_not_there(tiny, tmp_path, capsys):
    assert cli.main(arguments(tmp_path / "run", rollout__replay=tmp_path)) == 2
    assert "rollout.replay, step 5: Rollouts.load:" in capsys.readouterr().err
    changes = {"rollout__replay": tiny / "rollouts", "rollout__prompts": 5}
    assert cli.main(arguments(tmp_path / "run2", **changes)) == 2
    error = capsys.readouterr().err
    assert "rollout.replay, step 5: step_000005.safetensors holds 4 prompts where rollout." in error


def test_micro_batches_add_up_to_the_minibatch(tmp_path):
    for mode in ("grpo", "dapo"):
        for size in (0, 3):
            changes = {"optim__micro_batch": size, "algorithm__objective": mode}
            changes |= {"run__steps": 1, "checkpoint__every": 0}
            assert cli.main(arguments(tmp_path / f"{mode}{size}", **changes)) == 0
        whole, parts = (metrics(tmp_path / f"{mode}{size}")[-2] for size in (0, 3))
        assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-4)
        assert whole["loss"] == pytest.approx(parts["loss"], abs=1e-6)


def test_leaving_out_zero_advantages_changes_no_gradient(tmp_path):
    """An entropy bonus of 1e-30 switches the short cut off and adds nothing."""
    found = []
    for coefficient in (0.0, 1e-30):
        folder = tmp_path / str(coefficient)
        changes = {"algorithm__options__entropy_coef": coefficient}
        # Some groups agree on this reward and some do not.
        changes |= {"reward": "sample_rewards:coarse", "rollout__prompts": 16, "run__steps": 1}
        assert cli.main(arguments(folder, **changes)) == 0
        found.append(next(r for r in metrics(folder) if r["phase"] == "rl"))
    assert 0 < found[0]["signal/groups"] < 1
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)


def test_likelihood_of_correct_answers(tmp_path, monkeypatch):
    """nll_weight marks the answers of at least algorithm.nll_reward, and moves the update."""
    calls = []
    policy_loss = rlkern.policy_loss

    def spy(*args, **options):
        calls.append((args[2], options["nll_weight"]))
        return policy_loss(*args, **options)

    monkeypatch.setattr(rlkern, "policy_loss", spy)
    losses = []
    for coefficient in (0.0, 0.5):
        folder = tmp_path / str(coefficient)
        changes = {"algorithm__options__nll_coef": coefficient, "algorithm__nll_reward": 0.9}
        changes |= {"reward": "sample_rewards:distinct", "run__steps": 1, "optim__updates": 1}
        assert cli.main(arguments(folder, **changes)) == 0
        losses.append(next(r for r in metrics(folder) if r["phase"] == "rl"))
    for advantages, correct in calls:
        assert correct.dtype == torch.bool
        assert 0 < correct.sum() < len(correct)
        # within a group the better answers have the larger advantage
        assert advantages[correct].mean() > advantages[~correct].mean()
    plain, with_nll = losses
    assert with_nll["loss"] > plain["loss"] + 0.01
    assert with_nll["grad_norm"] != plain["grad_norm"]


def test_an_objective_of_likelihood_trains(tmp_path):
    changes = {"algorithm__objective": "aepo", "run__steps": 2}
    assert cli.main(arguments(tmp_path / "run", **changes)) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run") if record["phase"] == "rl"]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


# ---- failures ----


def test_a_bad_reward_stops_the_run(tmp_path, capsys):
    assert cli.main(arguments(tmp_path / "run", reward="sample_rewards:nan")) == 2
    err = capsys.readouterr().err
    assert "the reward function returned nan, not a number\n  on prompt '" in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": "sample_rewards:zero"}, "got reward 0, so no answer is better than another"),
        ({"reward": "sample_rewards:one"}, "got reward 1: nothing is left to learn"),
        ({"rollout__max_new_tokens": 1}, "cut off at rollout.max_new_tokens = 1"),
        ({"data__size": 4}, "raise warmup.steps (now 4)"),
    ],
)
def test_words_when_nothing_can_be_learnt(tmp_path, capsys, changes, words):
    changes |= {"run__steps": 2, "checkpoint__every": 0}
    assert cli.main(arguments(tmp_path / "run", **changes)) == 0
    out = capsys.readouterr().out
    assert words in out
    assert out.count(words) == 1  # said once while it lasts


def test_zero_gradient_is_told(tmp_path, capsys, monkeypatch):
    real = rlkern.policy_loss

    def silent(logprob, *rest, **options):
        return real(logprob * 0 + logprob.detach(), *rest, **options)

    monkeypatch.setattr(rlkern, "policy_loss", silent)
    assert cli.main(arguments(tmp_path / "run", run__steps=1)) == 0
    assert "rewards differ, but the gradient is exactly 0" in capsys.readouterr().out


def test_a_sampler_that_disagrees_is_told(tmp_path, capsys, monkeypatch):
    real = loop.response_logprobs

    def shifted(*arguments, **options):
        out = real(*arguments, **options)
        return out._replace(logprob=out.logprob - 0.5)

    monkeypatch.setattr(loop, "response_logprobs", shifted)
    assert cli.main(arguments(tmp_path / "run", run__steps=1)) == 0
    assert "the trainer and the sampler disagree by 0.5" in capsys.readouterr().out


def poison_loss(monkeypatch, at_call: int, value: float) -> None:
    real, calls = rlkern.policy_loss, []

    def poisoned(*arguments, **options):
        result = real(*arguments, **options)
        calls.append(1)
        return result if len(calls) < at_call else result._replace(loss=result.loss * value)

    monkeypatch.setattr(rlkern, "policy_loss", poisoned)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_a_nonfinite_loss_stops_and_leaves_the_last_checkpoint(
    tiny, tmp_path, capsys, monkeypatch, value, kind
):
    poison_loss(monkeypatch, 7, value)  # two updates a step: RL step 4, which is step 8
    folder = tmp_path / "run"
    assert cli.main(arguments(folder)) == 2
    err = capsys.readouterr().err
    assert f"step 8: the loss holds 1 {kind} among 1 values" in err
    assert "last good checkpoint: " + str(folder / "checkpoints" / "step_000006") in err
    monkeypatch.undo()
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(tiny, folder)


def test_a_nonfinite_gradient_or_weight_is_named(tmp_path, capsys, monkeypatch):
    real = loop.Trainer.optimizer_step

    def broken(self, lr, watched):
        if self.step == 3:
            self.model.model.norm.weight.grad[1] = float("inf")
        return real(self, lr, watched)

    monkeypatch.setattr(loop.Trainer, "optimizer_step", broken)
    assert cli.main(arguments(tmp_path / "run")) == 2
    words = "step 3: the gradient of model.norm.weight holds 1 Inf among 32 values"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: os.truncate(p / "model/model.safetensors", 99),
            "model.safetensors has 99 bytes",
        ),
        (lambda p: flip(p / "trainer.safetensors"), "trainer.safetensors has changed since"),
        (lambda p: (p / "state.json").unlink(), "No such file or directory"),
        (lambda p: (p / "manifest.json").write_text("{"), "is unreadable: "),
        (lambda p: (p / "manifest.json").write_text("[1]"), "is unreadable: "),
        (lambda p: (p / "manifest.json").unlink(), "is unreadable: "),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(
    tiny, tmp_path, capsys, damage, message
):
    folder = cut(tiny, tmp_path / "run", 6)
    checkpoint, before = folder / "checkpoints" / "step_000006", metrics(folder)
    damage(checkpoint)
    # where it was asked for by name, it is an error
    assert cli.main(["--resume", str(checkpoint)]) == 2
    err = capsys.readouterr().err
    if (checkpoint / "manifest.json").exists():  # else this is no checkpoint's name
        assert err.startswith(f"error: checkpoint {checkpoint} is unreadable")
        assert message in err
        assert f"--resume {checkpoint.with_name('step_000004')} may still work" in err
    assert metrics(folder) == before  # nothing was changed
    assert cli.main(["--resume", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"NOTE checkpoint {checkpoint} is unreadable" in out
    assert message in out
    assert f"run: {folder}, resumed at step 4" in out
    assert_same_run(tiny, folder)


def test_when_every_checkpoint_is_damaged_nothing_begins(tiny, tmp_path, capsys):
    folder = cut(tiny, tmp_path / "run", 4)
    before = metrics(folder)
    for path in ckpt.list_checkpoints(folder / "checkpoints"):
        (path / "manifest.json").unlink()
    assert cli.main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("is unreadable") == 2
    assert "no other is left" in err
    assert metrics(folder) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["weights", "optimiser"])
def test_a_full_disk_leaves_the_previous_checkpoint(tiny, tmp_path, capsys, monkeypatch, part):
    """The third checkpoint meets a full disk in the middle of a file."""
    name = {"weights": "model.safetensors", "optimiser": "trainer.safetensors"}[part]
    calls = []

    def half_written(path: Path) -> None:
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if part == "optimiser":
        real = ckpt.save_file
        monkeypatch.setattr(
            ckpt, "save_file", lambda value, path: half_written(path) or real(value, path)
        )
    else:
        from transformers import PreTrainedModel

        save = PreTrainedModel.save_pretrained

        def failing(self, folder, **options):
            folder.mkdir()
            half_written(folder / name)
            return save(self, folder, **options)

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", failing)
    folder = tmp_path / "run"
    assert cli.main(arguments(folder)) == 2
    err = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written" in err
    assert "No space left on device" in err
    assert "last good checkpoint: " + str(folder / "checkpoints" / "step_000004") in err
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000004",
    ]
    monkeypatch.undo()
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(tiny, folder)


def test_a_real_write_error_of_the_system(tmp_path):
    """No patching: the kernel refuses to write beyond 60 kB, in the middle of the weights."""
    words = COMMAND + arguments(tmp_path / "run", rollout__save="false")
    done = subprocess.run(
        words,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "error: the checkpoint of step 2 could not be written" in done.stderr
    assert "last good checkpoint: none" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_only_the_last_checkpoints_are_kept(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / ".part_000001").mkdir(parents=True)  # of a killed run
    assert cli.main(arguments(folder, checkpoint__keep=2)) == 0
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step_000008", "step_000010"]


def test_folders_of_runs(tiny, tmp_path, monkeypatch, capsys):
    assert cli.main(arguments(tiny)) == 2
    assert f"run.dir: {tiny} holds a run: add --resume" in capsys.readouterr().err
    assert cli.main(["--resume", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--resume"]) == 2
    assert "there is no run at runs/demo-seed0" in capsys.readouterr().err
    words = arguments(tmp_path, run__steps=1, warmup__steps=1)
    at = words.index("--run.dir")
    del words[at : at + 2]
    assert cli.main(words) == cli.main(words) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["demo-seed0", "demo-seed0-2"]


def test_a_prompt_too_long_for_the_model(tmp_path, capsys):
    assert cli.main(arguments(tmp_path / "run", rollout__max_new_tokens=61)) == 2
    words = "step 4: NativeEngine.generate: longest prompt + max_new_tokens = 65 tokens, but the"
    assert words in capsys.readouterr().err


def test_low_accuracy_is_exit_code_1(tmp_path, capsys):
    changes = {"eval__min_accuracy": 0.9, "reward": "exact", "run__steps": 1}
    assert cli.main(arguments(tmp_path / "run", **changes)) == 1
    assert "is under eval.min_accuracy = 90.0%" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()


def test_dashboard_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(arguments(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    for shown in ("rl 10/10", "reward", "tokens a second", "GiB", "held-out after step 10: greedy"):
        assert shown in out, shown
    assert "rl          1/6" not in out  # a line a step is for files
