"""The advantage estimators of verl and TRL beyond grpo and rloo, verl's GAE and its value loss."""

import numpy as np
import pytest
import torch
from peers.compare import BUDGET, distance

import rlkern

# verl divides by sqrt(var + 1e-8) and by counts + 1e-8 where it whitens
WHITENED = 5e-6
LENGTHS = (7, 3, 12, 5, 9, 12, 4, 8, 6, 10, 2, 11, 7, 5, 9, 3)
GROUPS = (0, 1, 2, 0, 1, 2, 3, 3, 1, 0, 2, 2, 4, 4, 4, 1)
COLUMNS = 12


@pytest.fixture
def core_algos():
    return pytest.importorskip("verl.trainer.ppo.core_algos")


@pytest.fixture
def batch():
    """Rewards on the last token of completions of different lengths; group 3 has equal ones."""
    rewards = torch.randn(len(LENGTHS))
    rewards[[6, 7]] = 0.5
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(COLUMNS) < lengths[:, None]).float()
    token_rewards = torch.zeros_like(mask)
    token_rewards[torch.arange(len(LENGTHS)), lengths - 1] = rewards
    return rewards, lengths, mask, token_rewards


class Config(dict):
    """verl's AlgoConfig is asked by attribute and by get()."""

    __getattr__ = dict.__getitem__


def estimated(core_algos, name, batch, /, **options):
    """verl's advantage of each row; it is the same at all of its tokens."""
    _, _, mask, token_rewards = batch
    estimate = core_algos.get_adv_estimator_fn(name)
    advantages, _ = estimate(
        token_level_rewards=token_rewards.clone(),
        response_mask=mask,
        index=np.array([f"prompt-{group}" for group in GROUPS]),
        **options,
    )
    assert ((advantages - advantages[:, :1]) * mask).abs().max() == 0
    return advantages[:, 0]


# verl's name and options -> our kind, whether it takes lengths, budget
VERL = {
    "opo": ("opo", {}, True, BUDGET[torch.float32]),
    "gpg": ("gpg", {}, False, BUDGET[torch.float32]),
    "grpo_passk": (
        "grpo_passk",
        {"config": Config(norm_adv_by_std_in_grpo=True)},
        False,
        BUDGET[torch.float32],
    ),
    "grpo_passk, norm_adv_by_std_in_grpo=False": (
        "passk",
        {"config": Config(norm_adv_by_std_in_grpo=False)},
        False,
        BUDGET[torch.float32],
    ),
    "reinforce_plus_plus": (
        "reinforce_plus_plus",
        {"config": Config(gamma=1.0)},
        True,
        WHITENED,
    ),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", {}, True, WHITENED),
}


@pytest.mark.parametrize("name", VERL)
def test_verls_estimators(name, core_algos, batch, parity):
    kind, options, with_lengths, budget = VERL[name]
    want = estimated(core_algos, name.split(",")[0], batch, **options)
    inputs = {"lengths": batch[1]} if with_lengths else {}
    got = rlkern.group_advantage(batch[0], torch.tensor(GROUPS), kind=kind, **inputs)
    assert got.abs().max() > 0.5
    parity(
        "advantages",
        f"verl {name}",
        "groups of 2 to 4 rows",
        rlkern=f"kind={kind!r}" + ", lengths" * with_lengths,
        value=distance(got, want),
        budget=budget,
    )


def test_verls_remax(core_algos, batch, parity):
    rewards, _, mask, token_rewards = batch
    baselines = torch.randn(len(LENGTHS))
    want, _ = core_algos.get_adv_estimator_fn("remax")(
        token_level_rewards=token_rewards, reward_baselines=baselines, response_mask=mask
    )
    got = rlkern.group_advantage(
        rewards, torch.tensor(GROUPS), kind="remax", reward_baselines=baselines
    )
    parity(
        "advantages",
        "verl remax",
        "reward on the last token",
        rlkern="kind='remax'",
        value=distance(got, want[:, 0]),
        budget=BUDGET[torch.float32],
    )


