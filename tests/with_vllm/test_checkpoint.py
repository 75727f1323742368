"""Quantised checkpoints that we write, loaded by vLLM: the same weights.

vLLM's CPU build has no kernel for most of these formats, and looks for one before it loads
anything. Here a kernel that expands the weights stands in: the config, the parameters' names,
shapes and types, the fusing of q, k and v, and what is done with scales are vLLM's own.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch

import rlkern
from rlkern.quant import quantize_model, save_quantized
from rlkern.quant.model import quantized_layers
from rlkern.testing.numerics import assert_same_bits

pytest.importorskip("vllm.platforms")
pytestmark = pytest.mark.no_poison

LAYERS = "vllm.model_executor.layers.quantization."
SCHEMES = LAYERS + "compressed_tensors.schemes.compressed_tensors_"
CHOICES = (
    SCHEMES + "w8a16_fp8.init_wfp8_a16_linear_kernel",
    SCHEMES + "w8a8_fp8.init_fp8_linear_kernel",
    SCHEMES + "w4a4_nvfp4.init_nvfp4_linear_kernel",
    LAYERS + "modelopt.init_fp8_linear_kernel",
    LAYERS + "modelopt.init_nvfp4_linear_kernel",
)
CASES = [
    ("compressed-tensors", "fp8"),
    ("compressed-tensors", "fp8-weights"),
    ("compressed-tensors", "fp8-row"),
    ("compressed-tensors", "fp8-tensor"),
    ("compressed-tensors", "nvfp4-compressed-tensors"),
    ("modelopt", "fp8-weights"),
    ("modelopt", "nvfp4-modelopt"),
]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def expand(layer):
    """float32 [out, in] of what vLLM's loaders and schemes have left in a layer."""
    if layer.weight.dtype == torch.uint8:
        low, high = layer.weight & 15, layer.weight >> 4
        codes = torch.stack((low, high), -1).flatten(1).long()
        values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        scale = layer.weight_scale.float().repeat_interleave(16, 1)
        return values * scale * layer.weight_global_scale.float()
    block = getattr(layer, "weight_scale_inv", layer.weight_scale)
    if layer.weight_block_size is not None and block.ndim == 2:
        rows, columns = layer.weight.shape
        scale = block.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return layer.weight.float() * scale
    # theirs is [in, out], with a scale for all, a layer or a row
    return (layer.weight.float() * layer.weight_scale.reshape(1, -1)).t()


class Expanding:
    """A kernel that multiplies by the expanded weights."""

    def __init__(self, *arguments, use_a16=True, **how):
        assert use_a16, "vLLM would quantise activations by scales that the checkpoint has not"
        self.config = SimpleNamespace()

    def input_quant_key(self):
        return None

    def process_weights_after_loading(self, layer):
        layer.expanded = expand(layer)

    def apply_weights(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.expanded.to(x.dtype), bias)


def model_of(recipe):
    shape = {"hidden_size": 256, "intermediate_size": 384, "num_key_value_heads": 4, "head_dim": 64}
    return quantize_model(tiny.tiny(**shape), recipe).to(torch.bfloat16)


REFUSED = ("compressed-tensors", "fp8-weights")


@pytest.mark.parametrize(("format", "recipe"), [case for case in CASES if case != REFUSED])
def test_vllm_reads_our_weights(tmp_path, monkeypatch, format, recipe):
    for choice in CHOICES:
        monkeypatch.setattr(choice, Expanding)
    ours = model_of(recipe)
    save_quantized(ours, tmp_path, format)
    engine = tiny.engine_of(tmp_path, dtype="bfloat16")
    theirs = dict(engine.llm.apply_model(lambda model: dict(model.named_modules()))[0])
    layers, seen = dict(quantized_layers(ours)), 0
    for name, layer in theirs.items():
        if not hasattr(layer, "expanded"):
            continue
        parent, _, last = name.rpartition(".")
        parts = [layers[f"{parent}.{part}"] for part in FUSED.get(last, (last,))]
        expected = torch.cat([rlkern.dequantize(part.weight, torch.float32) for part in parts])
        assert_same_bits(name, layer.expanded, expected)
        seen += len(parts)
    assert seen == len(layers) == 14
    embeddings = theirs["model.embed_tokens"].weight[: ours.config.vocab_size]
    assert_same_bits("embeddings", embeddings, ours.get_input_embeddings().weight)
    # "fp8" of ours quantises activations too, the kernel that stands in does not
    assert_near(engine, ours, 0.5 if recipe == "fp8" else 0.1)


def test_blocks_without_quantised_activations_are_not_for_this_vllm(tmp_path, monkeypatch):
    """It takes no activations for static ones, and gives up: ModelOpt's name for them loads."""
    for choice in CHOICES:
        monkeypatch.setattr(choice, Expanding)
    save_quantized(model_of("fp8-weights"), tmp_path)
    with pytest.raises(AssertionError):
        tiny.engine_of(tmp_path, dtype="bfloat16")


@pytest.mark.parametrize(("format", "recipe"), CASES)
def test_what_the_cpu_build_runs_by_itself(tmp_path, format, recipe):
    ours = model_of(recipe)
    save_quantized(ours, tmp_path, format)
    try:
        engine = tiny.engine_of(tmp_path, dtype="bfloat16")
    except ValueError as error:
        if "Failed to find a kernel" not in str(error) and "is not supported" not in str(error):
            raise
        pytest.skip(f"vLLM has no kernel here: {error}")
    assert_near(engine, ours)


@torch.no_grad()
def assert_near(engine, model, limit=0.1):
    """vLLM's log-probs are those of our model, rounding aside."""
    prompts = [[5, 6, 7], [8], [*range(4, 44)]]
    generator = torch.Generator().manual_seed(0)
    rollouts = engine.generate(prompts, group_size=4, max_new_tokens=8, generator=generator)
    packed, off = rollouts.logprob.split(rollouts.lengths.tolist()), []
    for prompt, response, logprob in zip(
        rollouts.prompts(), rollouts.responses(), packed, strict=True
    ):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        full = logits.float().log_softmax(-1).gather(1, response[:, None])[:, 0]
        off.append((logprob - full).abs())
    assert torch.cat(off).mean() < limit
