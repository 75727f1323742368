"""verl's loss functions and advantage estimators, called as its actor calls them."""

import pytest
import torch
from peers.compare import BUDGET, DTYPES, HORIZON, Batch, describe, distance, relative

pytest.importorskip("verl")

import numpy as np
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

import rlkern
from rlkern import PolicyObjective
from rlkern.ops.policy_loss.objective import LOSS_AGG_MODES

# one empty completion: verl leaves it out of the mean over sequences
LENGTHS = (17, 5, 0, 24, 11, 8)


def actor(**options) -> ActorConfig:
    """The smallest configuration that verl accepts."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        use_dynamic_bsz=True,
        ppo_mini_batch_size=6,
        **options,
    )
    # its default is the padded width, which is another for every batch
    config.global_batch_info["loss_scale_factor"] = HORIZON
    return config


def theirs(loss_mode: str, batch: Batch, mode: str, config: ActorConfig) -> tuple:
    logprob = batch.logprob.clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(loss_mode)(
        old_log_prob=batch.old,
        log_prob=logprob,
        advantages=batch.advantages[:, None].expand_as(logprob),
        response_mask=batch.mask.to(batch.dtype),
        loss_agg_mode=mode,
        config=config,
    )
    (grad,) = torch.autograd.grad(loss, logprob)
    return loss.detach(), metrics, grad


# verl's options -> ours
LOSSES = {
    # dual clip and the clamp at 20 cannot be switched off
    "vanilla": (
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.6},
        {"epsilon_low": 0.2, "epsilon_high": 0.28, "clip_ratio_c": 1.6},
    ),
    # the clamp at 10 is on the upper side alone
    "gspo": (
        {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04},
        {
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.03,
            "epsilon_high": 0.04,
            "log_ratio_clamp": 10.0,
        },
    ),
    # clips both sides, as offsets from 1
    "cispo": (
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
        {"surrogate": "detached", "epsilon_low": 0.1, "epsilon_high": 0.2},
    ),
}


def objective(loss_mode: str, agg_mode: str, **more) -> PolicyObjective:
    horizon = HORIZON if agg_mode.endswith("norm") else None
    options = LOSSES[loss_mode][1] | more
    return PolicyObjective(loss_agg_mode=agg_mode, loss_scale_factor=horizon, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("agg_mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("loss_mode", LOSSES)
def test_policy_losses(loss_mode, agg_mode, dtype, parity):
    batch = Batch(LENGTHS, dtype=dtype)
    # ratios past verl's clamp at 20, where each loss clips or clamps its own way
    if loss_mode != "gspo":
        batch.old[0, :2] = batch.logprob[0, :2] + torch.tensor([25.0, -25.0], dtype=dtype)
        batch.old[1, :2] = batch.logprob[1, :2] + torch.tensor([25.0, -25.0], dtype=dtype)
    ours = objective(loss_mode, agg_mode)
    want, want_metrics, want_grad = theirs(
        loss_mode, batch, agg_mode, actor(**LOSSES[loss_mode][0])
    )
    loss, metrics, grad = batch.ours(ours)
    # verl divides by n + 1e-8
    exact = agg_mode != "seq-mean-token-mean"
    parity(
        "policy loss",
        f"verl {loss_mode}",
        f"{agg_mode}, {str(dtype).removeprefix('torch.')}",
        rlkern=describe(ours),
        value=distance(loss, want),
        gradient=relative(grad, want_grad),
        budget=BUDGET[dtype] if exact else max(BUDGET[dtype], 2e-8),
    )
    assert metrics["pg_clipfrac"].item() > 0
    names = ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl")
    if loss_mode == "vanilla":
        assert metrics["pg_clipfrac_lower"].item() > 0
    for name in names:
        assert metrics[name].item() == pytest.approx(want_metrics[f"actor/{name}"], abs=2e-6), name


@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_global_counts_are_the_normalizer(agg_mode, parity):
    """A micro-batch of a batch of 301 tokens in 19 sequences."""
    batch, ours = Batch(LENGTHS), objective("vanilla", agg_mode, clip_ratio_c=3.0)
    count = 301 if agg_mode == "token-mean" else 19
    config = actor(clip_ratio_high=0.28)
    config.global_batch_info.update(batch_num_tokens=301, global_batch_size=19)
    want, _, want_grad = theirs("vanilla", batch, agg_mode, config)
    loss, _, grad = batch.ours(ours, normalizer=count)
    parity(
        "policy loss",
        "verl vanilla",
        f"{agg_mode}, global batch_num_tokens or global_batch_size",
        rlkern=describe(ours, normalizer=count),
        value=distance(loss, want),
        gradient=relative(grad, want_grad),
        budget=BUDGET[torch.float32],
    )


@pytest.mark.parametrize(
    ("kl_loss_type", "options"),
    [
        ("k1", {"kl_type": "k1", "kl_input_clamp_value": None}),
        ("k2", {"kl_type": "k2", "kl_input_clamp_value": None}),
        ("low_var_kl", {"kl_type": "k3", "kl_output_clamp_value": 10.0}),
    ],
)
@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_kl_and_entropy_terms(kl_loss_type, options, agg_mode, parity):
    """verl's actor: policy loss - entropy_coeff * agg(entropy) + kl_loss_coef * agg(kl)."""
    batch = Batch(LENGTHS)
    # past the output clamp of k3, and past its input clamp
    batch.ref[0, 0], batch.ref[1, 1] = batch.logprob[0, 0] + 4, batch.logprob[1, 1] + 22
    config, mask = actor(clip_ratio_high=0.28, clip_ratio_c=1.6), batch.mask.to(batch.dtype)
    logprob = batch.logprob.clone().requires_grad_()
    loss, _ = core_algos.compute_policy_loss_vanilla(
        batch.old, logprob, batch.advantages[:, None], mask, agg_mode, config
    )
    kl = core_algos.kl_penalty(logprob, batch.ref, kl_loss_type)
    for value, weight in ((kl, 0.05), (batch.entropy, -0.01)):
        loss = loss + weight * core_algos.agg_loss(value, mask, agg_mode)
    (want_grad,) = torch.autograd.grad(loss, logprob)
    ours = objective("vanilla", agg_mode, kl_coef=0.05, entropy_coef=0.01, **options)
    got, _, grad = batch.ours(ours, ref_logprob=batch.ref, entropy=batch.entropy)
    parity(
        "policy loss",
        "verl vanilla + kl_penalty + entropy",
        f"{kl_loss_type}, {agg_mode}",
        rlkern=describe(ours),
        value=distance(got, loss),
        gradient=relative(grad, want_grad),
        budget=BUDGET[torch.float32],
    )


