"""TRL's GRPOTrainer: its loss and advantages, and a run with linear_logprob behind its LM head."""

import logging
import random

import pytest
import torch
from peers.compare import BUDGET, DTYPES, HORIZON, Batch, describe, distance, relative

pytest.importorskip("trl")

import datasets
import tokenizers
import transformers
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

import rlkern
from rlkern import PolicyObjective
from rlkern.integrations import trl as integration

WORDS = [f"w{i}" for i in range(40)]
# a completion of zero tokens counts in TRL's means over sequences
LENGTHS = (17, 5, 0, 24, 11, 8)


@pytest.fixture(autouse=True)
def _quiet(_poisoned_empty, monkeypatch):
    """TRL's own torch.empty is its own affair, and so are its progress bars."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    monkeypatch.setattr(logging.getLogger("trl"), "disabled", True)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


# what each does to its logits before the softmax
MODELS = {
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "Granite": {"logits_scaling": 0.25},
    "Phi": {},
}


def tiny_model(tokenizer, name: str = "Qwen3") -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        name.lower(),
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        **MODELS[name],
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def even_words(completion_ids, **_) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / (1 + len(ids)) for ids in completion_ids]


def trainer(
    folder, cls=GRPOTrainer, reward=even_words, model: str = "Qwen3", **options
) -> GRPOTrainer:
    chosen = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
        # at three times as much Adam makes 1e-3 out of the rounding of 20 steps
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": HORIZON,
    }
    tokenizer = tiny_tokenizer()
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=5)) for _ in range(16)]
    return cls(
        model=tiny_model(tokenizer, model),
        reward_funcs=reward,
        args=GRPOConfig(**(chosen | options)),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


# --- the loss: _compute_loss of a trainer that is given log-probs ------------------------------


class GivenLogprobs(GRPOTrainer):
    """The model's forward replaced by leaves; everything after it is TRL's."""

    def give(self, logprob: torch.Tensor, entropy: torch.Tensor) -> None:
        self.given = (logprob, entropy, None)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.given


class GivenLogprobsGMPO(GivenLogprobs, GMPOTrainer):
    """The same of TRL's experimental GMPO, whose loss is its own."""

    _compute_loss = GMPOTrainer._compute_loss


def theirs(
    folder,
    batch: Batch,
    beta: float = 0.0,
    items: int | None = None,
    more=None,
    cls=GivenLogprobs,
    **options,
) -> tuple:
    made = trainer(folder, cls=cls, **options)
    # as an option it loads a reference model by the hub name of the first one, which has none
    made.beta = beta
    # training mode would divide by the steps of gradient accumulation
    made.model.eval()
    logprob = batch.logprob.clone().requires_grad_()
    entropy = batch.entropy.clone().requires_grad_()
    made.give(logprob, entropy)
    rows, columns = logprob.shape
    loss = made._compute_loss(
        made.model,
        {
            "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
            "completion_ids": torch.zeros(rows, columns, dtype=torch.long),
            "completion_mask": batch.mask.long(),
            "advantages": batch.advantages,
            "old_per_token_logps": batch.old,
            "ref_per_token_logps": batch.ref,
            "num_items_in_batch": batch.mask.sum() if items is None else torch.tensor(items),
            **(more or {}),
        },
    )
    metrics = {name: values[-1] for name, values in made._metrics["eval"].items()}
    grads = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
    return loss.detach(), metrics, grads


