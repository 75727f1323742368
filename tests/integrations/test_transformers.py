"""transformers itself: from_pretrained with our quantizer and attention, log-probs of the head."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers.quantizers import auto

from rlkern.integrations import transformers as integration
from rlkern.quant import QuantizedLinear

MODELS = {
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 0.25},
    "cohere": {"logit_scale": 0.5},
    "phi": {},
}


def tiny(name="qwen3", hidden=32):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        name,
        vocab_size=61,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        **MODELS[name],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 10
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model.eval()


@pytest.fixture(autouse=True)
def _unpoisoned(_poisoned_empty):
    """transformers' own torch.empty is its own affair."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    transformers.logging.set_verbosity_error()


def batch():
    ids = torch.randint(2, 61, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_the_logits(name):
    model = tiny(name)
    ids, mask, labels = batch()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / 0.7
    log_p = logits.log_softmax(-1)
    want = log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    want = want.masked_fill(labels[:, 1:] == -100, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1)
    up = torch.randn_like(want)
    grads = torch.autograd.grad((want * up).sum(), list(model.parameters()), allow_unused=True)
    with integration.add_logprobs(model):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            logprobs=("logprob", "entropy"),
            logprob_options={"temperature": 0.7},
        )
        # without the argument it is the model's own call
        assert torch.isfinite(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
        got = torch.autograd.grad(
            (out.logprob * up).sum(), list(model.parameters()), allow_unused=True
        )
    assert (out.logprob - want).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    for mine, theirs in zip(got, grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max().clamp(min=1)
    assert "forward" not in vars(model)


def test_what_logprobs_need():
    model = tiny()
    with integration.add_logprobs(model):
        with pytest.raises(ValueError, match=r"expected labels of shape \(B, L\) with logprobs"):
            model(input_ids=batch()[0], logprobs=("logprob",))
        ids = batch()[0][:1]
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 13)
    with pytest.raises(TypeError, match="expected a model with a linear LM head, got NoneType"):
        integration.add_logprobs(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("recipe", ["fp8", "fp8-row", "nvfp4"])
def test_from_pretrained_quantises(recipe, tmp_path):
    from rlkern.quant import quantize_model

    tiny(hidden=128).save_pretrained(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    with integration.enable():
        config = integration.quantization_config(recipe)
        model = load(tmp_path / "model", quantization_config=config)
        assert model.config.quantization_config.quant_method == "rlkern"
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 2 * 7
    assert type(model.lm_head) is torch.nn.Linear
    want = quantize_model(load(tmp_path / "model"), recipe)
    ids = batch()[0]
    assert torch.equal(model(ids).logits, want(ids).logits)
    assert not torch.equal(model(ids).logits, load(tmp_path / "model")(ids).logits)


def test_registrations_are_put_back(tmp_path):
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert "rlkern" not in before[0]
    with integration.enable():
        assert "rlkern" in auto.AUTO_QUANTIZER_MAPPING
        assert not integration.enable().enabled
        assert "rlkern" in transformers.AttentionInterface().valid_keys()
        tiny().save_pretrained(tmp_path / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", attn_implementation="rlkern"
        )
        ids = batch()[0]
        sdpa = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert (model(ids).logits - sdpa(ids).logits).abs().max() < 1e-5
    after = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert after == before
    assert "rlkern" not in transformers.AttentionInterface().valid_keys()


def test_what_cannot_be_quantised(tmp_path):
    with pytest.raises(ValueError, match=r"expected recipe to be one of fp8.*, got 'int4'"):
        integration.quantization_config("int4")
    tiny(hidden=128).save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "rlkern", "recipe": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with integration.enable(), pytest.raises(ValueError, match="a checkpoint in high precision"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
