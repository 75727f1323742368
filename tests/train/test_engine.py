"""The native engine against the model called without a cache, one sequence at a time."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from rlkern.rollout import NativeEngine, Rollouts
from rlkern.train.batch import collate, response_logprobs

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
EOS = [1, 2, 3, 4]


@pytest.fixture(params=[Qwen3Config, LlamaConfig], ids=["qwen3", "llama"])
def model(request):
    torch.manual_seed(3)
    options = {"head_dim": 8} if request.param is Qwen3Config else {}
    return AutoModelForCausalLM.from_config(request.param(**SHAPE, **options)).eval()


def engine(model, **options):
    return NativeEngine(model, eos_token_ids=EOS, **options)


def generate(model, prompts=PROMPTS, seed=0, options=(), **arguments):
    arguments = {"group_size": 3, "max_new_tokens": 8} | arguments
    stream = torch.Generator().manual_seed(seed)
    return engine(model, **dict(options)).generate(prompts, generator=stream, **arguments)


@torch.no_grad()
def test_greedy_equals_the_uncached_argmax(model):
    rollouts = generate(model, group_size=1, greedy=True)
    for i, response in enumerate(rollouts.responses()):
        ids = list(PROMPTS[i])
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in EOS:
                break
        assert response.tolist() == ids[len(PROMPTS[i]) :]
        assert bool(rollouts.truncated[i]) == (ids[-1] not in EOS)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_logprobs_equal_those_of_a_full_forward(model, temperature):
    rollouts = generate(model, temperature=temperature)
    packed = rollouts.logprob.split(rollouts.lengths.tolist())
    for prompt, response, logprob in zip(
        rollouts.prompts(), rollouts.responses(), packed, strict=True
    ):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        full = (logits / temperature).log_softmax(-1)
        torch.testing.assert_close(logprob, full.gather(1, response[:, None])[:, 0])
    assert rollouts.logprob.dtype == torch.float32


def test_structure_of_the_rollouts(model):
    rollouts = generate(model)
    assert rollouts.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [p.tolist() for p in rollouts.prompts()] == [p for p in PROMPTS for _ in range(3)]
    lengths, ends = rollouts.lengths.tolist(), torch.tensor(EOS)
    assert len(set(lengths)) > 2  # so that rows finish, and are compacted, at different times
    for response, truncated in zip(rollouts.responses(), rollouts.truncated.tolist(), strict=True):
        assert not torch.isin(response[:-1], ends).any()
        assert truncated == (not torch.isin(response[-1], ends))
        assert not truncated or len(response) == 8


def test_sampling_follows_the_probabilities(model):
    rollouts = generate(model, prompts=[PROMPTS[0]], group_size=4000, max_new_tokens=1)
    counts = torch.bincount(rollouts.tokens, minlength=24) / 4000
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    # Five standard deviations of a share over 4000 draws.
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-6).all()


def test_the_generator_decides_and_the_model_mode_is_kept(model):
    model.train()
    first, again, other = (generate(model, seed=s) for s in (0, 0, 1))
    assert model.training
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.logprob, again.logprob)
    assert first.tokens.tolist() != other.tokens.tolist()


def test_turns_of_whole_prompts(model):
    options = {"max_sequences": 4}
    turns = generate(model, options=options, greedy=True)
    assert torch.equal(turns.tokens, generate(model, greedy=True).tokens)
    assert torch.equal(turns.group_ids, generate(model, greedy=True).group_ids)


def test_saved_rollouts_load_as_they_were(model, tmp_path):
    rollouts = generate(model)
    rollouts.save(tmp_path / "a" / "r.safetensors", rewards=torch.arange(12.0))
    loaded, extra = Rollouts.load(tmp_path / "a" / "r.safetensors")
    assert torch.equal(extra["rewards"], torch.arange(12.0))
    for name in Rollouts.__dataclass_fields__:
        assert torch.equal(getattr(loaded, name), getattr(rollouts, name)), name
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.safetensors"]
    (tmp_path / "bad").write_text("x")
    with pytest.raises(ValueError, match="bad is not a saved rollout"):
        Rollouts.load(tmp_path / "bad")


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="at least one end token"):
        NativeEngine(model, eos_token_ids=[])
    for prompts in ([], [[5], []]):
        with pytest.raises(ValueError, match="prompts of at least one token"):
            generate(model, prompts=prompts)
    for bad in ({"group_size": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="expected group_size >= 1"):
            generate(model, **bad)
    with pytest.raises(ValueError, match=r"= 46 tokens, but the model has 40 positions"):
        generate(model, max_new_tokens=40)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 8}),
        (CohereConfig, {"logit_scale": 0.3}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (Qwen3Config, {"head_dim": 8}),
    ],
    ids=["gemma2", "cohere", "granite", "qwen3"],
)
@torch.no_grad()
def test_the_trainer_applies_what_the_model_does_to_its_logits(kind, options):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(kind(**SHAPE, **options)).eval()
    prompts = [torch.tensor(p) for p in PROMPTS]
    responses = [
        torch.tensor([4, 9, 2]),
        torch.tensor([7]),
        torch.tensor([3, 3]),
        torch.tensor([1]),
    ]
    got = response_logprobs(model, collate(prompts, responses), temperature=0.7)
    want, entropy = [], []
    for prompt, response in zip(prompts, responses):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (logits / 0.7).log_softmax(-1)
        want.append(logp.gather(1, response[:, None])[:, 0])
        entropy.append(-(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(got.logprob, torch.cat(want), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, torch.cat(entropy), rtol=1e-5, atol=1e-5)