# what TRL has no option for, in every row
ALWAYS = {"log_ratio_clamp": None, "kl_input_clamp_value": None}
PER_SEQUENCE = {"loss_agg_mode": "seq-mean-token-mean", "count_empty": True}
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
OUR_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}
NORMED = {
    "loss_agg_mode": "seq-mean-token-sum-norm",
    "loss_scale_factor": HORIZON,
    "count_empty": True,
}
SEQUENCE = {"importance_sampling_level": "sequence"}
FINE = {"epsilon": 0.02, "epsilon_high": 0.03}
OUR_FINE = {"epsilon_low": 0.02, "epsilon_high": 0.03}
# its default multiplies the KL by the ratio, whose gradient then flows through both
PLAIN_KL = {"beta": 0.04, "use_bias_correction_kl": False}
# name -> TRL's options, ours; `items` is the count of the generation batch
LOSSES = {
    "grpo": ({"loss_type": "grpo", **CLIP}, PER_SEQUENCE | OUR_CLIP),
    "bnpo": ({"loss_type": "bnpo", **CLIP}, OUR_CLIP),
    "dr_grpo": ({"loss_type": "dr_grpo", **CLIP}, NORMED | OUR_CLIP),
    "dapo": ({"loss_type": "dapo", **CLIP}, OUR_CLIP),
    "dapo, global count": ({"loss_type": "dapo", "items": 301, **CLIP}, OUR_CLIP),
    # its epsilon_high is a ratio, not an offset; there is no lower bound
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {
            "surrogate": "detached",
            "epsilon_low": None,
            "epsilon_high": None,
            "cispo_max_ratio": 1.3,
        },
    ),
    "grpo, delta": ({"loss_type": "grpo", "delta": 1.5, **CLIP}, PER_SEQUENCE | OUR_CLIP),
    "dapo, delta below the clip": ({"loss_type": "dapo", "delta": 1.1, **CLIP}, OUR_CLIP),
    "gspo": ({"loss_type": "grpo", **SEQUENCE, **FINE}, PER_SEQUENCE | OUR_FINE | SEQUENCE),
    "gspo, dapo": ({"loss_type": "dapo", **SEQUENCE, **FINE}, OUR_FINE | SEQUENCE),
    "gspo, dr_grpo": ({"loss_type": "dr_grpo", **SEQUENCE, **FINE}, NORMED | OUR_FINE | SEQUENCE),
    "grpo, beta": ({"loss_type": "grpo", **PLAIN_KL, **CLIP}, PER_SEQUENCE | OUR_CLIP),
    "dapo, beta": ({"loss_type": "dapo", **PLAIN_KL, **CLIP}, OUR_CLIP),
    # its entropy bonus is a mean over tokens whatever the loss type
    "bnpo, entropy_coef": ({"loss_type": "bnpo", "entropy_coef": 0.01, **CLIP}, OUR_CLIP),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(name, dtype, tmp_path, parity):
    options, mine = LOSSES[name]
    batch = Batch(LENGTHS, dtype=dtype)
    want, want_metrics, (want_grad, want_entropy) = theirs(tmp_path, batch, **options)
    ours = PolicyObjective(
        **(
            ALWAYS
            | mine
            | {"delta": options.get("delta"), "kl_coef": options.get("beta", 0.0)}
            | {"entropy_coef": options.get("entropy_coef", 0.0)}
        )
    )
    inputs = {"ref_logprob": batch.ref} if "beta" in options else {}
    if "entropy_coef" in options:
        inputs["entropy"] = batch.entropy
    more = {"normalizer": options["items"]} if "items" in options else {}
    loss, metrics, grad = batch.ours(ours, **inputs, **more)
    parity(
        "policy loss",
        f"TRL {name}",
        str(dtype).removeprefix("torch."),
        rlkern=describe(ours, **more),
        value=distance(loss, want),
        gradient=relative(grad, want_grad),
        budget=BUDGET[dtype],
    )
    if "entropy_coef" in options:
        assert (want_entropy != 0).any()
    if "sequence" not in options.values() and options["loss_type"] != "cispo":
        # with delta TRL counts ratios that were cut to delta before
        for kind in ("low", "high") if "delta" not in options else ():
            key = f"clip_ratio/{kind}_mean"
            assert want_metrics[key] > 0
            assert metrics[key].item() == pytest.approx(want_metrics[key], abs=1e-6)
    if "beta" in options:
        assert metrics["kl"].item() == pytest.approx(want_metrics["kl"], rel=1e-5)


