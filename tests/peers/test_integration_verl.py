"""rlkern.integrations.verl behind verl's registries, and verl's own tests with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers.compare import BUDGET, Batch, distance, relative

pytest.importorskip("verl")

import numpy as np
from peers.test_verl import CLIPS, LENGTHS, actor
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as cross_entropy

import rlkern
from rlkern import PolicyObjective
from rlkern.integrations import verl as integration
from rlkern.ops.group_advantage.methods import INPUTS
from rlkern.ops.policy_loss.objective import LOSS_AGG_MODES
from rlkern.ops.policy_loss.presets import PRESETS

ROOT = Path(__file__).parents[2]
# the import is the act: the other files compare with verl's own
integration.HANDLE.disable()
THEIRS = dict(core_algos.POLICY_LOSS_REGISTRY)


@pytest.fixture(autouse=True)
def _enabled():
    integration.HANDLE = integration.enable()
    yield
    integration.HANDLE.disable()


@pytest.fixture
def replaced(_enabled):
    with integration.enable(replace=True) as handle:
        yield handle


# --- enabling -------------------------------------------------------------------------------------


def test_the_environment_variable_registers_everything():
    """In a process of its own, as in every Ray worker."""
    code = (
        "import verl, json\n"
        "from verl.trainer.ppo import core_algos as c\n"
        "from verl.utils.experimental.torch_functional import FusedLinearForPPO as f\n"
        "print(json.dumps([list(c.POLICY_LOSS_REGISTRY), list(c.ADV_ESTIMATOR_REGISTRY), "
        "f.__module__]))"
    )
    env = os.environ | {"VERL_USE_EXTERNAL_MODULES": "rlkern.integrations.verl"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses, estimators, module = json.loads(done.stdout.splitlines()[-1])
    assert {f"rlkern_{name}" for name in PRESETS} < set(losses)
    assert {f"rlkern_{kind}" for kind in integration.served_kinds()} < set(estimators)
    assert module == "rlkern.integrations.verl"
    assert "vanilla" in losses


def test_everything_is_put_back():
    original = core_algos.compute_policy_loss_vanilla
    before = dict(core_algos.POLICY_LOSS_REGISTRY), dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    with integration.enable(replace=True):
        assert core_algos.compute_policy_loss_vanilla is not original
        assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is core_algos.compute_policy_loss_vanilla
    assert core_algos.compute_policy_loss_vanilla is original
    assert before == (core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY)
    # what the import has registered goes too
    integration.HANDLE.disable()
    assert not [name for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith("rlkern")]
    assert torch_functional.FusedLinearForPPO is not integration.FusedLinearForPPO
    assert cross_entropy.linear_cross_entropy is not integration.linear_cross_entropy
    integration.HANDLE = integration.enable()
    assert (core_algos.POLICY_LOSS_REGISTRY.keys(), core_algos.ADV_ESTIMATOR_REGISTRY.keys()) == (
        before[0].keys(),
        before[1].keys(),
    )
    assert torch_functional.FusedLinearForPPO is integration.FusedLinearForPPO


def test_another_signature_is_refused_before_anything_changes(monkeypatch):
    def compute_policy_loss_vanilla(old_log_prob, log_prob, tokens):
        return None

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", compute_policy_loss_vanilla)
    integration.HANDLE.disable()
    wanted = r"compute_policy_loss_vanilla\(old_log_prob, log_prob, advantages, .* as in verl 0.9"
    with pytest.raises(RuntimeError, match=wanted + r", got verl 0\.9\.1: \(old_log_prob, log_"):
        integration.enable()
    assert "rlkern_ppo" not in core_algos.POLICY_LOSS_REGISTRY
    monkeypatch.undo()
    integration.HANDLE = integration.enable()


# --- losses ---------------------------------------------------------------------------------------


def called(function, batch, agg_mode, config, weights=None):
    logprob = batch.logprob.clone().requires_grad_()
    loss, metrics = function(
        old_log_prob=batch.old,
        log_prob=logprob,
        advantages=batch.advantages[:, None].expand_as(logprob),
        response_mask=batch.mask.to(batch.dtype),
        loss_agg_mode=agg_mode,
        config=config,
        rollout_is_weights=weights,
    )
    return loss.detach(), metrics, torch.autograd.grad(loss, logprob)[0]


FINE = {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04, "clip_ratio_c": 1.1}
TWINS = {
    "vanilla": CLIPS,
    "gspo": FINE,
    "cispo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
    "dppo_tv": FINE,
    "dppo_kl": FINE,
    "gpg": {},
    "sapo": {"tau_pos": 1.1, "tau_neg": 1.3},
    "geo_mean": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
    "dro": {},
}


def configured(name):
    config = actor(**TWINS[name])
    if name == "dro":
        object.__setattr__(config.policy_loss, "dro_beta", 0.3)
    return config


@pytest.mark.parametrize("counts", ["local", "global"])
@pytest.mark.parametrize("agg_mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("name", TWINS)
def test_verls_losses(name, agg_mode, counts, replaced, parity):
    assert set(TWINS) == set(integration.TWINS)
    batch, config = Batch(LENGTHS), configured(name)
    batch.logprob.clamp_(max=-0.01)
    if counts == "global":
        more = {"dp_size": 2, "batch_num_tokens": 301, "global_batch_size": 19}
        config.global_batch_info.update(more)
    weights = None
    if name not in ("dro", "gpg"):
        weights = (batch.old - batch.rollout).exp().clamp(max=2.0)
    want, want_metrics, want_grad = called(THEIRS[name], batch, agg_mode, config, weights)
    ours = core_algos.get_policy_loss_fn(name)
    assert ours is not THEIRS[name]
    got, metrics, grad = called(ours, batch, agg_mode, config, weights)
    parity(
        "integrations",
        f"verl {name}",
        f"{agg_mode}, {counts} counts" + ", rollout_is_weights" * (weights is not None),
        rlkern="integrations.verl.enable(replace=True)",
        value=distance(got, want),
        gradient=relative(grad, want_grad),
        # verl divides by n + 1e-8
        budget=BUDGET[torch.float32],
    )
    for key in want_metrics:
        if key == "actor/pg_clipfrac" and name == "cispo":
            continue  # ours counts ratios out of bounds whatever the sign of the advantage
        if key in metrics and name not in ("geo_mean", "sapo", "dro"):
            assert metrics[key] == pytest.approx(want_metrics[key], abs=2e-6), key


# numbers that a preset leaves to its user
NEEDED = {
    name: {field: 0.5 for field in preset.required if field != "loss_scale_factor"}
    for name, preset in PRESETS.items()
}
# all candidates: which it draws is random
NEEDED["clip_cov"] = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_loss_mode(name, parity, monkeypatch):
    batch, config = Batch(LENGTHS), actor()
    batch.logprob.clamp_(max=-0.01)
    function = core_algos.get_policy_loss_fn(f"rlkern_{name}")
    options = NEEDED[name]
    monkeypatch.setenv("RLKERN_OBJECTIVE", json.dumps(options))
    scaled = {"loss_scale_factor": 1.0} if "loss_scale_factor" in PRESETS[name].required else {}
    if name == "kl_cov":
        options = {"ppo_kl_coef": 1.0}
    ours = PolicyObjective.preset(name, **options, **scaled)
    lacking = {
        "entropy": ours.needs_entropy,
        "ref_logprob": ours.needs_reference,
        "nll_weight": ours.nll_coef != 0,
        "cu_segments": ours.importance_sampling_level == "segment",
        "rollout_logprob": ours.rollout_is is not None or ours.rollout_rs is not None,
    }
    if missing := [what for what, lacks in lacking.items() if lacks]:
        with pytest.raises(ValueError, match=f"got {name!r}, which needs {missing[0]}: "):
            called(function, batch, "token-mean", config)
        return
    got, metrics, grad = called(function, batch, "seq-mean-token-mean", config)
    aggregation = {"loss_agg_mode": "seq-mean-token-mean", "loss_scale_factor": None}
    aggregation["count_empty"] = ours.count_empty
    ours = PolicyObjective.preset(name, **options, **aggregation)
    want, want_metrics, want_grad = batch.ours(
        ours, rollout_logprob=batch.old if ours.needs_rollout else None
    )
    assert metrics["actor/ppo_kl"] == pytest.approx(want_metrics["ppo_kl"].item())
    parity(
        "integrations",
        f"verl rlkern_{name}",
        "seq-mean-token-mean: rlkern.policy_loss",
        rlkern=f"loss_mode='rlkern_{name}', {options}" if options else f"loss_mode='rlkern_{name}'",
        value=distance(got, want),
        gradient=relative(grad, want_grad),
        budget=BUDGET[torch.float32],
    )


def test_options_that_a_user_has_set_stand_over_the_preset(monkeypatch):
    batch = Batch(LENGTHS)
    function = core_algos.get_policy_loss_fn("rlkern_dapo")
    cases = [
        (actor(), {}),
        (actor(clip_ratio_high=0.35), {"epsilon_high": 0.35}),
        (actor(clip_ratio=0.1), {"epsilon_low": 0.1, "epsilon_high": 0.1}),
        (actor(clip_ratio=0.1, clip_ratio_low=0.05), {"epsilon_low": 0.05, "epsilon_high": 0.1}),
        (actor(clip_ratio_c=1.05), {"clip_ratio_c": 1.05}),
    ]
    losses = set()
    for config, options in cases:
        got, *_ = called(function, batch, "token-mean", config)
        want, *_ = batch.ours(PolicyObjective.preset("dapo", **options))
        assert torch.equal(got, want)
        losses.add(got.item())
    assert len(losses) == len(cases)
    monkeypatch.setenv("RLKERN_OBJECTIVE", '{"epsilon_high": 0.4}')
    got, *_ = called(function, batch, "token-mean", actor(clip_ratio_high=0.35))
    assert torch.equal(got, batch.ours(PolicyObjective.preset("dapo", epsilon_high=0.4))[0])
    monkeypatch.setenv("RLKERN_OBJECTIVE", "[1]")
    with pytest.raises(ValueError, match=r"RLKERN_OBJECTIVE to be a JSON object, got '\[1\]'"):
        called(function, batch, "token-mean", actor())


def test_weights_are_refused_where_the_loss_is_not_linear(monkeypatch):
    monkeypatch.setenv("RLKERN_OBJECTIVE", '{"dro_beta": 0.3}')
    batch = Batch(LENGTHS)
    function = core_algos.get_policy_loss_fn("rlkern_dro")
    with pytest.raises(ValueError, match="weights of tokens to be None with 'regression'"):
        called(function, batch, "token-mean", actor(), torch.ones_like(batch.old))


def test_counts_of_the_batch_are_asked_for_with_several_ranks():
    config = actor()
    config.global_batch_info["dp_size"] = 2
    function = core_algos.get_policy_loss_fn("rlkern_dapo")
    with pytest.raises(ValueError, match="expected batch_num_tokens with dp_size 2, got None"):
        called(function, Batch(LENGTHS), "token-mean", config)


# --- advantages -----------------------------------------------------------------------------------

GROUPS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 1, 0, 2, 2])
KIND_OPTIONS = {
    "w_reinforce": {"positive_weight": 0.2},
    "noisy_backward": {"false_positive_rate": 0.1, "false_negative_rate": 0.2},
    "noisy_forward": {"false_negative_rate": 0.2},
    "grpo_lambda": {"fraction": 0.5, "alpha": 0.1},
}


@pytest.mark.parametrize("kind", integration.served_kinds())
def test_every_kind_is_an_estimator(kind, monkeypatch):
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (12,), generator=random)
    mask = (torch.arange(8) < lengths[:, None]).float()
    rewards = torch.rand(12, generator=random)
    token_rewards = torch.zeros(12, 8)
    token_rewards[torch.arange(12), lengths - 1] = rewards
    options = KIND_OPTIONS.get(kind, {})
    monkeypatch.setenv("RLKERN_ADVANTAGE", json.dumps({kind: options}))
    inputs = {}
    if "lengths" in INPUTS[kind]:
        inputs["lengths"] = lengths
    if "reward_baselines" in INPUTS[kind]:
        inputs["reward_baselines"] = torch.rand(12, generator=random)
    want = rlkern.group_advantage(rewards, GROUPS, kind=kind, **inputs, **options)
    more = {"reward_baselines": inputs.get("reward_baselines")} if inputs else {}
    got, returns = core_algos.get_adv_estimator_fn(f"rlkern_{kind}")(
        token_level_rewards=token_rewards,
        response_mask=mask,
        config=None,
        index=np.array([f"prompt-{i}" for i in GROUPS.tolist()]),
        **more,
    )
    assert want.abs().max() > 0
    assert returns is got
    assert distance(got, want[:, None] * mask) <= BUDGET[torch.float32]


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_of_a_model(dtype, parity):
    """A tiny Qwen3 patched by verl: ours, verl's torch backend, and float64."""
    import transformers
    from verl.models.transformers import dense_common

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=503,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight *= 20
    model.to(dtype)
    ids = torch.randint(503, (2, 17))
    up = torch.linspace(-1, 1, ids.numel()).view(ids.shape)

    def run(forward):
        model.zero_grad()
        out = forward(model, input_ids=ids, temperature=0.7, return_dict=True)
        shape = ids.shape
        logprob, entropy = out.log_probs.view(shape), out.entropy.view(shape)
        (logprob * up - entropy * up.flip(0)).sum().backward()
        return logprob.detach(), entropy.detach(), model.lm_head.weight.grad.clone()

    ours = run(dense_common.forward_with_torch_backend)
    cross = run(dense_common.forward_with_triton_backend)
    assert all(torch.equal(x, y) for x, y in zip(ours, cross))
    assert ours[0].dtype == ours[1].dtype == torch.float32
    integration.HANDLE.disable()
    theirs = run(dense_common.forward_with_torch_backend)
    integration.HANDLE = integration.enable()
    values = max(distance(x, y) for x, y in zip(ours[:2], theirs[:2]))
    exact = dtype == torch.float32
    parity(
        "integrations",
        "verl FusedLinearForPPO",
        f"forward_with_torch_backend of a tiny Qwen3, {str(dtype).removeprefix('torch.')}",
        rlkern="VERL_USE_EXTERNAL_MODULES=rlkern.integrations.verl",
        value=values,
        gradient=relative(ours[2], theirs[2]),
        budget=2e-5 if exact else 0.05,
        gradient_budget=2e-5 if exact else 0.05,
        note="" if exact else "verl rounds its logits to bfloat16",
    )


