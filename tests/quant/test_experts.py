"""Experts that are parameters of three dimensions: codes, sync, training, checkpoints."""

import json

import pytest
import torch
from quant.test_weight_sync import assert_same_state, moved
from torch import nn

import rlkern
from rlkern.quant import (
    PRESETS,
    MasterExperts,
    QuantizedExperts,
    QuantizedLinear,
    WeightSync,
    quantize_model,
    save_quantized,
)
from rlkern.testing.numerics import assert_same_bits

transformers = pytest.importorskip("transformers")
EXPERTS = "model.layers.1.mlp.experts"


def tiny(kind="qwen3_moe"):
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
    sizes |= {"tie_word_embeddings": False}
    if kind == "qwen3_moe":
        sizes |= {"num_experts": 5, "moe_intermediate_size": 48, "intermediate_size": 96}
        config = transformers.Qwen3MoeConfig(**sizes)
    else:
        config = transformers.MixtralConfig(num_local_experts=5, intermediate_size=48, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            # routers begin with zeros; gate and up of different sizes, as the experts
            layer.mlp.gate.weight.normal_()
            layer.mlp.experts.gate_up_proj[:, 48:] *= 2
            layer.mlp.experts.down_proj *= torch.arange(1, 6)[:, None, None]
    return model


def dequantized(experts):
    """The stacked parameters again."""

    def values(i, *names):
        layers = [getattr(experts.get_submodule(str(i)), n) for n in names]
        return torch.cat([rlkern.dequantize(layer.weight) for layer in layers])

    both = [values(i, "gate_proj", "up_proj") for i in range(experts.num_experts)]
    last = [values(i, "down_proj") for i in range(experts.num_experts)]
    return torch.stack(both), torch.stack(last)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("recipe", PRESETS)
def test_every_expert_has_codes_and_the_router_stays(kind, recipe):
    plain, model = tiny(kind), quantize_model(tiny(kind), recipe)
    for ours, theirs in zip(model.model.layers, plain.model.layers):
        assert type(ours.mlp.gate) is type(theirs.mlp.gate)
        assert_same_bits("router", ours.mlp.gate.weight, theirs.mlp.gate.weight)
        experts = ours.mlp.experts
        assert isinstance(experts, QuantizedExperts)
        assert sum(isinstance(m, QuantizedLinear) for m in experts.modules()) == 15
        stacked = (theirs.mlp.experts.gate_up_proj, theirs.mlp.experts.down_proj)
        for back, w in zip(dequantized(experts), stacked):
            off = (back - w).square().mean((1, 2)) / w.square().mean((1, 2))
            assert bool((off.sqrt() < (0.15 if "nvfp4" in recipe else 0.04)).all())
    ids = torch.arange(12)[None]
    # transformers' own experts on what the codes stand for
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear) and ".experts." not in name:
                plain.get_submodule(name).weight.copy_(rlkern.dequantize(layer.weight))
        for ours, theirs in zip(model.model.layers, plain.model.layers):
            both, last = dequantized(ours.mlp.experts)
            theirs.mlp.experts.gate_up_proj.copy_(both)
            theirs.mlp.experts.down_proj.copy_(last)
        ours, theirs = model(ids).logits, plain(ids).logits
    # activations of "fp8" are quantised too
    tolerance = 0.1 if recipe == "fp8" else 0.02
    assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_gate_and_up_of_an_expert_share_a_global_scale_and_experts_do_not():
    experts = quantize_model(tiny(), "nvfp4").model.layers[0].mlp.experts
    scales = []
    for i in range(5):
        one = experts.get_submodule(str(i))
        assert one.gate_proj.global_scale == one.up_proj.global_scale
        scales += [one.up_proj.global_scale.item(), one.down_proj.global_scale.item()]
    assert len(set(scales)) == 10


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_a_sync_gives_what_a_fresh_model_has(recipe):
    live, source = quantize_model(tiny(), recipe), tiny()
    weights = moved(source)
    with torch.no_grad():
        for name, p in source.named_parameters():
            p.copy_(weights[name])
    pointers = {n: t.data_ptr() for n, t in live.state_dict().items()}
    sync = WeightSync(live)
    report = sync.update(weights, delta=True)
    assert_same_state(live, quantize_model(source, recipe))
    assert {n: t.data_ptr() for n, t in live.state_dict().items()} == pointers
    assert report.stats[f"{EXPERTS}.4.down_proj.data"].changed > 0.05
    assert sync.update(weights).changed_bytes == 0
    other = quantize_model(tiny(), recipe)
    WeightSync(other).apply(report)
    assert_same_state(other, live)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{EXPERTS}.down_proj"), f"1 missing weights: {EXPERTS}.down_proj"),
        (
            lambda w: w.update({f"{EXPERTS}.down_proj": torch.zeros(4, 64, 48)}),
            rf"{EXPERTS}.down_proj of shape \(5, 64, 48\), got \(4, 64, 48\)",
        ),
        (lambda w: w[f"{EXPERTS}.gate_up_proj"][3].fill_(float("nan")), "expected finite weights"),
    ],
)
def test_what_is_wrong_with_experts_is_refused_and_the_old_ones_stay(change, message):
    live = quantize_model(tiny(), "nvfp4")
    before = {n: t.clone() for n, t in live.state_dict().items()}
    weights = moved(tiny())
    change(weights)
    with pytest.raises(ValueError, match=f"^WeightSync.update: .*{message}"):
        WeightSync(live).update(weights)
    assert_same_state(live, before)