def test_the_entropy_bonus_of_grpo_is_averaged_otherwise(tmp_path, parity):
    """TRL: policy loss per sequence, entropy per token. Ours: both as loss_agg_mode says."""
    batch = Batch(LENGTHS)
    want, _, _ = theirs(tmp_path, batch, loss_type="grpo", entropy_coef=0.1, **CLIP)
    ours = PolicyObjective(**(ALWAYS | PER_SEQUENCE | OUR_CLIP), entropy_coef=0.1)
    loss, _, _ = batch.ours(ours, entropy=batch.entropy)
    parity(
        "policy loss",
        "TRL grpo, entropy_coef",
        "float32",
        rlkern=describe(ours),
        value=distance(loss, want),
        budget=BUDGET[torch.float32],
        differs=True,
        note="TRL averages the bonus over tokens whatever the loss type; use the metric `entropy` "
        "and add it, or a token mean",
    )


PRESETS = {
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_pos": 1.2, "sapo_temperature_neg": 1.4},
        "sapo",
        {"sapo_temperature_pos": 1.2, "sapo_temperature_neg": 1.4, "count_empty": True},
    ),
    "luspo": (
        {"loss_type": "luspo", **SEQUENCE, "epsilon": 0.02, "epsilon_high": 0.03},
        "luspo",
        {"epsilon_low": 0.02, "epsilon_high": 0.03, "count_empty": True},
    ),
    # it clamps at 20 itself
    "vespo": ({"loss_type": "vespo"}, "vespo", {"log_ratio_clamp": 20.0}),
    "grpo, beta, r k3": (
        {"loss_type": "grpo", "beta": 0.04, **CLIP},
        "grpo",
        {"beta": 0.04, "use_bias_correction_kl": True, "count_empty": True, "epsilon_high": 0.28},
    ),
    "gspo, beta, s k3": (
        {"loss_type": "grpo", "beta": 0.04, **SEQUENCE, **FINE},
        "gspo",
        {"beta": 0.04, "use_bias_correction_kl": True, "count_empty": True, **OUR_FINE},
    ),
    "dapo, off_policy_mask_threshold": (
        {"loss_type": "dapo", "off_policy_mask_threshold": 0.02, **CLIP},
        "dapo",
        {"off_policy_mask_threshold": 0.02},
    ),
    "dapo, top_entropy_quantile": (
        {"loss_type": "dapo", "top_entropy_quantile": 0.3, **CLIP},
        "dapo",
        {"top_entropy_quantile": 0.3},
    ),
    "gmpo": (
        {"cls": GivenLogprobsGMPO, "epsilon": 0.2, "epsilon_high": 0.3},
        "gmpo",
        {"epsilon_low": 0.2, "epsilon_high": 0.3, "count_empty": True},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, dtype, tmp_path, parity):
    options, preset, mine = PRESETS[name]
    # the mean of nothing is a ratio of 1 in its GMPO: a constant of -A
    batch = Batch(LENGTHS if name != "gmpo" else (17, 5, 3, 24, 11, 8), dtype=dtype)
    more = {}
    if "off_policy_mask_threshold" in options:
        more = {"sampling_per_token_logps": batch.rollout}
    want, _, (want_grad, _) = theirs(tmp_path, batch, more=more, **options)
    ours = PolicyObjective.preset(preset, **(ALWAYS | mine))
    inputs = {
        "ref_logprob": batch.ref if ours.kl_coef else None,
        "rollout_logprob": batch.rollout if ours.needs_rollout else None,
        "entropy": batch.entropy if ours.needs_entropy else None,
    }
    loss, _, grad = batch.ours(ours, **inputs)
    # its thresholds and exponents are float32 in either case
    single = ("sapo", "vespo", "dapo, top_entropy_quantile")
    parity(
        "policy loss",
        f"TRL {name}",
        str(dtype).removeprefix("torch."),
        rlkern=describe(ours),
        value=distance(loss, want),
        gradient=relative(grad, want_grad),
        budget=BUDGET[torch.float32 if name in single else dtype],
    )


