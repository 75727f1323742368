"""The native engine against the model called without a cache, one sequence at a time."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlkern.rollout import NativeEngine, Rollouts
from rlkern.rollout.decoder import is_direct
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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def generate(model, prompts=PROMPTS, seed=0, options=(), **arguments):
    arguments = {"group_size": 3, "max_new_tokens": 8} | arguments
    return engine(model, **dict(options)).generate(prompts, generator=seeded(seed), **arguments)


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


def test_parts_of_a_list_of_prompts_draw_what_the_whole_list_draws(model):
    whole = generate(model)
    parts = [generate(model, PROMPTS[:3]), generate(model, PROMPTS[3:], first=3)]
    joined = Rollouts.joined(parts)
    assert given(joined).keys() == given(whole).keys()
    for name, tensor in given(whole).items():
        if name in ("logprob", "entropy"):
            torch.testing.assert_close(getattr(joined, name), tensor)
        else:
            assert torch.equal(getattr(joined, name), tensor), name
    assert not torch.equal(generate(model, PROMPTS[3:]).tokens, parts[1].tokens)


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


def same(a, b):
    assert given(a).keys() == given(b).keys()
    for name, tensor in given(a).items():
        assert torch.equal(tensor, getattr(b, name)), name


def given(rollouts):
    return {name: tensor for name, tensor in vars(rollouts).items() if tensor is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig])
def test_the_direct_decoder_is_the_models_forward(kind, dtype):
    """To the bit where a scorer asks for a trainer's bits, else but for the order of means."""
    torch.manual_seed(3)
    options = {"sliding_window": None} if kind is MistralConfig else {}
    model = AutoModelForCausalLM.from_config(kind(**SHAPE, **options)).eval().to(dtype)
    assert is_direct(model)

    def score(hidden, tokens, temperature):
        logits = model.lm_head(hidden).float() / temperature
        return logits.log_softmax(-1).gather(1, tokens[:, None].long())[:, 0]

    def run(direct, score):
        made = engine(model, direct=direct, score=score)
        return made.generate(PROMPTS, group_size=3, max_new_tokens=8, generator=seeded(0))

    same(run(True, score), run(False, score))
    if dtype == torch.float32:
        got, want = run(True, None), run(False, None)
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.logprob, want.logprob, rtol=0, atol=1e-5)


def test_a_model_with_hooks_goes_through_its_own_forward(model):
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert not is_direct(model)
    generate(model)
    assert seen


@pytest.mark.parametrize("options", [{"share": False}, {"page_size": 3}])
def test_sharing_and_pages_do_not_change_a_bit(model, options):
    same(generate(model), generate(model, options=options))


def test_draws_without_filters_are_those_of_sample_tokens(model):
    """A filter that keeps everything takes the public function."""
    same(
        generate(model, temperature=0.7),
        generate(model, temperature=0.7, top_k=SHAPE["vocab_size"]),
    )


@pytest.mark.parametrize(
    "options", [{"max_sequences": 1}, {"max_sequences": 5}, {"max_cached_tokens": 48}]
)
def test_what_is_decoded_together_changes_no_draw(model, options):
    want, got = generate(model), generate(model, options=options)
    assert torch.equal(want.tokens, got.tokens)
    assert torch.equal(want.group_ids, got.group_ids)
    torch.testing.assert_close(want.logprob, got.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(want.entropy, got.entropy, rtol=1e-5, atol=1e-5)


def test_a_cache_that_cannot_hold_one_group_says_so(model):
    with pytest.raises(RuntimeError, match=r"one group needs \d+ more pages of 4 .*max_cached_tok"):
        generate(model, options={"max_cached_tokens": 12, "page_size": 4})
    assert generate(model).tokens.numel()


def test_nothing_is_left_in_the_cache(model):
    one = engine(model)
    for _ in range(2):
        one.generate(PROMPTS, group_size=2, max_new_tokens=4)
        assert one.cache.free_pages == one.cache.num_pages
        assert not len(one.cache.branches())


@torch.no_grad()
def test_entropies_versions_and_origins(model):
    one = engine(model)
    one.bump_version(7)
    rollouts = one.generate(PROMPTS, group_size=2, max_new_tokens=6, generator=seeded(1))
    assert rollouts.versions.tolist() == [7] * len(rollouts.tokens)
    assert rollouts.origin.tolist() == list(range(len(rollouts.tokens)))
    assert rollouts.mask.all()
    entropies = rollouts.entropy.split(rollouts.lengths.tolist())
    for prompt, response, entropy in zip(rollouts.prompts(), rollouts.responses(), entropies):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)
        torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[2]])
def test_greedy_equals_generate_of_transformers(model, prompt):
    ids = torch.tensor([prompt])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
        eos_token_id=EOS, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    got = generate(model, prompts=[prompt], group_size=1, max_new_tokens=12, greedy=True)
    assert got.tokens.tolist() == want.sequences[0, len(prompt) :].tolist()
    full = torch.cat(want.logits).log_softmax(-1).gather(1, got.tokens[:, None])[:, 0]
    torch.testing.assert_close(got.logprob, full, rtol=1e-5, atol=1e-5)


def test_logits_that_are_no_numbers_are_told(model):
    one = engine(model)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the logits of 8 of 8 sequences hold NaN"):
        one.generate(PROMPTS, group_size=2, max_new_tokens=4)
    assert one.cache.free_pages == one.cache.num_pages


def test_the_model_is_left_as_it_was(model):
    how = model.config._attn_implementation
    generate(model)
    assert model.config._attn_implementation == how
    with pytest.raises(ValueError):
        generate(model, prompts=[[]])
    assert model.config._attn_implementation == how


@torch.no_grad()
def test_a_family_that_is_not_laid_out_as_llama():
    torch.manual_seed(3)
    config = Gemma2Config(**SHAPE, head_dim=8, sliding_window=14, attn_logit_softcapping=3.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rollouts = generate(model, group_size=1, greedy=True)
    for prompt, response in zip(PROMPTS, rollouts.responses(), strict=True):
        ids = torch.cat([torch.tensor(prompt), response])
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        assert torch.equal(logits.argmax(-1), response)


def test_sliding_windows_bound_what_is_sampled():
    config = MistralConfig(**SHAPE, sliding_window=12)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert generate(model, max_new_tokens=6).tokens.numel()
    with pytest.raises(ValueError, match="= 13 tokens, but the model has 12 positions"):
        generate(model, max_new_tokens=7)


def test_saved_rollouts_load_as_they_were(model, tmp_path):
    rollouts = generate(model)
    rollouts.save(tmp_path / "a" / "r.safetensors", rewards=torch.arange(12.0))
    loaded, extra = Rollouts.load(tmp_path / "a" / "r.safetensors")
    assert torch.equal(extra["rewards"], torch.arange(12.0))
    same(loaded, rollouts)
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
