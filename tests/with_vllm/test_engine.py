"""vLLM's CPU build against Hugging Face: the same tokens, log-probs and weights."""

import copy
import gc
import weakref

import pytest
import torch
from tiny import EOS, SHAPE, engine_of, tiny
from transformers import LlamaConfig

# not "vllm" alone: this folder would do for it
pytest.importorskip("vllm.platforms")
pytestmark = pytest.mark.no_poison  # vLLM reads memory that it has not written, and masks it

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [*range(4, 44)]]


KINDS = {
    "qwen3": {},
    "llama, tied": {"kind": LlamaConfig, "tie_word_embeddings": True},
    "qwen3, bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A model, and an engine that samples from a copy of it."""
    model = tiny(**KINDS[request.param])
    return model, engine_of(model)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def generate(engine, prompts=PROMPTS, seed=0, **arguments):
    arguments = {"group_size": 3, "max_new_tokens": 12} | arguments
    return engine.generate(prompts, generator=seeded(seed), **arguments)


def perturbed(model, seed=5):
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return other


@torch.no_grad()
def logits_of(model, prompt, response):
    ids = torch.cat([prompt, response])[None]
    return model(ids).logits[0, len(prompt) - 1 : -1].float()


def assert_greedy(rollouts, model):
    """Token for token what `generate` of Hugging Face gives."""
    for prompt, response in zip(rollouts.prompts(), rollouts.responses(), strict=True):
        theirs = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=EOS,
        )
        assert response.tolist() == theirs[0, len(prompt) :].tolist()


def assert_logprobs(rollouts, model, temperature=1.0, keep=lambda logits: logits):
    """Those of a full forward pass; in bfloat16 within what rounding leaves."""
    exact = model.dtype == torch.float32
    packed = rollouts.logprob.split(rollouts.lengths.tolist())
    every = zip(rollouts.prompts(), rollouts.responses(), packed, strict=True)
    for prompt, response, logprob in every:
        full = keep(logits_of(model, prompt, response) / temperature).log_softmax(-1)
        expected = full.gather(1, response[:, None])[:, 0]
        off = (logprob - expected).abs()
        assert off.max() < (1e-4 if exact else 0.5), off
        assert off.mean() < (1e-5 if exact else 0.05), off
    assert rollouts.logprob.dtype == torch.float32


def test_greedy_equals_hugging_face_before_and_after_an_update(pair):
    model, engine = pair
    for version, now in enumerate((perturbed(model), model), engine.version + 1):
        before = generate(engine, group_size=1, greedy=True)
        engine.update_weights(dict(now.named_parameters()))
        after = generate(engine, group_size=1, greedy=True)
        if model.dtype == torch.float32:
            assert_greedy(after, now)
        assert_logprobs(after, now)
        assert before.tokens.tolist() != after.tokens.tolist()
        assert after.versions.tolist() == [version] * len(after.tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_model(pair, temperature):
    model, engine = pair
    assert_logprobs(generate(engine, temperature=temperature), model, temperature)


def only(logits, kept):
    return logits.masked_fill(~kept, -torch.inf)


def nucleus(logits):
    """The fewest tokens with at least 0.7 of the probability."""
    values, order = logits.softmax(-1).sort(descending=True)
    kept = values.cumsum(-1) - values < 0.7
    return only(logits, torch.zeros_like(kept).scatter(1, order, kept))


@pytest.mark.parametrize(
    ("how", "keep"),
    [
        ({"top_k": 5}, lambda z: only(z, z >= z.topk(5).values[:, -1:])),
        ({"min_p": 0.2}, lambda z: only(z, z.softmax(-1) >= 0.2 * z.softmax(-1).amax(-1, True))),
        ({"top_p": 0.7}, nucleus),
    ],
    ids=["top_k", "min_p", "top_p"],
)
def test_logprobs_are_those_of_the_kept_tokens(pair, how, keep):
    model, engine = pair
    if model.dtype == torch.bfloat16:
        pytest.skip("rounding moves the border of what is kept")
    assert_logprobs(generate(engine, **how), model, keep=keep)


def test_structure_of_the_rollouts(pair):
    rollouts = generate(pair[1])
    assert rollouts.group_ids.tolist() == [i for i in range(4) for _ in range(3)]
    assert [p.tolist() for p in rollouts.prompts()] == [p for p in PROMPTS for _ in range(3)]
    assert rollouts.prompt_ids.tolist() == [0, 1, 2, 3]
    ends = torch.tensor(EOS)
    assert len(set(rollouts.lengths.tolist())) > 2
    for response, truncated in zip(rollouts.responses(), rollouts.truncated.tolist(), strict=True):
        assert not torch.isin(response[:-1], ends).any()
        assert truncated == (not torch.isin(response[-1], ends))
        assert not truncated or len(response) == 12
    assert rollouts.entropy is None
    assert rollouts.origin is None


def test_the_model_s_own_end_token_does_not_end_a_sequence(pair):
    rollouts = generate(pair[1], group_size=40)
    inside = torch.cat([response[:-1] for response in rollouts.responses()])
    assert (inside == SHAPE["eos_token_id"]).any()


def test_an_end_token_that_is_in_no_vocabulary_ends_nothing(pair):
    engine, before = pair[1], pair[1].eos
    engine.eos = [-1, SHAPE["vocab_size"]]
    assert bool(generate(engine).truncated.all())
    engine.eos = before


def test_sampling_follows_the_probabilities(pair):
    model, engine = pair
    rollouts = generate(engine, [PROMPTS[0]], group_size=4000, max_new_tokens=1)
    counts = torch.bincount(rollouts.tokens, minlength=SHAPE["vocab_size"]) / 4000
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].float().softmax(-1)
    # five standard deviations of a share over 4000 draws
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()


