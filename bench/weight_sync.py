"""A weight sync of Qwen3-0.6B's shapes: results/<machine>/weight_sync.json.

    python -m bench.weight_sync

Times are medians of rounds in turns, without the one in which this process waited longest for a
core: `WeightSync.update` alone, with statistics, and with packets, against a copy that moves as
many bytes as a sync must: every weight is read once, every code and scale written once. The update
between two syncs adds plus or minus the learning rate to each float32 master, as AdamW's first
steps do; the packet holds the linear layers' changed bytes.
"""

import json
import os
import statistics
import sys

import torch
from torch import nn

from bench import harness
from bench.harness import ROOT, copy_of
from bench.machine import machine
from rlkern.quant import WeightSync, quantize_model

LAYERS, HIDDEN, FEED, QUERY, KEY = 28, 1024, 3072, 2048, 1024
LEARNING_RATE = 1e-6
ROUNDS, KEPT = 4, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"q_proj": (HIDDEN, QUERY), "k_proj": (HIDDEN, KEY), "v_proj": (HIDDEN, KEY)}
        sizes |= {"o_proj": (QUERY, HIDDEN), "gate_proj": (HIDDEN, FEED), "up_proj": (HIDDEN, FEED)}
        for name, size in (sizes | {"down_proj": (FEED, HIDDEN)}).items():
            layer = nn.Linear(*size, bias=False, dtype=torch.bfloat16)
            nn.init.normal_(layer.weight, std=0.02)
            self.add_module(name, layer)


def measure(recipe: str, source: str) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS)))
    random = torch.Generator().manual_seed(1)
    masters = {n: p.detach().float() for n, p in model.named_parameters()}
    for w in masters.values():
        # full float32 values, whose bfloat16 is what the model began with, or near
        w += w * torch.empty_like(w).uniform_(-1e-3, 1e-3, generator=random)
    dtype = torch.float32 if source == "float32 masters" else torch.bfloat16
    weights = {n: w.to(dtype) for n, w in masters.items()}
    sync = WeightSync(quantize_model(model, recipe))
    sync.update(weights, statistics=False)
    held = [t for layer in sync.layers.values() for t in (layer.data, layer.scale)]
    code_bytes = sum(t.numel() * t.element_size() for t in held)
    read = sum(w.numel() * w.element_size() for w in weights.values())
    copy = copy_of(read + code_bytes, "cpu")
    runs = {
        "copy_seconds": copy,
        "plain": lambda: sync.update(weights, statistics=False),
        "statistics": lambda: sync.update(weights),
        "delta": lambda: sync.update(weights, delta=True),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            taken[name].append(harness.time_and_wait(run))
    for name, w in masters.items():
        step = torch.where(torch.rand(w.shape, generator=random) < 0.5, 1.0, -1.0)
        weights[name] = (w + LEARNING_RATE * step).to(dtype)
    report = sync.update(weights, delta=True)
    return {
        "recipe": recipe,
        "source": source,
        **{
            name: statistics.median(harness.least_disturbed(rows, KEPT))
            for name, rows in taken.items()
        },
        "code_bytes": code_bytes,
        "bf16_bytes": sum(2 * w.numel() for w in masters.values()),
        "changed_bytes": report.changed_bytes,
        "packet_bytes": report.delta_bytes,
    }


def main() -> int:
    rows = []
    for recipe in ("fp8", "nvfp4"):
        for source in ("float32 masters", "bfloat16"):
            rows.append(measure(recipe, source))
            print(rows[-1], flush=True)
    info = machine()
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    saved = {
        "kind": "weight_sync",
        "machine_info": info,
        "command": "python -m bench.weight_sync",
        "shape": {"layers": LAYERS, "weights": rows[0]["bf16_bytes"] // 2},
        "learning_rate": LEARNING_RATE,
        "rows": rows,
    }
    path = ROOT / "bench/results" / info["name"] / "weight_sync.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