@pytest.mark.parametrize("weights", [None, [0.25, 1.5]])
def test_verls_gdpo(weights, core_algos, batch, parity):
    rewards, lengths, mask, _ = batch
    second = torch.randint(2, (len(LENGTHS),)).float()
    columns = {"format": second, "accuracy": rewards}
    prompts = torch.zeros(len(LENGTHS), 3)
    want = estimated(
        core_algos,
        "gdpo",
        batch,
        config=Config(gdpo_reward_keys=list(columns), gdpo_reward_weights=weights),
        non_tensor_batch={name: column.numpy() for name, column in columns.items()},
        batch={"prompts": prompts, "attention_mask": torch.cat([prompts + 1, mask], 1).long()},
    )
    options = {} if weights is None else {"reward_weights": weights}
    got = rlkern.group_advantage(
        torch.stack(list(columns.values()), 1),
        torch.tensor(GROUPS),
        kind="gdpo",
        lengths=lengths,
        **options,
    )
    parity(
        "advantages",
        "verl gdpo",
        "two rewards, weights 1" if weights is None else f"two rewards, weights {weights}",
        rlkern=f"kind='gdpo', lengths, {options}",
        value=distance(got, want),
        budget=WHITENED,
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_verls_reinforce_plus_plus_is_whitened_gae_without_values(gamma, core_algos, batch, parity):
    """Discounted returns of tokens, with observations between them."""
    _, _, mask, token_rewards = batch
    holes = mask * (torch.rand_like(mask) < 0.8)
    token_rewards = torch.randn_like(mask) * holes
    want, want_returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        token_rewards, holes, config=Config(gamma=gamma)
    )
    got = rlkern.gae(
        token_rewards, torch.zeros_like(mask), mask=holes.bool(), gamma=gamma, whiten=True
    )
    parity(
        "advantages",
        "verl reinforce_plus_plus",
        f"token rewards, gamma={gamma}",
        rlkern=f"gae, values of 0, gamma={gamma}, lam=1.0, whiten=True",
        value=max(distance(got.advantages, want), distance(got.returns, want_returns)),
        budget=WHITENED,
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_verls_gae(gamma, lam, core_algos, batch, parity):
    _, _, mask, _ = batch
    holes = mask * (torch.rand_like(mask) < 0.8)
    rewards, values = torch.randn_like(mask), torch.randn_like(mask)
    want, want_returns = core_algos.compute_gae_advantage_return(rewards, values, holes, gamma, lam)
    got = rlkern.gae(rewards, values, mask=holes.bool(), gamma=gamma, lam=lam, whiten=True)
    value = max(distance(got.advantages, want * holes), distance(got.returns, want_returns * holes))
    parity(
        "advantages",
        "verl gae",
        f"with observation tokens, gamma={gamma}, lam={lam}",
        rlkern=f"gae, gamma={gamma}, lam={lam}, whiten=True",
        value=value,
        budget=WHITENED,
    )


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("cliprange", [0.2, 1.0])
def test_verls_value_loss(mode, cliprange, core_algos, batch, parity):
    _, _, mask, _ = batch
    values, returns = torch.randn_like(mask).requires_grad_(), torch.randn_like(mask)
    old_values = values.detach() + 0.5 * torch.randn_like(mask)
    want, want_clipfrac = core_algos.compute_value_loss(
        values, returns, old_values, mask, cliprange, mode
    )
    got = rlkern.value_loss(
        values, returns, old_values, mask=mask.bool(), cliprange=cliprange, loss_agg_mode=mode
    )
    grads = [torch.autograd.grad(loss, values)[0] for loss in (got.loss, want)]
    assert 0 < want_clipfrac < 1
    assert got.metrics["vf_clipfrac"].item() == pytest.approx(want_clipfrac.item(), abs=1e-6)
    parity(
        "value loss",
        "verl compute_value_loss",
        f"{mode}, cliprange={cliprange}",
        rlkern=f"value_loss, cliprange={cliprange}, loss_agg_mode={mode!r}",
        value=distance(got.loss, want),
        gradient=distance(*grads),
        budget=BUDGET[torch.float32],
    )


def test_trls_normalize_then_sum(tmp_path, parity):
    """Of the trainer's own generation step, with two reward functions."""
    pytest.importorskip("trl")
    from peers.test_trl import trainer

    first, second = torch.randn(16).tolist(), torch.randint(2, (16,)).float().tolist()
    made = trainer(
        tmp_path,
        reward=[lambda completions, **_: first, lambda completions, **_: second],
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=[1.0, 0.5],
        max_completion_length=2,
        per_device_train_batch_size=16,
    )
    rows = [{"prompt": prompt} for prompt in made.train_dataset["prompt"][:4] for _ in range(4)]
    want = made._generate_and_score_completions(rows)["advantages"]
    got = rlkern.group_advantage(
        torch.tensor([first, second]).T,
        torch.arange(4).repeat_interleave(4),
        kind="gdpo",
        epsilon=1e-4,
        reward_weights=[1.0, 0.5],
    )
    parity(
        "advantages",
        "TRL multi_objective_aggregation='normalize_then_sum'",
        "two rewards, 4 groups of 4 rows",
        rlkern="kind='gdpo', epsilon=0.0001, reward_weights=[1.0, 0.5]",
        value=distance(got, want),
        budget=BUDGET[torch.float32],
    )
