"""Adapters to trainers that are not installed: recorded signatures, formulas written out again."""

import json
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from integrations.stubs import LENGTHS, Batch, assert_same, clipped, install

import rlkern
from rlkern.integrations import areal, nemo_rl, openrlhf, prime_rl, skyrl, slime, torchtitan
from rlkern.ops.policy_loss.presets import PRESETS


def dense(logits, ids, temperature=1.0):
    """log-prob and entropy."""
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


# --- prime-rl -------------------------------------------------------------------------------------

LossInputs = namedtuple(
    "LossInputs",
    "trainer_logprobs inference_logprobs ref_logprobs advantages loss_mask loss_weights",
)
LossOutputs = namedtuple("LossOutputs", "loss metrics")


@pytest.fixture
def prime(monkeypatch):
    install(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)


def sample(batch, row, weights=None):
    leaf = batch.logprob[row].clone().requires_grad_()
    rest = (batch.rollout[row], None, batch.advantages[row], batch.mask[row], weights)
    return leaf, LossInputs(leaf, *rest)


@pytest.mark.parametrize("row", [0, 1, 3])
def test_prime_rls_default_loss(row, prime):
    """DPPO-TV with a squared log-ratio: the same gradient (their value is -M A r)."""
    leaf, inputs = sample(Batch(), row)
    got = prime_rl.loss(inputs)
    x = leaf - inputs.inference_logprobs
    gap = leaf.exp() - inputs.inference_logprobs.exp()
    moved = torch.where(inputs.advantages > 0, gap > 0.2, gap < -0.2)
    want = (inputs.loss_mask * (~moved * -inputs.advantages * x.exp() + 1e-3 * x**2)).sum()
    (mine,), (theirs,) = (torch.autograd.grad(v, leaf) for v in (got.loss, want))
    assert theirs.abs().max() > 0
    assert (mine - theirs).abs().max() < 1e-9
    assert got.metrics["num_tokens"] == inputs.loss_mask.sum()


def test_any_objective_in_prime_rl(prime):
    batch = Batch()
    leaf, inputs = sample(batch, 0, torch.rand(9, dtype=torch.float64))
    got = prime_rl.loss(inputs, objective="dapo", epsilon_high=0.1)
    tokens = clipped(leaf, inputs.inference_logprobs, inputs.advantages, 0.2, 0.1)
    assert_same(got.loss, (tokens * inputs.loss_mask * inputs.loss_weights).sum(), leaf)
    with pytest.raises(ValueError, match="loss_weights to be None with 'prime_rl', whose KL"):
        prime_rl.loss(inputs)
    with pytest.raises(ValueError, match="got 'grpo', which needs ref_logprob"):
        prime_rl.loss(inputs, objective="grpo", kl_coef=0.1)


def test_prime_rls_head(monkeypatch):
    class _SequenceChunkedLogProbEntropyFn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size):
            raise AssertionError("replaced")

    path = "prime_rl.trainer.models.layers.lm_head"
    name = "_SequenceChunkedLogProbEntropyFn"
    module = install(monkeypatch, path, **{name: _SequenceChunkedLogProbEntropyFn})
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(23, 8)
    labels, inverse = torch.randint(23, (11,)), torch.rand(11) + 0.5
    with prime_rl.enable():
        got = getattr(module, name).apply(hidden, weight, labels, inverse, 4)
    assert getattr(module, name) is _SequenceChunkedLogProbEntropyFn
    want = dense(hidden @ weight.T * inverse[:, None], labels)
    for mine, theirs in zip(got, want):
        assert (mine - theirs).abs().max() < 1e-5


# --- slime ----------------------------------------------------------------------------------------


def slime_args(**options):
    defaults = {
        "eps_clip": 0.2,
        "eps_clip_high": 0.2,
        "eps_clip_c": None,
        "use_kl_loss": False,
        "use_rollout_logprobs": False,
        "entropy_coef": 0.0,
    }
    return SimpleNamespace(**(defaults | options))