# --- advantages -------------------------------------------------------------------------------

ADVANTAGES = {
    "grpo": ("grpo", {}),
    "grpo_vectorized": ("grpo", {}),
    "grpo, norm_adv_by_std_in_grpo=False": ("dr_grpo", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}),
    "rloo_vectorized": ("rloo", {}),
}
# verl takes the mean of a group of one as 0 and its deviation as 1, except in rloo_vectorized
LONE = {
    "grpo": 1 / (1 + 1e-6),
    "grpo_vectorized": 1 / (1 + 1e-6),
    "grpo, norm_adv_by_std_in_grpo=False": 1.0,
    "rloo": 1.0,
}


def estimated(name: str, rewards: torch.Tensor, groups: list[int], options: dict) -> torch.Tensor:
    """verl's estimators take token rewards: all of it on the last token."""
    token_rewards = torch.zeros(len(rewards), 4)
    token_rewards[:, -1] = rewards
    estimate = core_algos.get_adv_estimator_fn(name.split(",")[0])
    advantages, _ = estimate(
        token_level_rewards=token_rewards,
        response_mask=torch.ones(len(rewards), 4),
        index=np.array([f"prompt-{group}" for group in groups]),
        **options,
    )
    return advantages[:, 0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name, parity):
    """Groups of unequal size, rows in any order, one group without a difference."""
    kind, options = ADVANTAGES[name]
    groups = torch.tensor([0, 1, 2] * 5 + [1, 1, 3, 3, 2])[torch.randperm(20)]
    rewards = torch.where(groups == 3, 0.5, torch.randn(20))
    want = estimated(name, rewards, groups.tolist(), options)
    parity(
        "advantages",
        f"verl {name}",
        "groups of 2 to 7 rows",
        rlkern=f"kind={kind!r}, epsilon=1e-06" if kind == "grpo" else f"kind={kind!r}",
        value=distance(rlkern.group_advantage(rewards, groups, kind=kind), want),
        budget=BUDGET[torch.float32],
    )


@pytest.mark.parametrize("name", LONE)
def test_a_group_of_one_has_no_advantage_here(name, parity):
    kind, options = ADVANTAGES[name]
    rewards, groups = torch.tensor([2.0, 1.0, 3.0]), [0, 1, 1]
    want = estimated(name, rewards, groups, options)
    got = rlkern.group_advantage(rewards, torch.tensor(groups), kind=kind)
    assert want[0].item() == pytest.approx(2.0 * LONE[name])
    assert got[0].item() == 0
    assert distance(got[1:], want[1:]) <= BUDGET[torch.float32]
    parity(
        "advantages",
        f"verl {name}",
        "a group of one row",
        rlkern=f"kind={kind!r}",
        value=distance(got, want),
        budget=BUDGET[torch.float32],
        differs=True,
        note="verl: the reward itself; here 0, as in its rloo_vectorized",
    )