def test_the_generator_decides(pair):
    engine = pair[1]
    first, again, other = (generate(engine, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens[:20], other.tokens[:20])
    responses = {
        tuple(r.tolist()) for r in generate(engine, [PROMPTS[0]], group_size=8).responses()
    }
    assert len(responses) > 1  # a seed for each sample


def test_without_a_generator_torch_s_own_stream_decides(pair):
    engine, found = pair[1], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rollouts = engine.generate(PROMPTS, group_size=3, max_new_tokens=12)
        found.append(rollouts.tokens.tolist())
    assert found[0] == found[1] != found[2]


def test_the_batch_changes_no_token():
    model = tiny()
    few, many = (generate(engine_of(model, max_sequences=n)) for n in (2, 64))
    assert torch.equal(few.tokens, many.tokens)


def test_nothing_cached_outlives_the_weights(pair):
    model, engine = pair
    long = [[*range(4, 44), 4, 5, 6]]
    for now in (perturbed(model), model):
        generate(engine, long, greedy=True, group_size=1)
        cached = generate(engine, long, greedy=True, group_size=1)
        assert engine.stats["rollout/prefix_cached"] == pytest.approx(32 / 43)
        engine.update_weights(dict(now.named_parameters()))
        fresh = generate(engine, long, greedy=True, group_size=1)
        assert engine.stats["rollout/prefix_cached"] == 0
        assert_logprobs(fresh, now)
        assert not torch.equal(cached.logprob[:1], fresh.logprob[:1])


def test_a_folder_is_loaded(pair, tmp_path):
    model = pair[0]
    model.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, dtype=model.dtype)
    assert_logprobs(generate(engine), model)
    other = perturbed(model)
    engine.update_weights(dict(other.named_parameters()), 7)
    rollouts = generate(engine)
    assert_logprobs(rollouts, other)
    assert rollouts.versions.unique().tolist() == [7]


def test_the_process_stays_as_it_was():
    model = tiny()
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    engine = engine_of(model)
    assert torch.equal(torch.get_rng_state(), before)
    generate(engine)
    engine.update_weights(dict(model.named_parameters()))
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    loss = model(torch.tensor(PROMPTS[:1])).logits.sum()
    loss.backward()  # the engine's copies are its own
    assert all(p.grad is not None for p in model.parameters())


def test_an_engine_that_is_dropped_is_gone_and_leaves_the_others(pair):
    model, engine = pair
    dropped = weakref.ref(engine_of(model).llm)
    gc.collect()
    assert dropped() is None
    generate(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.popitem(), "expected lm_head.weight of shape .*, got None; 1 names"),
        (lambda w: w.update(odd=torch.ones(1)), "expected odd of shape None, got \\(1,\\)"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight of shape"),
    ],
)
def test_other_weights_are_refused_and_change_nothing(pair, change, message):
    model, engine = pair
    if model.config.tie_word_embeddings:
        pytest.skip("has no head of its own")
    before = generate(engine)
    weights = {name: w + 1 for name, w in model.named_parameters()}
    change(weights)
    with pytest.raises(ValueError, match=f"VllmEngine.update_weights: .*{message}"):
        engine.update_weights(weights)
    assert torch.equal(generate(engine).logprob, before.logprob)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "expected prompts of at least one token"),
        ({"prompts": [[5], []]}, "expected prompts of at least one token"),
        ({"group_size": 0}, "expected group_size >= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"max_new_tokens": 100}, "140 tokens, but vLLM was made for 128"),
    ],
)
def test_bad_input(pair, arguments, message):
    with pytest.raises(ValueError, match=f"VllmEngine.generate: .*{message}"):
        generate(pair[1], **arguments)


def test_trees_are_refused(pair):
    from rlkern.rollout.strategies import CURE, Strategy

    with pytest.raises(ValueError, match="expected plain groups, got CURE"):
        generate(pair[1], strategy=CURE())
    generate(pair[1], strategy=Strategy())


def test_bad_arguments(monkeypatch):
    model = tiny()
    with pytest.raises(ValueError, match="at least one end token"):
        engine_of(model, eos_token_ids=[])
    with pytest.raises(ValueError, match="max_sequences >= 1, got 0"):
        engine_of(model, max_sequences=0)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RuntimeError, match="unset VLLM_ENABLE_V1_MULTIPROCESSING"):
        engine_of(model)


def test_a_cpu_has_no_sleep_mode(pair):
    for call in (pair[1].sleep, pair[1].wake):
        with pytest.raises(RuntimeError, match="no sleep mode on a CPU"):
            call()
