"""Errors of log-probs and entropies against float64: bench/results/<machine>/error_table.json.

    python -m bench.error_table

Other packages that are installed add their rows: .venv-peers, which `make test-peers` makes, has
them all.
The float64 yardstick starts from the same 16-bit hidden states and weights. Rows of three kinds:
"flat" (entropy near log V), "typical" (a policy in training) and "peaked" (one token 20 to 40 above
the rest, as in a converged policy).
"""

import json
import sys

import torch
from torch import Tensor

import rlkern
from bench.harness import ROOT
from bench.machine import machine
from bench.oracles import linear_peers, versions
from bench.peers import logprob_entropy

TOKENS, HIDDEN, VOCAB = 256, 896, 65536
SPREAD = {"flat": 0.3, "typical": 3.0, "peaked": 3.0}
PEAK = 30.0


def inputs(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=random)
    weight = torch.randn(VOCAB, HIDDEN, generator=random) * SPREAD[kind] / HIDDEN**0.5
    targets = torch.randint(VOCAB, (TOKENS,), generator=random)
    if kind == "peaked":
        weight[targets] += hidden * PEAK / hidden.square().sum(1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), targets


def implementations(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, tuple]:
    ours = rlkern.linear_logprob(hidden, weight, targets, outputs=("logprob", "entropy"))
    with torch.no_grad():
        peers = {
            name: peer.call(hidden, weight, targets, 1.0) for name, peer in linear_peers().items()
        }
    return {
        "rlkern": (ours.logprob, ours.entropy),
        "torch, float32 logits": logprob_entropy(hidden.float() @ weight.float().T, targets),
        "torch, 16-bit logits": logprob_entropy(hidden @ weight.T, targets),
        **peers,
    }


def main() -> int:
    rows = []
    for kind in SPREAD:
        for dtype in (torch.bfloat16, torch.float16):
            hidden, weight, targets = inputs(kind, dtype)
            truth = logprob_entropy_double(hidden, weight, targets)
            for name, values in implementations(hidden, weight, targets).items():
                row = {"rows": kind, "dtype": str(dtype).removeprefix("torch."), "variant": name}
                for output, got, want in zip(("logprob", "entropy"), values, truth):
                    # a peer without entropies has None there
                    error = None if got is None else (got.double() - want).abs()
                    row[f"{output}_mean"] = None if got is None else error.mean().item()
                    row[f"{output}_max"] = None if got is None else error.max().item()
                rows.append(row)
                print(row)
    info = machine()
    shape = {"tokens": TOKENS, "hidden": HIDDEN, "vocab": VOCAB}
    saved = {
        "kind": "errors",
        "machine_info": info,
        "versions": versions(),
        "command": "python -m bench.error_table",
        "shape": shape,
        "rows": rows,
    }
    path = ROOT / "bench/results" / info["name"] / "error_table.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


def logprob_entropy_double(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple:
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    logprob = log_p.gather(-1, targets[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


if __name__ == "__main__":
    sys.exit(main())