def slime_batch(monkeypatch, batch):
    """Ragged lists, as slime's micro-batches, and its log-probs as given."""
    leaf = batch.leaf()

    def ragged(x):
        return [row[:n] for row, n in zip(x, batch.lengths)]

    def get_log_probs_and_entropy(
        logits,
        *,
        args,
        unconcat_tokens,
        total_lengths,
        response_lengths,
        with_entropy=False,
        non_loss_data=True,
        top_p_token_ids=None,
        top_p_token_offsets=None,
    ):
        return None, {"log_probs": ragged(leaf), "entropy": ragged(leaf.exp())}

    install(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )
    masks = [m.float() for m in ragged(batch.mask)]
    return leaf, {
        "advantages": ragged(batch.advantages),
        "log_probs": ragged(batch.old),
        "rollout_log_probs": ragged(batch.rollout),
        "loss_masks": masks,
        "unconcat_tokens": None,
        "total_lengths": [n + 2 for n in batch.lengths],
        "response_lengths": batch.lengths,
    }


def reducer(masks, lengths, denominators):
    """slime's sum of sample means."""

    def reduce(x):
        parts = zip(x.split(lengths), masks, denominators)
        return sum((row * m).sum() / max(d, 1) for row, m, d in parts)

    return reduce


@pytest.mark.parametrize("how", ["per sample", "per rollout", "per token"])
def test_slimes_policy_loss(how, monkeypatch):
    batch = Batch()
    leaf, inputs = slime_batch(monkeypatch, batch)
    sums = [m.sum().item() for m in inputs["loss_masks"]]
    denominators = {
        "per sample": sums,
        "per rollout": [sum(sums[:2])] * 2 + [sum(sums[2:])] * 3,
        "per token": [1.0] * 5,
    }[how]
    reduce = reducer(inputs["loss_masks"], batch.lengths, denominators)
    monkeypatch.setenv("RLKERN_OBJECTIVE", json.dumps({"preset": "grpo"}))
    args = slime_args(eps_clip=0.1, eps_clip_high=0.3, eps_clip_c=1.6, entropy_coef=0.01)
    got, logged = slime.policy_loss(args, inputs, leaf, reduce)
    tokens = clipped(leaf, batch.old, batch.advantages, 0.1, 0.3, 1.6)
    packed = [torch.cat([r[:n] for r, n in zip(x, batch.lengths)]) for x in (tokens, leaf.exp())]
    assert_same(got, reduce(packed[0]) - 0.01 * reduce(packed[1]), leaf)
    assert not logged["loss"].requires_grad
    assert logged["pg_loss"].item() == pytest.approx(reduce(packed[0]).item())


def test_slimes_other_presets_and_refusals(monkeypatch):
    batch = Batch()
    leaf, inputs = slime_batch(monkeypatch, batch)
    reduce = reducer(inputs["loss_masks"], batch.lengths, [1.0] * 5)
    monkeypatch.setenv("RLKERN_OBJECTIVE", '{"preset": "minpro", "cispo_max_ratio": 4.0}')
    got, _ = slime.policy_loss(slime_args(), inputs, leaf, reduce)
    objective = rlkern.PolicyObjective.preset(
        "minpro", cispo_max_ratio=4.0, loss_agg_mode="token-sum"
    )
    tensors = (leaf, batch.old, batch.advantages)
    want = rlkern.policy_loss(*tensors, mask=batch.mask, objective=objective).loss
    assert_same(got, want, leaf)
    with pytest.raises(ValueError, match="use_kl_loss to be False"):
        slime.policy_loss(slime_args(use_kl_loss=True), inputs, leaf, reduce)
    inputs["response_lengths"] = [n + 1 for n in LENGTHS]
    with pytest.raises(ValueError, match="of whole responses"):
        slime.policy_loss(slime_args(), inputs, leaf, reduce)


def test_slimes_rewards(monkeypatch):
    class Sample:
        def __init__(self, reward, group_index):
            self.reward, self.group_index = reward, group_index

        def get_reward_value(self, args):
            return self.reward

    rewards, groups = [1.0, 0.0, 0.5, 2.0, 1.0], [7, 7, 3, 3, 7]
    monkeypatch.setenv("RLKERN_ADVANTAGE", '{"kind": "rloo"}')
    raw, got = slime.group_rewards(None, [Sample(*x) for x in zip(rewards, groups)])
    assert raw == rewards
    assert got == pytest.approx([0.0 + 1 - 0.5, -1.0, -1.5, 1.5, 0.5])


# --- SkyRL ----------------------------------------------------------------------------------------


class Registry:
    def __init__(self, **held):
        self.held = held

    def register(self, name, func):
        if name in self.held:
            raise ValueError(f"{name} already registered")
        self.held[name] = func

    def unregister(self, name):
        del self.held[name]

    def list_available(self):
        return list(self.held)


def ppo_policy_loss(
    log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None
):
    raise AssertionError("theirs")


