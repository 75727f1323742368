"""Group rollouts by `NativeEngine` against Hugging Face `generate`: results/<machine>/rollout.json.

    python -m bench.rollout                        # in .venv-vllm: beside vLLM's CPU build too

Groups of 8 samples, by a randomly initialised model of the demo's size and by one of three times
its width, with a short prompt and with a shared one of 1,024 tokens. No sequence ends early, which
is kind to `generate`: it would go on computing those that have. Rounds in turns, medians.
"""

import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from typing import NamedTuple

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.harness import ROOT
from bench.machine import machine
from rlkern.rollout import NativeEngine, VllmEngine

GROUP = 8
ROUNDS = 9
VLLM = importlib.util.find_spec("vllm") is not None
SIZES = {
    "demo": {"vocab_size": 40, "hidden_size": 128, "intermediate_size": 384, "heads": 4},
    "wide": {"vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1152, "heads": 6},
}


class Case(NamedTuple):
    model: str
    prompts: int
    prompt: int  # tokens
    new: int  # tokens
    dtype: str = "float32"


CASES = [
    Case("demo", 1, 16, 64),
    Case("demo", 8, 16, 64),
    Case("demo", 32, 16, 64),
    Case("demo", 1, 1024, 64),
    Case("demo", 4, 1024, 64),
    Case("wide", 1, 1024, 64),
    Case("wide", 1, 1024, 64, "bfloat16"),
]


def load(name: str, dtype: str) -> Qwen3ForCausalLM:
    sizes = dict(SIZES[name])
    heads = sizes.pop("heads")
    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=sizes["hidden_size"] // heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **sizes,
    )
    return Qwen3ForCausalLM(config).to(getattr(torch, dtype)).eval()


def measure(case: Case) -> dict:
    model = load(case.model, case.dtype)
    ids = torch.randint(1, model.config.vocab_size, (case.prompts, case.prompt))
    prompts, tokens = ids.tolist(), case.prompts * GROUP * case.new
    engines = {
        "rlkern": NativeEngine(model, eos_token_ids=[-1]),
        "unshared": NativeEngine(model, eos_token_ids=[-1], share=False),
    }

    if VLLM:
        engines["vllm"] = VllmEngine(model, eos_token_ids=[-1])

    def native(engine: NativeEngine | VllmEngine) -> int:
        rollouts = engine.generate(prompts, group_size=GROUP, max_new_tokens=case.new)
        return len(rollouts.tokens)

    def generate() -> int:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=GROUP,
            max_new_tokens=case.new,
        )
        return out[:, case.prompt :].numel()

    calls = {name: lambda engine=engine: native(engine) for name, engine in engines.items()}
    calls["generate"] = generate
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, call in calls.items():
            start = time.perf_counter()
            assert call() == tokens, name
            if turn:
                seconds[name].append(time.perf_counter() - start)
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    spread = {name: (max(t) - min(t)) / statistics.median(t) for name, t in seconds.items()}
    return {
        **case._asdict(),
        "tokens_per_second": rates,
        "spread": spread,
        "speedup": rates["rlkern"] / rates["generate"],
        **({"over_vllm": rates["rlkern"] / rates["vllm"]} if VLLM else {}),
        "kv_saved": engines["rlkern"].stats["rollout/kv_saved"],
    }


def main() -> int:
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(rows[-1], flush=True)
    info = machine()
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    saved = {
        "kind": "rollout",
        "machine_info": info,
        "command": f"{'.venv-vllm/bin/' * VLLM}python -m bench.rollout",
        "transformers": transformers.__version__,
        **({"vllm": importlib.import_module("vllm").__version__} if VLLM else {}),
        "group": GROUP,
        "models": SIZES,
        "rows": rows,
    }
    path = ROOT / "bench/results" / info["name"] / "rollout.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
