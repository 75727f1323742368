"""A training step on a group whose prompt is computed once: results/<machine>/share_prefix.json.

    python -m bench.train_share_prefix

8 responses of 256 tokens to a prompt of 1,024, through a small Qwen3 model: log-probs, the loss and
the gradients of all weights. `unshared` has a row for each response (attention: torch's SDPA),
`shared` is the same loss with `optim.share_prefix`. Rounds in turns, medians; the two losses and
gradients are compared first.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import rlkern
from bench.harness import ROOT
from bench.machine import machine
from rlkern.kv import hf
from rlkern.rollout import Rollouts
from rlkern.train.batch import TokenBatch, collate, collate_shared, response_logprobs

SAMPLES, PROMPT, RESPONSE = 8, 1024, 256
VOCAB = 4096
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
ROUNDS = 5


def group() -> Rollouts:
    tokens = SAMPLES * RESPONSE
    return Rollouts(
        prompt_tokens=torch.randint(VOCAB, (PROMPT,)),
        prompt_cu_seqlens=torch.tensor([0, PROMPT]),
        tokens=torch.randint(VOCAB, (tokens,)),
        cu_seqlens=torch.arange(0, tokens + 1, RESPONSE),
        logprob=torch.zeros(tokens),
        group_ids=torch.zeros(SAMPLES, dtype=torch.int64),
        truncated=torch.zeros(SAMPLES, dtype=torch.bool),
    )


def measure(dtype: str) -> dict:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCAB, tie_word_embeddings=False, **SIZES)
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype)).train()
    hf.install(model)
    rollouts, advantages = group(), torch.randn(SAMPLES)

    def step(batch: Callable[[], TokenBatch]) -> torch.Tensor:
        model.zero_grad()
        made = batch()
        out = response_logprobs(model, made)
        loss = rlkern.policy_loss(
            out.logprob,
            out.logprob.detach() - 0.01,
            advantages,
            cu_seqlens=made.cu_seqlens,
            objective="dapo",
        ).loss
        loss.backward()
        return loss.detach()

    batches = {
        "unshared": lambda: collate(rollouts.prompts(), rollouts.responses()),
        "shared": lambda: collate_shared(rollouts, list(range(SAMPLES))),
    }
    found = {}
    for name, batch in batches.items():  # also warms up
        loss = step(batch)
        grads = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        found[name] = (float(loss), grads)
    difference = found["shared"][1] - found["unshared"][1]
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(ROUNDS):
        for name, batch in batches.items():
            start = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "dtype": dtype,
        **medians,
        "speedup": medians["unshared"] / medians["shared"],
        "gradient_difference": float(difference.norm() / found["unshared"][1].norm()),
        "unshared_tokens": SAMPLES * (PROMPT + RESPONSE),
        "shared_tokens": PROMPT + SAMPLES * RESPONSE,
    }


def main() -> int:
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows.append(measure(dtype))
        print(rows[-1], flush=True)
    info = machine()
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    saved = {
        "kind": "share_prefix",
        "machine_info": info,
        "command": "python -m bench.train_share_prefix",
        "shape": {"samples": SAMPLES, "prompt": PROMPT, "response": RESPONSE, "vocab": VOCAB},
        "model": SIZES,
        "rows": rows,
    }
    path = ROOT / "bench/results" / info["name"] / "share_prefix.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