@pytest.fixture
def sky(monkeypatch):
    return install(
        monkeypatch,
        "skyrl.backends.skyrl_train.utils.ppo_utils",
        ppo_policy_loss=ppo_policy_loss,
        PolicyLossRegistry=Registry(regular=ppo_policy_loss),
        AdvantageEstimatorRegistry=Registry(grpo=None),
    )


def sky_config(**options):
    return SimpleNamespace(
        **({"eps_clip_low": 0.2, "eps_clip_high": 0.2, "clip_ratio_c": 3.0} | options)
    )


def test_skyrls_registries(sky):
    with skyrl.enable():
        losses = sky.PolicyLossRegistry.list_available()
        assert {f"rlkern_{name}" for name in PRESETS} < set(losses)
        assert "rlkern_rloo" in sky.AdvantageEstimatorRegistry.held
        assert not skyrl.enable().enabled
    assert sky.PolicyLossRegistry.list_available() == ["regular"]
    assert sky.AdvantageEstimatorRegistry.list_available() == ["grpo"]


def test_skyrls_losses_are_sums(sky):
    batch, leaf = Batch(), Batch().leaf()
    weights = batch.mask * torch.rand(batch.mask.shape, dtype=torch.float64)
    with skyrl.enable():
        function = sky.PolicyLossRegistry.held["rlkern_ppo"]
        config = sky_config(eps_clip_high=0.28, clip_ratio_c=1.6)
        got, metrics = function(leaf, batch.old, batch.advantages, config, weights, None)
        # SkyRL's dual clip, with the weights that stand in the mask
        tokens = clipped(leaf, batch.old, batch.advantages, 0.2, 0.28, 1.6)
        assert_same(got, (tokens * weights).sum(), leaf)
        assert set(metrics) == {"clip_ratio", "ppo_kl", "ratio_mean"}
        estimate = sky.AdvantageEstimatorRegistry.held["rlkern_rloo"]
        rewards = torch.zeros(4, 3)
        rewards[:, -1] = torch.tensor([1.0, 0.0, 3.0, 1.0])
        found, _ = estimate(
            token_level_rewards=rewards,
            response_mask=torch.ones(4, 3),
            index=np.array(["a", "a", "b", "b"]),
            values=None,
            grpo_norm_by_std=True,
            gamma=1.0,
            lambd=1.0,
            config=None,
        )
    assert found[:, 0].tolist() == [1.0, -1.0, 2.0, -2.0]


def test_what_skyrl_cannot_weigh_is_refused(monkeypatch):
    batch = Batch()
    call = (batch.logprob, batch.old, batch.advantages, sky_config(), batch.mask)
    with pytest.raises(ValueError, match="kl_coef to be 0 with 'prime_rl'"):
        skyrl.policy_loss("prime_rl", *call, batch.rollout)
    with pytest.raises(ValueError, match="got 'tis', which needs rollout_logprob"):
        skyrl.policy_loss("tis", *call, None)
    monkeypatch.setenv("RLKERN_OBJECTIVE", '{"dro_beta": 0.1}')
    with pytest.raises(ValueError, match="weights of tokens to be None with 'regression'"):
        skyrl.policy_loss("dro", *call, batch.rollout)


# --- torchtitan -----------------------------------------------------------------------------------


class DAPOLoss:
    def __call__(
        self,
        logits,
        labels,
        global_valid_tokens=None,
        *,
        generator_logprobs,
        advantages,
        loss_mask,
    ):
        raise AssertionError("theirs")


class BaseLoss:
    from dataclasses import dataclass

    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


def compute_logprobs(logits, labels, *, return_entropy=False):
    raise AssertionError("theirs")


