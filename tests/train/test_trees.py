"""Rollout trees in the trainer: what is left out of the loss, what is logged and drawn."""

import pytest
import torch
from conftest import arguments, metrics

from rlkern.report import read_lines
from rlkern.rollout import Rollouts
from rlkern.rollout.trees import forks, widest
from rlkern.train import TrainError, cli
from rlkern.train.batch import collate
from rlkern.train.config import build_config
from rlkern.train.loop import signal


def tree():
    """Two groups; sequence 1 leaves 0 after two tokens, sequence 2 leaves 1 after three."""
    lengths = torch.tensor([4, 4, 5, 2, 1])
    origin = torch.arange(16)
    origin[4:6] = torch.tensor([0, 1])
    origin[8:11] = torch.tensor([0, 1, 6])
    return Rollouts(
        prompt_tokens=torch.arange(4),
        prompt_cu_seqlens=torch.tensor([0, 1, 4]),
        tokens=torch.arange(16),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        logprob=torch.zeros(16),
        group_ids=torch.tensor([0, 0, 0, 1, 1]),
        truncated=torch.zeros(5, dtype=torch.bool),
        origin=origin,
        mask=torch.arange(16) % 4 != 0,
    )


def test_forks_are_read_off_the_shared_tokens():
    parent, at = forks(tree())
    assert parent.tolist() == [-1, 0, 1, -1, -1]
    assert at.tolist() == [0, 2, 3, 0, 0]
    record = widest(tree(), torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0]))
    assert record == {
        "parent": [-1, 0, 1],
        "at": [0, 2, 3],
        "length": [4, 4, 5],
        "reward": [0.0, 1.0, 0.5],
    }
    plain = tree().select(torch.tensor([0, 3]))
    assert widest(plain, torch.zeros(2)) is None


def test_selected_trees_share_what_is_left():
    picked = tree().select(torch.tensor([2, 1, 4]))
    parent, at = forks(picked)
    assert parent.tolist() == [-1, 0, -1]
    assert at.tolist() == [0, 3, 0]
    assert picked.mask.tolist() == [False, True, True, True, False, False, *[True] * 3, True]


def test_given_tokens_are_read_but_not_trained():
    rollouts = tree()
    lengths = rollouts.trained_lengths
    assert lengths.tolist() == [3, 3, 3, 2, 1]
    assert int(lengths.sum()) == int(rollouts.mask.sum())
    assert rollouts.trained(rollouts.tokens).tolist() == rollouts.tokens[rollouts.mask].tolist()
    batch = collate(rollouts.prompts(), rollouts.responses()).only(rollouts.mask)
    assert batch.targets[batch.paths].tolist() == rollouts.tokens[rollouts.mask].tolist()
    assert batch.cu_seqlens.diff().tolist() == lengths.tolist()


def test_a_signal_is_a_group_whose_rewards_differ():
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    assert signal(torch.tensor([0.0, 1, 1, 1, 1, 0]), groups) == pytest.approx(1 / 3)
    assert signal(torch.tensor([0.0, 0, -1, 1, 1, 0]), groups) == pytest.approx(1 / 3)


def test_bad_strategies_are_refused():
    for rollout, message in (
        ({"strategy": "oak"}, "strategy: expected one of .*, got 'oak'"),
        ({"strategy_options": {"leaves": 3}}, "strategy_options: .*argument"),
    ):
        with pytest.raises(TrainError, match=message):
            build_config({"data": {"task": "sort"}, "rollout": rollout}, {}, "test")


TREES = {
    "latr": {"ages": [2], "tau_abs": 0.01, "tau_rel": 0.9},
    "cure": {"num_first": 2, "num_regenerated": 1},
}


@pytest.mark.parametrize("strategy", TREES)
def test_a_run_with_trees(tmp_path, strategy):
    changes = {"rollout__strategy": strategy, "optim__share_prefix": "true", "run__steps": 3}
    changes |= {"rollout__chunk": 2, "optim__updates": 1}
    changes |= {f"rollout__strategy_options.{k}": str(v) for k, v in TREES[strategy].items()}
    assert cli.main(arguments(tmp_path, **changes)) == 0
    records = [r for r in metrics(tmp_path) if r["phase"] == "rl"]
    for record in records:
        assert record["rollout/used"] <= record["rollout/computed"] + record["completion/tokens"]
        assert 0 < record["rollout/kv_saved"] < 1
        assert record["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert read_lines(tmp_path / "trees.jsonl")
    assert "<h2>Trees</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ead", {"hold": 1, "d_first": 2.0}),
        ("reinforce_ada", {"round_size": 4, "max_rounds": 2}),
        ("power_smc", {"num_particles": 4, "every": 2}),
        ("prefix_rl", {"traces": "sample_rewards:trace", "lengths": [1]}),
    ],
)
def test_a_run_with_another_strategy(tmp_path, strategy, options):
    """Log-probs of sampler and trainer agree: temperatures, given tokens and all."""
    changes = {"rollout__strategy": strategy, "run__steps": 2, "optim__updates": 1}
    changes |= {f"rollout__strategy_options.{k}": v for k, v in options.items()}
    assert cli.main(arguments(tmp_path, **changes)) == 0
    for record in (r for r in metrics(tmp_path) if r["phase"] == "rl"):
        assert record["logprob_gap/max"] < 1e-4
        assert record["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)


def test_april_goes_on_with_what_a_step_has_left(tmp_path):
    changes = {"rollout__strategy": "april", "rollout__strategy_options.num_groups": 2}
    changes |= {"run__steps": 4, "eval__every": 1}
    assert cli.main(arguments(tmp_path, **changes)) == 0
    records = [r for r in metrics(tmp_path) if r["phase"] == "rl"]
    assert len(records) == 4
    assert all(record["completion/tokens"] > 0 for record in records)