def test_temperatures_of_tokens_and_other_reductions():
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    ids = torch.randint(11, (2, 5))
    each = torch.rand(2, 5) + 0.5
    logprob, entropy = integration.FusedLinearForPPO()(hidden, weight, ids, each)
    want = ((hidden @ weight.T) / each[..., None]).log_softmax(-1)
    assert distance(logprob, want.gather(-1, ids[..., None])[..., 0]) < 1e-5
    assert distance(entropy, -(want.exp() * want).sum(-1)) < 1e-5
    with pytest.raises(ValueError, match="expected reduction 'none', got 'mean'"):
        integration.linear_cross_entropy(hidden, weight, ids, 1.0, "mean")


# --- verl's own tests -----------------------------------------------------------------------------

SUITES = (
    "test_core_algos_on_cpu",
    "test_dynamic_policy_losses_on_cpu",
    "test_loss_aggregation_on_cpu",
    "test_rollout_corr",
    "test_rollout_corr_integration",
    "test_value_loss_normalization_on_cpu",
    "test_reinforce_pp_multiturn_on_cpu",
)


# of ours, which those tests call
EXERCISED = {"vanilla", "dro", "grpo_vectorized", "rloo", "rloo_vectorized"}


def test_verls_published_tests(tmp_path):
    """Its source distribution, which `make test-peers` unpacks, with ours under verl's names."""
    found = sorted((ROOT / ".venv-peers").glob("verl-0.9.1/tests/trainer/ppo"))
    found += [Path(p) for p in (os.environ.get("VERL_TESTS"),) if p]
    if not found:
        pytest.skip("no .venv-peers/verl-0.9.1: make test-peers")
    here = Path(__file__).parent
    calls = tmp_path / "calls.json"
    env = os.environ | {"RLKERN_CALLS": str(calls)}
    env["PYTHONPATH"] = f"{ROOT}:{here}:{env.get('PYTHONPATH', '')}"
    files = [str(found[0] / f"{name}.py") for name in SUITES]
    options = ["-p", "verl_plugin", "-p", "no:cacheprovider", "-q", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(found[0]), *files],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 92
    assert "failed" not in done.stdout
    counts = json.loads(calls.read_text())
    assert {name for name, count in counts.items() if count} == EXERCISED, counts
