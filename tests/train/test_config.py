"""Unknown keys and impossible values are refused by name."""

from pathlib import Path

import pytest

from rlkern.train import TrainError, cli
from rlkern.train.config import find_recipe, known_keys, load_config

BAD = [
    ({"optim.lrr": "1"}, "optim.lrr is not a setting; did you mean optim.lr?"),
    ({"optm.lr": "1"}, "optm is not a setting; did you mean optim?"),
    ({"rollout.group_sise": "4"}, "did you mean rollout.group_size?"),
    ({"optim.lr": "fast"}, "optim.lr: Input should be a valid number"),
    ({"optim.lr": "-1"}, "optim.lr: Input should be greater than 0, got -1"),
    ({"optim.lr": "nan"}, "optim.lr: Input should be a finite number, got nan"),
    ({"run.steps": "0"}, "run.steps: Input should be greater than or equal to 1, got 0"),
    ({"run.steps": "1.5"}, "run.steps: Input should be a valid integer"),
    ({"eval.min_accuracy": "1.5"}, "eval.min_accuracy: Input should be less than or equal to 1"),
    ({"optim.schedule": "cos"}, "optim.schedule: Input should be 'constant', 'linear' or 'cosine'"),
    ({"data.task": "chess"}, "data.task: Input should be '', 'sort'"),
    ({"data.task": ""}, "data: expected either task or train"),
    ({"data.train": "x.jsonl"}, "data: expected either task or train"),
    ({"eval.k": "[1, 9]"}, "asks for more than samples = 8"),
    ({"model.hidden_size": "130"}, "hidden_size must divide by heads"),
    ({"rollout.group_size": "1"}, "rollout.group_size = 1 leaves nothing to compare"),
    ({"optim.updates": "999"}, "optim.updates = 999 is more than the 512 sequences"),
    ({"algorithm.objective": "grpoo"}, "ppo"),
    ({"algorithm.options.epsilonn": "1"}, "algorithm: options: "),
    (
        {"rollout.engine": "vllm", "rollout.strategy": "cure"},
        "engine = 'vllm' does not go with strategy = 'cure': vLLM neither forks nor prunes",
    ),
    ({"rollout.engine": "vllm", "rollout.chunk": "4"}, "'vllm' does not go with chunk"),
    (
        {"rollout.engine": "vllm", "precision": "fp8-rollout"},
        "rollout.engine = 'vllm' does not go with precision = fp8-rollout",
    ),
    ({"rollout.engine_options.seed": "1"}, "engine_options are vLLM's: expected engine = 'vllm'"),
    ({"reward.name": "1"}, "--reward.name: reward is a value, not a section"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_refused(overrides, message):
    with pytest.raises(TrainError) as caught:
        load_config(find_recipe("demo"), overrides)
    assert message in str(caught.value)
    assert str(find_recipe("demo")) in str(caught.value) or message.startswith("--")


def test_several_mistakes_are_told_at_once():
    with pytest.raises(TrainError, match=r"(?s)run\.steps.*optim\.lrr"):
        load_config(find_recipe("demo"), {"optim.lrr": "1", "run.steps": "0"})


def test_overrides_are_toml_values_or_text():
    overrides = {"optim.lr": "1e-4", "eval.k": "[1, 2]", "log.tensorboard": "false"}
    overrides |= {"algorithm.options.clip_ratio_c": "3.0", "run.dir": "runs/x y"}
    cfg = load_config(find_recipe("demo"), overrides)
    assert (cfg.optim.lr, cfg.eval.k, cfg.log.tensorboard) == (1e-4, [1, 2], False)
    assert cfg.algorithm.build().clip_ratio_c == 3.0
    assert cfg.algorithm.build().epsilon_high == 0.28  # of the recipe, kept
    assert cfg.run.dir == "runs/x y"


def test_words_of_the_command_line(capsys):
    words, overrides = cli.split_overrides(["demo", "--optim.lr", "-1", "--null", "--a.b=c=d"])
    assert words == ["demo", "--null"]
    assert overrides == {"optim.lr": "-1", "a.b": "c=d"}
    assert cli.main(["--optim.lr"]) == 2
    assert "error: --optim.lr: expected a value after it" in capsys.readouterr().err


def test_recipes_by_path_and_by_name(tmp_path, capsys):
    assert find_recipe("demo") == find_recipe("demo.toml") == find_recipe(str(find_recipe("demo")))
    assert cli.main(["nosuch"]) == 2
    assert "neither a file nor a shipped recipe (" in capsys.readouterr().err
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\n")
    assert cli.main([str(bad)]) == 2
    assert "bad.toml: cannot be read" in capsys.readouterr().err


def test_dry_run_shows_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--dry-run", "--optim.lr", "0.125"]) == 0
    out = capsys.readouterr().out
    assert '"lr": 0.125' in out
    assert "857,984 parameters" in out
    assert "32 x 16 = 512 sequences, at most 3,072 response tokens" in out
    assert list(tmp_path.iterdir()) == []


def test_every_setting_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    missing = [key for key in known_keys() if key not in sections and f"`{key}`" not in text]
    assert missing == []
