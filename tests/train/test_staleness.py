"""Sampling that runs ahead of training on weights that are a known number of steps old."""

import shutil

import pytest
import torch
from conftest import arguments, metrics
from test_learning import SORT_FOUR, greedy
from test_run import assert_same_run, cut

from rlkern.rollout import NativeEngine, Rollouts
from rlkern.train import TrainError, cli, loop
from rlkern.train.config import build_config

TWO = {"rollout__max_staleness": 2, "run__steps": 8, "eval__every": 4}


def rl(folder):
    return [record for record in metrics(folder) if record["phase"] == "rl"]


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stale") / "run"
    assert cli.main(arguments(folder, **TWO)) == 0
    return folder


def test_rollouts_are_of_the_weights_of_so_many_steps_ago(stale, tiny):
    # steps 5 to 12, of which the first three sample with the weights that the warm-up left
    assert [r["staleness/mean"] for r in rl(stale)] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert [r["staleness/max"] for r in rl(stale)] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert [r["staleness/max"] for r in rl(tiny)] == [0] * 6
    for step in range(5, 13):
        path = stale / "rollouts" / f"step_{step:06d}.safetensors"
        assert Rollouts.load(path)[0].versions.unique().tolist() == [max(5, step - 2)]
    # the first step is that of a synchronous run, and what is old shows in the log-probs
    assert rl(stale)[0]["reward/mean"] == rl(tiny)[0]["reward/mean"]
    gaps = [r["logprob_gap/max"] for r in rl(stale)]
    assert gaps[0] < 1e-4 < min(gaps[1:])
    assert "policy/rollout_is_mean" in rl(stale)[1]


def test_the_log_probs_are_those_of_the_old_weights(stale, tmp_path, monkeypatch):
    """Step 8 samples as a synchronous run would that had stopped learning at step 5."""
    found = {}
    real = loop.Trainer.draw

    def spy(self, step, version, examples, prompts, weights):
        found[step] = {name: w.clone() for name, w in weights.items()}
        drawn = real(self, step, version, examples, prompts, weights)
        held = dict(self.sampler.engine.model.named_parameters())
        assert all(torch.equal(held[name], w) for name, w in found[step].items())
        assert held.keys() == found[step].keys()
        return drawn

    monkeypatch.setattr(loop.Trainer, "draw", spy)
    assert cli.main(arguments(tmp_path / "run", **TWO)) == 0
    assert_same_run(stale, tmp_path / "run", 12)
    same = [
        torch.equal(found[step]["lm_head.weight"], found[5]["lm_head.weight"]) for step in found
    ]
    assert list(found) == list(range(5, 13))
    assert same == [True] * 3 + [False] * 5


def test_the_clock_has_no_say(stale, tmp_path, monkeypatch):
    """A slow sampler, then a slow trainer."""
    import time

    for owner, name in ((NativeEngine, "generate"), (loop.Trainer, "update")):
        real = getattr(owner, name)

        def slow(*arguments, real=real, **options):
            time.sleep(0.2)
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slow)
            assert cli.main(arguments(tmp_path / name, **TWO)) == 0
        assert_same_run(stale, tmp_path / name, 12)


@pytest.mark.parametrize("step", [4, 6, 10])
def test_resumed_with_rollouts_under_way(stale, tmp_path, step):
    folder = cut(stale, tmp_path / "run", step)
    kept = sorted((folder / "checkpoints" / f"step_{step:06d}" / "ahead").glob("*"))
    assert len(kept) == (0 if step == 4 else 2)
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(stale, folder, 12)


def test_resumed_as_a_synchronous_run(stale, tmp_path):
    """What is under way is used up first."""
    folder = cut(stale, tmp_path / "run", 8)
    assert cli.main(["--resume", str(folder), "--rollout.max_staleness", "0"]) == 0
    assert [r["staleness/max"] for r in rl(folder)][4:] == [2, 2, 0, 0]


def test_a_strategy_that_asks_for_rewards_does_so_from_the_worker(tmp_path):
    changes = {"rollout__strategy": "reinforce_ada", "run__steps": 4, "rollout__max_staleness": 1}
    for name in ("one", "two"):
        assert cli.main(arguments(tmp_path / name, **changes)) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", 8)
    assert [r["staleness/max"] for r in rl(tmp_path / "one")] == [0, 1, 1, 1]


@pytest.mark.parametrize("precision", ["fp8-rollout", "fp8-unified"])
def test_with_quantised_samplers(tmp_path, precision):
    changes = TWO | {"precision": precision, "model__hidden_size": 128}
    changes |= {"model__intermediate_size": 128, "rollout__max_staleness": 1, "run__steps": 4}
    for name in ("one", "two"):
        assert cli.main(arguments(tmp_path / name, **changes)) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", 8)
    gaps = [r["logprob_gap/max"] for r in rl(tmp_path / "one")]
    assert (gaps[0] == 0) == (precision == "fp8-unified")
    assert min(gaps[1:]) > 0


def test_an_error_in_the_worker_reaches_the_user(tmp_path, capsys):
    changes = TWO | {"rollout__max_new_tokens": 61, "warmup__steps": 0, "eval__max_prompts": 1}
    assert cli.main(arguments(tmp_path / "run", **changes)) == 2
    assert "NativeEngine.generate: longest prompt + max_new_tokens = " in capsys.readouterr().err


def test_april_is_refused_and_the_correction_is_the_default():
    values = {"data": {"task": "sort"}, "rollout": {"max_staleness": 2}}
    objective = build_config(values, {}, "test").objective()
    assert (objective.rollout_is, objective.rollout_is_threshold) == ("token", 2.0)
    values["algorithm"] = {"options": {"rollout_is": "sequence", "rollout_is_threshold": 5.0}}
    assert build_config(values, {}, "test").objective().rollout_is == "sequence"
    values["rollout"] |= {"strategy": "april", "strategy_options": {"num_groups": 2}}
    with pytest.raises(TrainError, match="max_staleness does not go with april"):
        build_config(values, {}, "test")


def test_it_learns_on_old_rollouts(tmp_path):
    """GRPO corrected by token weights, and MinPRO, from one warm-up; read with test_learning."""
    warm = tmp_path / "warm"
    settings = SORT_FOUR | {"eval.min_accuracy": "0", "rollout.max_staleness": "2"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert cli.main(["demo", *words, "--run.dir", str(warm), "--run.steps", "20"]) == 0
    assert greedy(warm)[0] < 0.1
    assert greedy(warm)[1] > 0.8
    folder = tmp_path / "minpro"
    for name in ("checkpoints/step_000060",):
        shutil.copytree(warm / name, folder / name)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(warm / name, folder / name)
    options = '{ ratio_anchor = "rollout" }'  # the paper's: to the policy that has sampled
    words = ["--algorithm.objective", "minpro", "--algorithm.options", options]
    assert cli.main(["--resume", str(folder), *words, "--run.dir", str(folder)]) == 0
    assert greedy(folder)[1] > 0.8
    rewards = [r["reward/mean"] for r in rl(folder)]
    assert max(rewards[-5:]) - min(rewards[-5:]) < 0.3
