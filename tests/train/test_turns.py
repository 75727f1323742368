"""Turns in the trainer: what is masked, how turns are paid, and runs with a tool."""

import json
import shutil

import pytest
import torch
from conftest import arguments, metrics, read

import rlkern
from rlkern.rollout import Rollouts, turn_rows
from rlkern.train import TrainError, cli
from rlkern.train.batch import collate, collate_shared, response_logprobs
from rlkern.train.config import find_recipe, load_config
from rlkern.train.loop import Trainer
from rlkern.train.model import load_model

TOOL = {
    "data__task": "calculation",
    "reward": "numeric",
    "rollout__environment": "calculator",
    "rollout__max_new_tokens": "16",
    "rollout__group_size": "8",
    "run__steps": "2",
    "eval__every": "1",
}
GAME = {
    "rollout__environment": "sample_environments:Players",
    "rollout__max_new_tokens": "10",
    "algorithm__credit": "turn",
    "algorithm__agents": "2",
    "run__steps": "4",
}


def run(folder, changes):
    assert cli.main(arguments(folder, **changes)) == 0
    return [record for record in metrics(folder) if record["phase"] == "rl"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm__credit": "turn", "rollout__environment_options.penalty": "0.5"},
        {
            "optim__share_prefix": "true",
            "optim__updates": "1",
            "optim__micro_batch": "16",
            "reward": "sample_rewards:distinct",  # which differ whatever is drawn
        },
        {"rollout__strategy": "april", "rollout__strategy_options.num_groups": "2"},
    ],
    ids=["sequence", "turn", "shared", "april"],
)
def test_a_run_with_a_calculator(tmp_path, changes):
    for record in run(tmp_path, TOOL | changes):
        assert record["logprob_gap/max"] < 1e-4
        assert record["rollout/turns"] > 1
        assert 0 < record["rollout/replied"] < 1
        if changes.get("optim__updates") == "1":
            assert record["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    samples = [s for r in read(tmp_path / "samples.jsonl") for s in r["best"] + r["worst"]]
    told = [part for s in samples for part in s["parts"]]
    assert any(not drawn and text.lstrip("-").isdigit() for text, drawn in told)
    assert all("".join(text for text, _ in s["parts"]) == s["completion"] for s in samples)


def test_sampling_ahead_with_a_calculator_has_the_same_bits_again(tmp_path):
    changes = TOOL | {"rollout__max_staleness": "1", "run__steps": "3"}
    assert run(tmp_path / "one", changes) == run(tmp_path / "two", changes)


def rollouts_of(folder, step=5):
    return Rollouts.load(folder / "rollouts" / f"step_{step:06d}.safetensors")


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    folder = tmp_path_factory.mktemp("game") / "run"
    run(folder, GAME)
    return folder


def test_turns_of_a_game_are_paid_to_their_players(game):
    rollouts, extra = rollouts_of(game)
    rows = turn_rows(rollouts, extra["rewards"])
    assert set(rows.agent_ids.tolist()) == {0, 1}
    paid = rollouts.turn_rewards.split(rollouts.lengths.tolist())
    ended = [bool((part == -1.0).any()) for part in paid]
    assert all(abs(float(p.sum())) < 1e-6 for p, e in zip(paid, ended) if not e)
    cfg = load_config(game / "config.json", {})
    (game.parent / "other").mkdir()
    trainer = Trainer(cfg, game.parent / "other")
    of_tokens = trainer.advantages(rollouts, extra["rewards"])
    assert len(of_tokens) == int(rollouts.mask.sum())
    expected = torch.empty_like(rows.returns)
    for group in rows.group_ids.unique():
        for agent in (0, 1):
            mine = (rows.group_ids == group) & (rows.agent_ids == agent)
            r = rows.returns[mine].double()
            spread = r.std() + 1e-6 if len(r) > 1 else 1.0
            expected[mine] = ((r - r.mean()) / spread).float()
    torch.testing.assert_close(of_tokens, expected[rows.of_token], atol=1e-5, rtol=1e-5)


def test_a_game_is_resumed_bit_for_bit(game, tmp_path):
    changes = GAME | {"algorithm__advantage": "spiral", "checkpoint__every": "1"}
    run(tmp_path / "run", changes)
    states = {
        step: json.loads((tmp_path / f"run/checkpoints/step_{step:06d}/state.json").read_text())
        for step in (6, 8)
    }
    assert all(len(state["baseline"]) == 2 and any(state["baseline"]) for state in states.values())
    assert states[6]["baseline"] != states[8]["baseline"]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (7, 8):
        shutil.rmtree(tmp_path / f"again/checkpoints/step_{step:06d}")
    assert cli.main(["--resume", str(tmp_path / "again")]) == 0
    assert metrics(tmp_path / "again") == metrics(tmp_path / "run")
    # the roles' baselines are those of the op, step after step
    state = torch.zeros(2, dtype=torch.float64)
    for step in (5, 6):
        rollouts, extra = rollouts_of(tmp_path / "run", step)
        rows = turn_rows(rollouts, extra["rewards"])
        _, state = rlkern.group_advantage(
            rows.returns, torch.zeros_like(rows.group_ids), kind="spiral", num_groups=1,
            agent_ids=rows.agent_ids, num_agents=2, state=state,
        )  # fmt: skip
    assert states[6]["baseline"] == state.tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_replies_have_no_gradient(game, shared):
    """The last hidden state that predicts a reply feeds nothing but that token's log-prob."""
    words = {"optim.share_prefix": str(shared).lower(), "optim.updates": "1"}
    cfg = load_config(game / "config.json", words)
    model, _ = load_model(cfg, game / "checkpoints" / "step_000008" / "model")
    rollouts, _ = rollouts_of(game)
    mask, sequences = rollouts.mask, range(len(rollouts.group_ids))
    assert int((~mask).sum()) > 0
    states = []
    model.base_model.register_forward_hook(lambda m, i, out: states.append(out.last_hidden_state))
    if shared:
        batch = collate_shared(rollouts, list(sequences))
    else:
        batch = collate(rollouts.prompts(), rollouts.responses())
    paths = torch.arange(len(mask)) if batch.paths is None else batch.paths
    trained = batch.only(mask)
    out = response_logprobs(model, trained)
    states[0].retain_grad()
    result = rlkern.policy_loss(
        out.logprob,
        out.logprob.detach(),
        torch.randn(len(out.logprob), generator=torch.Generator().manual_seed(0)),
        cu_seqlens=trained.cu_seqlens,
        entropy=out.entropy,
        objective=rlkern.PolicyObjective.preset("grpo", entropy_coef=0.01),
    )
    result.loss.backward()
    grad = states[0].grad.flatten(0, 1)
    of_token = grad[batch.rows[paths]]
    assert (of_token[~mask] == 0).all()
    assert (of_token[mask] != 0).any(1).all()
    other = torch.ones(len(grad), dtype=torch.bool)
    other[batch.rows[paths[mask]]] = False
    assert (grad[other] == 0).all()


def test_the_warm_up_does_not_train_replies(tmp_path):
    words = {key.replace("__", "."): value for key, value in TOOL.items()}
    words |= {"warmup.batch_size": "8", "log.tensorboard": "false"}
    trainer = Trainer(load_config(find_recipe("calculator"), words), tmp_path)
    seen = []
    trainer.optimizer_step = lambda lr, watched: seen.append(watched["the log-probs"]) or 0.0
    trainer.step = 1
    metrics = trainer.warmup_step()
    assert metrics["loss_floor"] == pytest.approx(
        sum(e.nats for e in trainer.train_set[:1]) * 8 / len(seen[0])
    )
    assert len(seen[0]) == 8 * (4 + 1 + 1 + 1)  # digits, "*", "=" and the end mark


def test_an_environment_that_fails_is_told(tmp_path, capsys):
    changes = GAME | {"rollout__environment": "sample_environments:Broken", "warmup__steps": "0"}
    assert cli.main(arguments(tmp_path, **changes)) == 2
    assert "no tool at this address" in capsys.readouterr().err


BAD = [
    ({"rollout.strategy": "cure"}, "environment does not go with engine"),
    ({"rollout.strategy": "ead"}, "a strategy that neither forks"),
    ({"rollout.engine": "vllm"}, "environment does not go with engine = 'vllm'"),
    ({"rollout.environment": ""}, "algorithm.credit = 'turn' needs a rollout.environment"),
    ({"algorithm.credit": "sequence", "algorithm.agents": "2"}, "algorithm.agents > 1 needs"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(TrainError, match=message):
        load_config(find_recipe("calculator"), overrides)


def test_options_of_an_environment_are_checked(tmp_path):
    words = {"rollout.environment_options.turns": "3", "log.tensorboard": "false"}
    with pytest.raises(TrainError, match=r"rollout\.environment_options: .*'turns'"):
        Trainer(load_config(find_recipe("calculator"), words), tmp_path)


def test_vllm_refuses_an_environment():
    from rlkern.rollout.vllm import sampling_arguments

    how = {"group_size": 1, "max_new_tokens": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    how |= {"min_p": 0.0, "greedy": False, "strategy": None}
    with pytest.raises(ValueError, match="expected no environment: each turn would be a request"):
        sampling_arguments("VllmEngine", [[1]], [], 9, environment=object(), **how)
    assert sampling_arguments("VllmEngine", [[1]], [], 9, environment=None, **how)
