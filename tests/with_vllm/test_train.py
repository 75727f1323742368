"""Steps of the demo with rollouts by vLLM, weights handed over before each of them."""

import json

import pytest
import tiny  # noqa: F401
import torch

from rlkern.rollout import Rollouts
from rlkern.train import cli

pytest.importorskip("vllm.platforms")
pytestmark = pytest.mark.no_poison

SETTINGS = {
    "rollout.engine": "vllm",
    "rollout.engine_options.block_size": "32",
    "rollout.engine_options.kv_cache_memory_bytes": "67108864",
    "rollout.prompts": "8",
    "rollout.group_size": "4",
    "rollout.save": "true",
    "warmup.steps": "8",
    "run.steps": "3",
    "run.threads": "1",
    "optim.lr": "1e-2",  # large, so that old weights would show
    "optim.warmup_steps": "0",
    "reward": "tiny:distinct",
    "data.train_size": "512",
    "data.heldout_size": "16",
    "eval.every": "0",
    "eval.samples": "1",
    "eval.k": "[1]",
    "eval.min_accuracy": "0",
    "checkpoint.every": "0",
    "log.tensorboard": "false",
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim.share_prefix": "true", "rollout.explore": "2"},
        {"model.dtype": "bfloat16", "rollout.temperature": "0.8"},
        {"rollout.engine": "vllm-server"},
    ],
    ids=["float32", "shared prompts, from a pool", "bfloat16", "a server"],
)
def test_three_steps_of_the_demo(tmp_path, changes):
    words = (SETTINGS | changes | {"run.dir": str(tmp_path / "run")}).items()
    assert cli.main(["demo", *(word for key, value in words for word in (f"--{key}", value))]) == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [record for record in records if record["phase"] == "rl"]
    assert [record["step"] for record in steps] == [9, 10, 11]
    for record in steps:
        assert record["grad_norm"] > 0
        assert record["time/sync"] > 0
        assert "rollout/prefix_cached" in record
        assert any("rollout_is" in name for name in record)
        # between the trainer's log-probs and vLLM's: rounding, and no step's change of weights
        exact = "model.dtype" not in changes
        assert 0 < record["logprob_gap/max"] < (2e-4 if exact else 0.5)
        assert record["logprob_gap/kl"] < (1e-8 if exact else 2e-3)
    first, last = (
        Rollouts.load(tmp_path / f"run/rollouts/step_{step:06d}.safetensors")[0] for step in (9, 11)
    )
    assert first.versions.unique().tolist() == [9]
    assert last.versions.unique().tolist() == [11]
    assert len(last.group_ids) == 32
    assert not torch.equal(first.logprob[:8], last.logprob[:8])