def test_torchtitans_loss(monkeypatch):
    install(
        monkeypatch,
        "torchtitan.components.loss",
        BaseLoss=BaseLoss,
        compute_logprobs=compute_logprobs,
    )
    install(monkeypatch, "torchtitan.experiments.rl.losses.dapo", DAPOLoss=DAPOLoss)
    cls = torchtitan.policy_loss_class()
    loss = cls(cls.Config(objective="dapo"))
    tokens, vocab = 19, 31
    logits = torch.randn(tokens, vocab, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    advantages = torch.randn(tokens, dtype=torch.float64)
    logprob, entropy = dense(logits, labels)
    sampled = logprob.detach() + 0.3 * torch.randn(tokens, dtype=torch.float64)
    sampled[4] = float("nan")
    mask = torch.rand(tokens) < 0.8
    mask[4] = True
    got, metrics = loss(
        *(logits, labels, 40.0),
        generator_logprobs=sampled,
        advantages=advantages,
        loss_mask=mask,
    )
    counted = mask & sampled.isfinite()
    tokens = clipped(logprob, torch.where(counted, sampled, 0.0), advantages, 0.2, 0.28)
    assert_same(got, torch.where(counted, tokens, 0.0).sum() / 40, logits)
    want = torch.where(counted, entropy, 0.0).sum().item() / 40
    assert metrics["trainer/entropy/mean"].item() == pytest.approx(want, rel=1e-5)
    assert metrics["loss/mean"].item() == pytest.approx(got.item())
    with pytest.raises(ValueError, match="torchtitan passes no bounds"):
        cls(cls.Config(objective="gspo"))


# --- OpenRLHF -------------------------------------------------------------------------------------


def openrlhf_modules(monkeypatch):
    def log_probs_from_logits(logits, labels, temperature=1.0):
        raise AssertionError("theirs")

    def compute_entropy(logits):
        raise AssertionError("theirs")

    class PolicyLoss:
        def __init__(
            self,
            clip_eps_low=0.2,
            clip_eps_high=0.2,
            dual_clip=None,
            token_level_loss=True,
            policy_loss_type="ppo",
            enable_vllm_is_correction=False,
            vllm_is_truncated_threshold=None,
            vllm_is_correction_type="tis",
        ):
            pass

        def forward(
            self,
            log_probs,
            old_log_probs,
            advantages,
            action_mask=None,
            rollout_log_probs=None,
            dp_size=1,
            batch_num_tokens=None,
            global_batch_size=None,
        ):
            pass

    both = {"log_probs_from_logits": log_probs_from_logits, "compute_entropy": compute_entropy}
    install(monkeypatch, "openrlhf.models.utils", **both)
    install(monkeypatch, "openrlhf.models.loss", PolicyLoss=PolicyLoss)
    actor = install(monkeypatch, "openrlhf.models.actor", **both)
    trainer = install(monkeypatch, "openrlhf.trainer.ray.ppo_actor", PolicyLoss=PolicyLoss)
    return actor, trainer, both, PolicyLoss


def test_openrlhfs_names_are_replaced_where_they_were_imported(monkeypatch):
    actor, trainer, theirs, their_loss = openrlhf_modules(monkeypatch)
    logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    with openrlhf.enable("minpro", cispo_max_ratio=4.0):
        kept = logits.clone()
        logprob, _ = dense(logits, labels, 0.7)
        _, entropy = dense(logits, labels)
        found = actor.log_probs_from_logits(logits, labels, temperature=0.7)
        assert (found - logprob).abs().max() < 1e-6
        assert (actor.compute_entropy(logits) - entropy).abs().max() < 1e-6
        assert torch.equal(logits, kept)
        assert openrlhf.enable() is openrlhf.enable()
        made = trainer.PolicyLoss(clip_eps_low=0.1, clip_eps_high=0.2, dual_clip=None)
        assert made.objective.cispo_max_ratio == 4.0
        assert made.objective.loss_agg_mode == "token-mean"
    assert actor.log_probs_from_logits is theirs["log_probs_from_logits"]
    assert trainer.PolicyLoss is their_loss


OPENRLHF = {
    "ppo": {},
    "dual clip": {"dual_clip": 1.6},
    "per sequence": {"token_level_loss": False},
    "tis": {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [0.8, 1.2]},
    "icepop": {
        "enable_vllm_is_correction": True,
        "vllm_is_truncated_threshold": [0.8, 1.2],
        "vllm_is_correction_type": "icepop",
    },
    "gspo": {"policy_loss_type": "gspo", "clip_eps_low": 0.02, "clip_eps_high": 0.03},
    "gspo, rollout": {
        "policy_loss_type": "gspo",
        "enable_vllm_is_correction": True,
        "vllm_is_truncated_threshold": [0.8, 1.2],
    },
}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("name", OPENRLHF)
def test_openrlhfs_policy_loss(name, counts):
    options = OPENRLHF[name]
    batch, leaf = Batch(empty=True), Batch(empty=True).leaf()
    made = openrlhf.PolicyLoss(**options)
    more = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 11.0} if counts else {}
    got, clip_ratio, ppo_kl, vllm_kl = made(
        leaf, batch.old, batch.advantages, batch.mask.long(), batch.rollout, **more
    )
    gspo, corrects = "gspo" in name, "vllm_is_truncated_threshold" in options
    tokens = clipped(
        *(leaf, batch.rollout if gspo and corrects else batch.old, batch.advantages),
        *(options.get("clip_eps_low", 0.2), options.get("clip_eps_high", 0.2)),
        options.get("dual_clip"),
        "sequence" if gspo else None,
        batch.mask,
    )
    if corrects and not gspo:
        w = (batch.old - batch.rollout).exp()
        inside = (w >= 0.8) & (w <= 1.2)
        tokens = tokens * (w * inside if name == "icepop" else w.clamp(0.8, 1.2))
    summed = tokens * batch.mask
    if gspo or name == "per sequence":
        rows = summed.sum(-1) / batch.mask.sum(-1).clamp(min=1)
        want = rows.sum() / (11 / 2 if counts else (batch.mask.sum(-1) > 0).sum())
    else:
        want = summed.sum() / (50 / 2 if counts else batch.mask.sum())
    assert_same(got, want, leaf)
    assert (vllm_kl is None) == (gspo or not corrects)
    assert clip_ratio >= 0
    gap = (batch.old - leaf.detach())[batch.mask].mean()
    if name != "gspo, rollout":
        assert ppo_kl.item() == pytest.approx(gap.item(), rel=1e-5)


