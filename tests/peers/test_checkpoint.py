"""Checkpoints that we write, read by Transformers with compressed-tensors: the same weights."""

import json

import pytest
import torch

import rlkern
from rlkern.quant import QuantizedLinear, quantize_model, save_quantized
from rlkern.testing.numerics import assert_same_bits

transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("compressed_tensors")


def model_of(recipe, **how):
    config = transformers.Qwen3Config(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        **{"tie_word_embeddings": False, **how},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return quantize_model(model, recipe)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "recipe", ["fp8", "fp8-weights", "fp8-row", "fp8-tensor", "nvfp4-compressed-tensors"]
)
def test_transformers_reads_our_weights(tmp_path, recipe, tied):
    ours = model_of(recipe, tie_word_embeddings=tied, attention_bias=tied)
    # compressed-tensors expands NVFP4 to bfloat16, FP8 to the dtype that is asked for
    dtype = torch.bfloat16 if recipe.startswith("nvfp4") else torch.float32
    ours.to(dtype)
    save_quantized(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.arange(12)[None]
    logits = theirs(ids).logits  # expands the weights
    seen = 0
    for name, layer in ours.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        seen += 1
        got = theirs.get_submodule(name).weight.detach()
        assert got.dtype == dtype
        assert_same_bits(name, got, rlkern.dequantize(layer.weight, dtype))
        if layer.bias is not None:
            assert_same_bits(f"{name} bias", theirs.get_submodule(name).bias, layer.bias)
    assert seen == 14
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert_same_bits(name, theirs.get_parameter(name), ours.get_parameter(name))
    # products in another order; for "fp8" also activations whose scales are computed in another
    off = (logits - ours(ids).logits).abs().max() / logits.abs().max()
    assert off < (0.05 if recipe == "fp8" or dtype == torch.bfloat16 else 1e-4)


def test_modelopt_s_names_and_direction(tmp_path):
    from safetensors.torch import load_file

    ours = model_of("nvfp4-modelopt")
    save_quantized(ours, tmp_path, "modelopt")
    held = load_file(tmp_path / "model.safetensors")
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert_same_bits("codes", held[f"{name}.weight"], layer.data)
            assert held[f"{name}.weight_scale"].dtype == torch.float8_e4m3fn
            # a multiplier: amax / 2688
            assert_same_bits("global", held[f"{name}.weight_scale_2"], layer.global_scale)
    text = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert text == {"quant_algo": "W4A16_NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "modelopt"


@pytest.mark.parametrize(
    ("recipe", "format", "message"),
    [
        ("nvfp4", "compressed-tensors", "expected recipe 'nvfp4-compressed-tensors' .*'te'"),
        ("nvfp4-modelopt", "compressed-tensors", "expected recipe 'nvfp4-compressed-tensors'"),
        ("fp8", "modelopt", "expected recipe 'fp8-weights' or 'nvfp4-modelopt'"),
        ("fp8", "gguf", "expected format to be one of compressed-tensors, modelopt, got 'gguf'"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path, recipe, format, message):
    with pytest.raises(ValueError, match=f"save_quantized: {message}"):
        save_quantized(model_of(recipe), tmp_path, format)
    assert not list(tmp_path.iterdir())
