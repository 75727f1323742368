"""What a run shows: the page, the dashboard, boards of others, gradient coefficients."""

import builtins
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import arguments, metrics, read

from rlkern.report import ReportError, report
from rlkern.report.boards import Boards
from rlkern.report.live import ROWS, Dashboard, curve, line
from rlkern.report.page import _spread
from rlkern.rollout import Rollouts
from rlkern.train import cli
from rlkern.train.log import EDGES


def sample(reward, text, **more):
    return {"prompt": "1+1=", "completion": text, "answer": "2", "reward": reward, **more}


def a_run(folder, samples):
    (folder / "config.json").write_text(json.dumps({"run": {"seed": 0}, "reward": "exact"}))
    lines = ({"step": i + 1, **record} for i, record in enumerate(samples))
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return report([folder]).read_text()


def test_samples_show_what_was_not_drawn(tmp_path):
    parts = [["2*<1>=", True], ["2", False], ["!", True]]
    best = sample(1.0, "2*<1>=2!", parts=parts, turns=[-0.5, 0.0])
    text = a_run(tmp_path, [{"best": [best], "worst": [sample(0.0, "<b>")]}])
    assert "<code>2*&lt;1&gt;=<mark>2</mark>!</code>" in text
    assert "1 turns -0.5 0" in text
    assert "<code>&lt;b&gt;</code>" in text
    assert "Marked" in text
    plain = a_run(tmp_path, [{"best": [sample(1.0, "2")], "worst": [sample(0.0, "3")]}])
    assert "<mark>" not in plain


def test_samples_of_a_long_run_are_thinned(tmp_path):
    each = {"best": [sample(1.0, "2")], "worst": [sample(0.0, "3")]}
    text = a_run(tmp_path, [each] * 500)
    assert text.count("<details") == 40
    assert text.count("<details open") == 2
    assert "Step 1:" in text
    assert "Step 500:" in text
    for count in (0, 1, 2, 39, 40, 41, 1000):
        places = _spread(count, 40)
        assert len(places) == min(count, 40) == len(set(places))
        assert places[:1] + places[-1:] == ([0, count - 1] if count else [])


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ReportError, match=r"config\.json: cannot be read"):
        report([tmp_path])


def test_gradient_coefficients_are_advantages_at_the_first_update(tmp_path):
    """One update on policy, mean over tokens: every token's coefficient is its advantage."""
    changes = {"run__steps": 2, "optim__updates": 1, "algorithm__objective": "dapo"}
    changes |= {"algorithm__options": "{}", "optim__micro_batch": 3}
    assert cli.main(arguments(tmp_path, **changes)) == 0
    for record in read(tmp_path / "gradients.jsonl"):
        saved = tmp_path / "rollouts" / f"step_{record['step']:06d}.safetensors"
        rollouts, extra = Rollouts.load(saved)
        rewards = extra["rewards"].view(4, 4)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
        of_tokens = advantages.repeat_interleave(rollouts.lengths)
        moved = of_tokens[of_tokens != 0]
        assert record["zero"] == len(of_tokens) - len(moved)
        # a coefficient on the edge of two bins may be in either
        cumulated = torch.tensor(record["counts"]).cumsum(0)
        for edge, below in zip(record["edges"][1:-1], cumulated.tolist()):
            low, high = ((moved < edge + d).sum().item() for d in (-1e-4, 1e-4))
            assert low <= below <= high
        assert cumulated[-1] == len(moved) > 0
    assert record["edges"] == EDGES
    assert "<h2>Gradient coefficients</h2>" in (tmp_path / "report.html").read_text()


def test_dashboard_shows_every_row(tiny):
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    board = Dashboard("runs/x [y]", total=10, done=0, console=console)
    for record in read(tiny / "metrics.jsonl"):
        board.show(record | {"rollout/turns": 2.0, "rollout/replied": 0.25})
    board.say("NOTE [bold] is no markup")
    board.show({"step": 10, "phase": "rl", "reward/mean": float("nan")})
    board.close()
    out = console.file.getvalue()
    for title in ("rl 10/10", "runs/x [y]", *ROWS):
        assert title in out, title
    assert "NOTE [bold] is no markup" in out
    assert "nan" in out
    assert curve([0.0, 1.0, 0.5]) == "▁█▅"
    assert curve([2.0]) == "▁"


def test_lines_when_the_output_is_no_terminal(tiny, tmp_path, capsys):
    assert cli.main(arguments(tmp_path, log__every=2)) == 0
    out = capsys.readouterr().out.splitlines()
    records = read(tmp_path / "metrics.jsonl")
    for record in records:
        number = record["step"] - 4 * (record["phase"] == "rl")
        shown = any(text.endswith(line(record)) for text in out)
        assert shown == (record["phase"] == "eval" or number in (1, 2, 4, 6)), record
    assert metrics(tmp_path) == metrics(tiny)


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(log=calls.append, finish=lambda: calls.append("done"))
    seen = {}
    module = SimpleNamespace(init=lambda **how: seen.update(how) or fake)
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert cli.main(arguments(tmp_path / "run", run__steps=1, log__wandb="mine")) == 0
    assert (seen["project"], seen["name"], seen["resume"]) == ("mine", "run", "allow")
    assert seen["config"]["optim"]["lr"] == 0.003
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert calls[-1] == "done"
    assert [call["step"] for call in calls[:-1]] == [record["step"] for record in records]
    assert calls[0]["warmup/loss"] == records[0]["loss"]
    assert calls[-2]["eval/greedy"] == records[-1]["eval/greedy"]
    first = seen["id"]
    Boards(tmp_path / "run", False, "mine", {}, 0).close()
    assert seen["id"] == first
    Boards(tmp_path / "other", False, "mine", {}, 0).close()
    assert seen["id"] != first


def test_boards_that_are_not_installed(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith(("wandb", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert cli.main(arguments(tmp_path / "one", log__wandb="mine")) == 2
    assert "log.wandb = 'mine' needs wandb: pip install wandb" in capsys.readouterr().err
    assert cli.main(arguments(tmp_path / "two", log__tensorboard="true")) == 2
    assert "log.tensorboard = true needs tensorboard" in capsys.readouterr().err
