"""Quantised rollouts: what agrees in bits, what is corrected, and what is chosen from a pool."""

import json
import math

import pytest
import torch
from conftest import arguments, metrics

from rlkern.quant import MasterLinear
from rlkern.rollout import Rollouts, most_contrastive
from rlkern.train import TrainError, cli
from rlkern.train.config import build_config
from rlkern.train.loop import Trainer
from rlkern.train.precision import mismatch

FAST = {"warmup__steps": 2, "run__steps": 3, "rollout__save": "false"}


def config(precision, **options):
    values = {"data": {"task": "sort"}, "precision": precision, "algorithm": {"options": options}}
    return build_config(values, {}, "test")


def rl(folder):
    return [r for r in metrics(folder) if r["phase"] == "rl"]


@pytest.mark.parametrize(("task", "chunk"), [("sort", 64), ("sort_distinct", 4)])
def test_unified_log_probs_are_equal_in_bits(tmp_path, task, chunk):
    """Also with prompts of unequal length, and with paths of several chunks."""
    changes = {"precision": "fp8-unified", "data__task": task, "model__layers": 2}
    changes |= {"rollout__chunk": chunk}
    changes |= {"run__threads": 2, "rollout__prompts": 8}
    assert cli.main(arguments(tmp_path / "run", **FAST, **changes)) == 0
    records = rl(tmp_path / "run")
    assert [r["logprob_gap/max"] for r in records] == [0.0] * 3
    assert [r["logprob_gap/kl"] for r in records] == [0.0] * 3
    assert all(r["sync/changed"] > 0 for r in records)
    assert all(r["grad_norm"] > 0 for r in records)


@pytest.mark.parametrize("precision", ["fp8-rollout", "nvfp4-rollout"])
def test_a_quantised_sampler_is_another_policy_and_is_corrected(tmp_path, precision):
    assert cli.main(arguments(tmp_path / "run", **FAST, precision=precision)) == 0
    for record in rl(tmp_path / "run"):
        assert 1e-4 < record["logprob_gap/max"] < 5
        assert 0 < record["logprob_gap/kl"] < 0.5
        assert record["sync/changed"] > 0
        assert any("rollout_is" in name for name in record)


def test_the_pool_is_sampled_and_the_rest_dropped(tmp_path):
    changes = {"precision": "nvfp4-rollout", "rollout__explore": 3, "rollout__group_size": 4}
    changes |= {"rollout__save": "true"}
    assert cli.main(arguments(tmp_path / "run", **FAST | changes)) == 0
    rollouts, extra = Rollouts.load(tmp_path / "run/rollouts/step_000003.safetensors")
    assert rollouts.group_ids.tolist() == [i for i in range(4) for _ in range(4)]
    assert len(extra["rewards"]) == 16
    # that of the samples that were kept
    assert rl(tmp_path / "run")[0]["reward/mean"] == pytest.approx(extra["rewards"].mean().item())


def test_a_run_that_is_resumed_has_the_same_policy(tmp_path):
    words = arguments(tmp_path / "run", **FAST, precision="fp8-unified", checkpoint__every=2)
    assert cli.main(words) == 0
    folder = tmp_path / "run"
    values = json.loads((folder / "config.json").read_text())
    trainer = Trainer(build_config(values, {}, "test"), folder, folder / "checkpoints/step_000004")
    assert isinstance(trainer.model.model.layers[0].mlp.up_proj, MasterLinear)


def test_importance_weights_are_the_default_of_quantised_rollouts():
    assert config("bf16").objective().rollout_is is None
    assert config("fp8-unified").objective().rollout_is is None
    values = {"data": {"task": "sort"}, "rollout": {"engine": "vllm"}}
    assert build_config(values, {}, "test").objective().rollout_is == "token"
    default = config("fp8-rollout").objective()
    assert (default.rollout_is, default.rollout_is_threshold) == ("token", 2.0)
    assert default.rollout_is_mode == "truncate"
    options = {"rollout_is": "token", "rollout_is_mode": "mask", "rollout_is_threshold": 3.0}
    masked = config("nvfp4-rollout", **options).objective()
    assert (masked.rollout_is, masked.rollout_is_mode) == ("token", "mask")
    assert masked.rollout_is_threshold == 3.0
    own = config("nvfp4-rollout", rollout_is="sequence", rollout_is_threshold=5.0).objective()
    assert own.rollout_is == "sequence"
    with pytest.raises(TrainError, match="precision: Input should be 'bf16', 'fp8-unified'"):
        config("fp8")


def test_the_contrastive_subset_is_the_best_and_the_worst():
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.2, 0.9, 0.1], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    assert most_contrastive(rewards, 4).tolist() == [0, 1, 4, 5, 6, 7, 9, 11]
    # an odd number: one more of the best
    assert most_contrastive(rewards, 3).tolist() == [0, 1, 4, 6, 7, 9]
    assert most_contrastive(rewards, 6).tolist() == list(range(12))
    with pytest.raises(ValueError, match=r"expected keep in \[1, 6\], got 7"):
        most_contrastive(rewards, 7)


def test_selected_rollouts_are_those_sequences():
    lengths = torch.tensor([2, 1, 3, 2])
    tokens = torch.arange(8)
    rollouts = Rollouts(
        prompt_tokens=torch.arange(4),
        prompt_cu_seqlens=torch.tensor([0, 1, 4]),
        tokens=tokens,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        logprob=-tokens.float(),
        group_ids=torch.tensor([0, 0, 1, 1]),
        truncated=torch.tensor([False, True, False, True]),
    )
    kept = rollouts.select(torch.tensor([1, 2]))
    assert [r.tolist() for r in kept.responses()] == [[2], [3, 4, 5]]
    assert kept.logprob.tolist() == [-2.0, -3.0, -4.0, -5.0]
    assert [p.tolist() for p in kept.prompts()] == [[0], [1, 2, 3]]
    assert kept.truncated.tolist() == [True, False]


def test_the_mismatch_is_that_of_two_distributions():
    """With every token at its own share the k3 mean is KL itself."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    found = mismatch(q.log()[drawn].float(), p.log()[drawn].float())
    assert found["logprob_gap/kl"] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
    assert found["logprob_gap/max"] == pytest.approx(math.log(2.5), rel=1e-6)