def test_the_trainer_s_experts_have_the_engine_s_bits_and_learn():
    trainer, engine = tiny(), quantize_model(tiny(), "fp8")
    quantize_model(trainer, "fp8", trains=True)
    assert isinstance(trainer.model.layers[0].mlp.experts, MasterExperts)
    ids = torch.randint(50, (3, 9))
    assert_same_bits("logits", trainer(ids).logits, engine(ids).logits)
    names = {n for n, _ in tiny().named_parameters()}
    assert {n for n, _ in trainer.named_parameters()} == names
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=3e-3)
    before = trainer.get_parameter(f"{EXPERTS}.down_proj").detach().clone()
    losses = []
    for _ in range(20):
        loss = trainer(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(trainer.get_parameter(f"{EXPERTS}.down_proj"), before)
    WeightSync(engine).update(dict(trainer.named_parameters()))
    assert_same_bits("logits", trainer(ids).logits, engine(ids).logits)


@pytest.mark.parametrize(
    ("kind", "expert", "router"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.4.up_proj", "model.layers.1.mlp.gate"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.4.w3",
            "model.layers.1.block_sparse_moe.gate",
        ),
    ],
)
def test_a_checkpoint_has_the_names_of_the_model_s_own(tmp_path, kind, expert, router):
    from safetensors.torch import load_file

    model = quantize_model(tiny(kind), "nvfp4-compressed-tensors")
    save_quantized(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = model.model.layers[1].mlp.experts.get_submodule("4").up_proj
    assert_same_bits("codes", tensors[f"{expert}.weight_packed"], layer.data)
    assert tensors[f"{expert}.weight_global_scale"].reciprocal() == layer.global_scale
    assert_same_bits("router", tensors[f"{router}.weight"], model.model.layers[1].mlp.gate.weight)
    how = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(how["ignore"]) == {"lm_head", router, router.replace("layers.1", "layers.0")}
    # nothing is stacked any more
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in tensors)


def test_experts_can_be_left_out_and_others_are_refused():
    model = quantize_model(tiny(), skip=("lm_head", "gate", "experts"))
    assert not any(isinstance(m, QuantizedExperts) for m in model.modules())
    odd = nn.ModuleDict({"experts": nn.Module()})
    odd["experts"].gate_up_proj = nn.Parameter(torch.zeros(2, 64, 96))
    odd["experts"].down_proj = nn.Parameter(torch.zeros(2, 48, 64))
    with pytest.raises(ValueError, match="at experts: name it in skip"):
        quantize_model(odd)
