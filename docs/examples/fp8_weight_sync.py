"""A rollout copy of a model in FP8 that follows the trainer's weights, and packets of what changed.

The second copy stands for an engine elsewhere: it gets the bytes that changed, not the weights.
"""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rlkern.quant import WeightSync, quantize_model, save_quantized

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
model = AutoModelForCausalLM.from_config(config)
rollout_model = quantize_model(copy.deepcopy(model), "fp8")
elsewhere = WeightSync(copy.deepcopy(rollout_model))
sync = WeightSync(rollout_model)

# the trainer takes a step
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
ids = torch.randint(config.vocab_size, (4, 16))
model(ids, labels=ids).loss.backward()
optimiser.step()

report = sync.update(dict(model.named_parameters()), delta=True)
changed, packet = report.changed_bytes, report.delta_bytes
print(f"{changed} of {report.num_bytes} bytes changed; a packet of {packet}")
assert 0 < changed < packet
elsewhere.apply(report)
with torch.no_grad():
    here, there = rollout_model(ids).logits, elsewhere.model(ids).logits
    assert torch.equal(here, there)
    far = (here - model(ids).logits).abs().mean() / model(ids).logits.abs().mean()
print(f"logits {far:.1%} from those of the weights in float32")
assert far < 0.2

with tempfile.TemporaryDirectory() as folder:
    save_quantized(rollout_model, Path(folder) / "checkpoint", "compressed-tensors")
    print("checkpoint:", *sorted(p.name for p in (Path(folder) / "checkpoint").iterdir()))
