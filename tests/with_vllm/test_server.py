"""`vllm serve` against Hugging Face: the same tokens, log-probs and weights, over HTTP."""

import pytest
import torch
from test_engine import PROMPTS, assert_greedy, assert_logprobs, generate, perturbed
from tiny import EOS, tiny
from transformers import LlamaConfig

from rlkern.rollout import VllmServer

pytest.importorskip("vllm.platforms")

OPTIONS = {"block_size": 32, "kv_cache_memory_bytes": 2**26}


@pytest.fixture(scope="module")
def pair():
    """A model, and a server that samples from a copy of it."""
    model = tiny(LlamaConfig, tie_word_embeddings=True)
    with VllmServer(model, eos_token_ids=[-1, *EOS], **OPTIONS) as engine:
        yield model, engine
    assert engine.server.poll() is not None
    assert not engine.folder.exists()


def test_greedy_equals_hugging_face_before_and_after_an_update(pair):
    model, engine = pair
    for version, now in enumerate((perturbed(model), model), engine.version + 1):
        before = generate(engine, group_size=2, greedy=True)
        engine.update_weights(dict(now.named_parameters()))
        after = generate(engine, group_size=2, greedy=True)
        assert_greedy(after, now)
        assert_logprobs(after, now)
        assert before.tokens.tolist() != after.tokens.tolist()
        assert after.versions.tolist() == [version] * len(after.tokens)


def test_rollouts_are_samples_of_the_model(pair):
    model, engine = pair
    rollouts = generate(engine, temperature=0.6)
    assert_logprobs(rollouts, model, 0.6)
    assert rollouts.group_ids.tolist() == [i for i in range(4) for _ in range(3)]
    assert [p.tolist() for p in rollouts.prompts()] == [p for p in PROMPTS for _ in range(3)]
    for response, truncated in zip(rollouts.responses(), rollouts.truncated.tolist(), strict=True):
        assert not torch.isin(response[:-1], torch.tensor(EOS)).any()
        assert truncated == (int(response[-1]) not in EOS)
    again, other = generate(engine, temperature=0.6), generate(engine, temperature=0.6, seed=1)
    assert torch.equal(rollouts.tokens, again.tokens)
    assert not torch.equal(rollouts.tokens[:20], other.tokens[:20])


def test_nothing_cached_outlives_the_weights(pair):
    model, engine = pair
    long = [[*range(4, 44), 4, 5, 6]]
    for now in (perturbed(model), model):
        generate(engine, long, greedy=True, group_size=1)
        generate(engine, long, greedy=True, group_size=1)
        assert engine.stats["rollout/prefix_cached"] == pytest.approx(32 / 43)
        engine.update_weights(dict(now.named_parameters()))
        assert_logprobs(generate(engine, long, greedy=True, group_size=1), now)
        assert engine.stats["rollout/prefix_cached"] == 0


def test_another_client_finds_the_server(pair, tmp_path):
    """It brings weights of its own, through a folder of its own."""
    model, engine = pair
    other = perturbed(model, seed=9)
    client = VllmServer(other, eos_token_ids=EOS, url=engine.url, folder=tmp_path)
    assert_logprobs(generate(client), other)
    client.close()  # leaves what it has not started
    engine.update_weights(dict(model.named_parameters()))
    assert_logprobs(generate(engine), model)


def test_bad_calls_change_nothing(pair):
    model, engine = pair
    before = generate(engine)
    weights = {name: w + 1 for name, w in model.named_parameters()}
    weights["model.norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"update_weights: .*model.norm.weight of shape"):
        engine.update_weights(weights)
    with pytest.raises(ValueError, match="140 tokens, but vLLM was made for 128"):
        generate(engine, max_new_tokens=100)
    with pytest.raises(RuntimeError, match=r"VllmServer: /inference/v1/generate: 4"):
        engine._call("/inference/v1/generate", {"token_ids": []})
    assert torch.equal(generate(engine).logprob, before.logprob)


def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(ValueError, match="at least one end token"):
        VllmServer(tiny(), eos_token_ids=[])
    with pytest.raises(RuntimeError, match=r"(?s)did not start: .*block-size"):
        VllmServer(tiny(), eos_token_ids=EOS, block_size="odd")
