"""Every recipe that is shipped loads; those for a CPU run, at the smallest size, for two steps."""

import math

import pytest
import torch
from conftest import TINY, read

from rlkern.ops.policy_loss.presets import PRESETS
from rlkern.rollout.strategies import STRATEGIES
from rlkern.train import TrainError
from rlkern.train.config import RECIPES, find_recipe, load_config
from rlkern.train.loop import Trainer

ALL = {path.stem: load_config(path, {}) for path in sorted(RECIPES.glob("*.toml"))}
ON_CPU = [name for name, cfg in ALL.items() if not cfg.model.path]
# what a recipe says of these is what it is about
SMALL = {key: value for key, value in TINY.items() if key.split(".")[0] in ("model", "run")}
SMALL |= {
    "data.train_size": "200",
    "data.heldout_size": "2",
    "warmup.steps": "0",
    "run.steps": "2",
    "rollout.prompts": "2",
    "optim.updates": "1",
    "eval.every": "0",
    "eval.k": "[]",
    "checkpoint.every": "0",
    "log.tensorboard": "false",
}


def test_every_preset_and_strategy_has_a_recipe():
    # rank_grpo needs the borders of ranked items, which no question of the trainer has
    for name in PRESETS.keys() - {"rank_grpo"}:
        assert ALL[name].algorithm.objective == name
    for name in STRATEGIES.keys() - {"groups"}:
        assert ALL[name].rollout.strategy == name
    known = PRESETS.keys() | STRATEGIES.keys() | {"demo", "calculator"}
    assert ALL.keys() - known == {"qwen3_0.6b_gsm8k", "qwen3_8b_dapo_math"}


def test_recipes_say_what_they_are():
    for name in ALL:
        text = (RECIPES / f"{name}.toml").read_text()
        assert text.startswith("# "), name
        assert (name in ON_CPU) != ("NOT RUN" in text), name


@pytest.mark.parametrize("name", ON_CPU)
def test_two_steps(name, tmp_path):
    torch.set_num_threads(1)
    trainer = Trainer(load_config(find_recipe(name), SMALL), tmp_path)
    assert trainer.fit()
    trainer.worker.shutdown()
    trainer.log.close()
    records = [r for r in read(tmp_path / "metrics.jsonl") if r["phase"] == "rl"]
    assert [r["step"] for r in records] == [1, 2]
    for record in records:
        assert math.isfinite(record["loss"])
        assert record["completion/tokens"] > 0
        assert record["logprob_gap/max"] < 1e-3 or trainer.cfg.rollout.max_staleness


def test_a_recipe_has_a_base(tmp_path):
    (tmp_path / "one.toml").write_text(
        'base = "dapo"\nreward = "numeric"\n[rollout]\nprompts = 7\n[algorithm]\noptions = {}\n'
    )
    demo, cfg = ALL["demo"], load_config(tmp_path / "one.toml", {"rollout.group_size": "3"})
    assert (cfg.reward, cfg.rollout.prompts, cfg.rollout.group_size) == ("numeric", 7, 3)
    assert cfg.algorithm.objective == "dapo"
    assert cfg.warmup == demo.warmup
    assert cfg.rollout.max_new_tokens == demo.rollout.max_new_tokens
    assert demo.algorithm.options  # replaced, not mixed with those of another objective
    assert cfg.algorithm.options == {}
    (tmp_path / "two.toml").write_text('base = "nosuch"\n')
    with pytest.raises(TrainError, match="'nosuch' is neither a file nor a shipped recipe"):
        load_config(tmp_path / "two.toml", {})