# --- advantages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale_rewards", "kind"), [("group", "grpo"), ("none", "dr_grpo"), ("batch", "batch_std")]
)
def test_advantages(scale_rewards, kind, tmp_path, parity):
    """Of the trainer's own generation step; the reward says what it likes."""
    rewards = torch.randn(16).tolist()
    # a group without a difference; its mean is exact
    rewards[4:8] = [0.5] * 4
    made = trainer(
        tmp_path,
        reward=lambda completions, **_: rewards,
        scale_rewards=scale_rewards,
        max_completion_length=2,
        per_device_train_batch_size=16,
    )
    rows = [{"prompt": prompt} for prompt in made.train_dataset["prompt"][:4] for _ in range(4)]
    want = made._generate_and_score_completions(rows)["advantages"]
    groups = torch.arange(4).repeat_interleave(4)
    got = rlkern.group_advantage(torch.tensor(rewards), groups, kind=kind, epsilon=1e-4)
    parity(
        "advantages",
        f"TRL scale_rewards={scale_rewards!r}",
        "4 groups of 4 rows",
        rlkern=f"kind={kind!r}, epsilon=0.0001",
        value=distance(got, want),
        budget=BUDGET[torch.float32],
    )


# --- a run behind TRL's hook -------------------------------------------------------------------


RUNS = {
    "dapo, two iterations": {"loss_type": "dapo", "num_iterations": 2},
    "cispo, entropy bonus": {
        "loss_type": "cispo",
        "epsilon_high": 1.05,
        "num_iterations": 2,
        "entropy_coef": 0.01,
    },
    "gspo, temperature 0.7": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "num_iterations": 2,
        "temperature": 0.7,
    },
    "soft-capped logits": {"model": "Gemma2", "loss_type": "dapo", "num_iterations": 2},
    "scaled logits": {"model": "Granite", "loss_type": "dapo", "num_iterations": 2},
    "a head with a bias": {"model": "Phi", "loss_type": "dapo", "num_iterations": 2},
}
STEPS = 20


def train(folder, **options) -> tuple[list[dict[str, float]], torch.Tensor]:
    """All that was logged, a dictionary a step, and all weights at the end."""
    made = trainer(folder, max_steps=STEPS, max_completion_length=8, **options)
    made.train()
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    for entry in steps:
        del entry["step_time"]
    weights = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    return steps, weights


@pytest.mark.parametrize("name", RUNS)
def test_a_training_run_is_the_same_behind_the_hook(name, tmp_path, parity, monkeypatch):
    options = RUNS[name]
    before, before_weights = train(tmp_path / "trl", **options)
    model = options.get("model", "Qwen3")
    fresh = tiny_model(tiny_tokenizer(), model)
    start = torch.cat([p.detach().flatten() for p in fresh.parameters()])
    calls, apply = [], integration.LogprobHead.apply

    def counted(*args):
        calls.append(args[0].shape)
        return apply(*args)

    monkeypatch.setattr(integration.LogprobHead, "apply", staticmethod(counted))
    with integration.enable():
        after, after_weights = train(tmp_path / "rlkern", **options)
    assert len(calls) >= STEPS
    assert len(before) == len(after) == STEPS
    # it learnt something: the rows of figures are not zeros, and the weights moved
    assert all(step["grad_norm"] > 0.01 and step["entropy"] > 0 for step in before)
    assert max(abs(step["loss"]) for step in before) > 0.01
    assert (before_weights - start).abs().max() > 0.01
    assert any(value > 0 for step in before for key, value in step.items() if "clip_ratio" in key)
    worst = 0.0
    for step, other in zip(before, after):
        assert step.keys() == other.keys()
        worst = max(worst, *(abs(step[key] - other[key]) for key in step))
    parity(
        "training run",
        f"TRL GRPOTrainer, {name}",
        f"{STEPS} steps of a tiny {model}: every logged figure; final weights",
        rlkern="integrations.trl.enable()",
        value=worst,
        gradient=(after_weights - before_weights).abs().max().item(),
        budget=1e-5,
        gradient_budget=1e-4,
    )