def test_openrlhfs_unbounded_mask_is_refused():
    """seq-mask-tis is a mean of ratios that decides, and token ratios that weigh."""
    with pytest.raises(ValueError, match="vllm_is_correction_type to be one of icepop, tis, got"):
        openrlhf.PolicyLoss(
            enable_vllm_is_correction=True,
            vllm_is_truncated_threshold=[0.5, 2],
            vllm_is_correction_type="seq-mask-tis",
        )


# --- AReaL ----------------------------------------------------------------------------------------


def test_areals_functions_are_replaced_where_they_were_imported(monkeypatch):
    def gather_logprobs(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024):
        raise AssertionError("theirs")

    def gather_logprobs_entropy(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024):
        raise AssertionError("theirs")

    def ppo_actor_loss_fn(
        logprobs,
        proximal_logprobs,
        old_logprobs,
        advantages,
        eps_clip,
        loss_mask,
        eps_clip_higher=None,
        c_clip=None,
        rejection_sampling=None,
        importance_sampling_level="token",
        cu_seqlens=None,
    ):
        return "theirs"

    both = {"gather_logprobs": gather_logprobs, "gather_logprobs_entropy": gather_logprobs_entropy}
    install(monkeypatch, "areal.utils.functional.vocab_parallel", **both)
    path = "areal.utils.functional.functional"
    install(monkeypatch, path, ppo_actor_loss_fn=ppo_actor_loss_fn)
    engine = install(monkeypatch, "areal.engine.fsdp_engine", **both)
    actor = install(monkeypatch, "areal.trainer.ppo.actor", ppo_actor_loss_fn=ppo_actor_loss_fn)
    logits, labels = torch.randn(9, 11), torch.randint(11, (9,))
    batch = Batch()
    with areal.enable():
        want = dense(logits, labels, 0.7)
        assert (engine.gather_logprobs(logits, labels, 0.7) - want[0]).abs().max() < 1e-6
        for got, theirs in zip(engine.gather_logprobs_entropy(logits, labels, 0.7), want):
            assert (got - theirs).abs().max() < 1e-6
        call = {
            "logprobs": batch.logprob,
            "proximal_logprobs": batch.old,
            "old_logprobs": batch.rollout,
            "advantages": batch.advantages,
            "eps_clip": 0.2,
            "loss_mask": batch.mask,
        }
        loss, stat = actor.ppo_actor_loss_fn(**call)
        assert loss.isfinite()
        assert stat["loss"].shape == batch.mask.shape
        assert actor.ppo_actor_loss_fn(**call, rejection_sampling=object()) == "theirs"
    assert engine.gather_logprobs is gather_logprobs
    assert actor.ppo_actor_loss_fn is ppo_actor_loss_fn


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_areals_actor_loss(level, packed):
    batch, leaf = Batch(), Batch().leaf()
    tensors, more = (leaf, batch.old, batch.rollout, batch.advantages), {}
    mask = batch.mask
    if packed:
        tensors = [torch.cat([r[:n] for r, n in zip(x, LENGTHS)]) for x in tensors]
        mask = torch.cat([r[:n] for r, n in zip(mask, LENGTHS)])
        more = {"cu_seqlens": torch.tensor([0, *np.cumsum(LENGTHS)])}
    got, stat = areal.ppo_actor_loss_fn(
        *(*tensors, 0.1, mask),
        eps_clip_higher=0.3,
        c_clip=1.6,
        importance_sampling_level=level,
        **more,
    )
    tokens = clipped(
        *(leaf, batch.old, batch.advantages, 0.1, 0.3, 1.6),
        level if level == "sequence" else None,
        batch.mask,
    )
    assert_same(got, torch.where(batch.mask, tokens, 0.0).sum() / batch.mask.sum(), leaf)
    ratio = (leaf - batch.old).detach().exp()
    assert (
        stat["clip_mask"].sum()
        == (torch.where(batch.advantages > 0, ratio > 1.3, ratio < 0.9) & batch.mask).sum()
    )
    assert (
        stat["dual_clip_mask"].sum() == ((ratio > 1.6) & (batch.advantages < 0) & batch.mask).sum()
    )
    got, _ = areal.ppo_actor_loss_fn(*tensors, 0.1, mask, objective="decoupled_ppo", **more)
    weights = (batch.old - batch.rollout).exp()
    tokens = clipped(leaf, batch.old, batch.advantages) * weights
    assert_same(got, torch.where(batch.mask, tokens, 0.0).sum() / batch.mask.sum(), leaf)


# --- NeMo-RL --------------------------------------------------------------------------------------


class ClippedPGLossFn:
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        raise AssertionError("theirs")


@pytest.mark.parametrize("objective", ["dapo", "grpo"])
def test_nemo_rls_loss(objective, monkeypatch):
    kinds = SimpleNamespace(TOKEN_LEVEL="token_level", SEQUENCE_LEVEL="sequence_level")
    interfaces = "nemo_rl.algorithms.loss.interfaces"
    install(
        monkeypatch, interfaces, LossType=kinds, LossInputType=SimpleNamespace(LOGPROB="logprob")
    )
    path = "nemo_rl.algorithms.loss.loss_functions"
    install(monkeypatch, path, ClippedPGLossFn=ClippedPGLossFn)
    made = nemo_rl.policy_loss_fn(objective, kl_coef=0.04)
    assert made.loss_type == ("token_level" if objective == "dapo" else "sequence_level")
    assert made.input_type == "logprob"
    batch, leaf = Batch(), Batch().leaf()

    def shifted(x):
        return torch.cat([torch.full_like(x[:, :1], 1), x], 1)

    sample_mask = torch.tensor([1, 1, 0, 1, 1.0])
    data = {
        "prev_logprobs": shifted(batch.old),
        "generation_logprobs": shifted(batch.rollout),
        "reference_policy_logprobs": shifted(batch.ref),
        "advantages": shifted(batch.advantages),
        "token_mask": shifted(batch.mask.float()),
        "sample_mask": sample_mask,
    }
    got, metrics = made(leaf, data, torch.tensor(9.0), torch.tensor(60.0))
    mask = batch.mask * sample_mask[:, None]
    d = batch.ref - leaf
    high = 0.28 if objective == "dapo" else 0.2
    tokens = clipped(leaf, batch.old, batch.advantages, 0.2, high) + 0.04 * (d.exp() - d - 1)
    if objective == "dapo":
        want = (tokens * mask).sum() / 60
    else:
        want = ((tokens * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum() / 9
    assert_same(got, want, leaf)
    assert metrics["loss"] == pytest.approx(want.item())
    assert metrics["num_valid_samples"] == 4


# --- what is not there ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (prime_rl.enable, "prime-rl"),
        (skyrl.enable, "skyrl"),
        (torchtitan.policy_loss_class, "torchtitan"),
        (openrlhf.enable, "openrlhf"),
        (areal.enable, "areal"),
        (nemo_rl.policy_loss_fn, "nemo-rl"),
    ],
)
def test_a_missing_package_is_named(call, package):
    with pytest.raises(RuntimeError, match=f"needs {package} as of .*pip install {package}"):
        call()


def test_another_signature_is_refused(sky):
    def ppo_policy_loss(log_probs, old_log_probs, advantages):
        return None

    sky.ppo_policy_loss = ppo_policy_loss
    wanted = (
        r"ppo_policy_loss\(log_probs, .*, rollout_logprobs\) as in skyrl as of August 2026, got"
    )
    with pytest.raises(RuntimeError, match=wanted):
        skyrl.enable()
    assert sky.PolicyLossRegistry.list_available() == ["regular"]
