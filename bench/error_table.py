"""Errors of log-probs, entropies and gradients against float64, ours beside every peer's.

    python -m bench.error_table

writes bench/results/<machine>/error_table.json, and error_table_gradients.json. Other packages that
are installed add their rows: .venv-peers, which `make test-peers` makes, has them all.
The float64 yardstick starts from the same rounded hidden states and weights. Rows of three kinds:
"flat" (entropy near log V), "typical" (a policy in training) and "peaked" (one token 20 to 40 above
the rest, as in a converged policy).
Gradients: relative RMS errors of those of both inputs, from random upstream gradients of log-probs
and entropies; more tokens and a narrower head, so that every peer adds up several tiles.
"""

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import rlkern
from bench import peers
from bench.harness import ROOT
from bench.machine import machine
from bench.oracles import linear_peers, versions
from bench.shapes import Head

VALUES, GRADIENTS = Head(256, 896, 65536), Head(1024, 128, 65536)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch's own float16 products of a backward take minutes on a CPU
GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
SPREAD = {"flat": 0.3, "typical": 3.0, "peaked": 3.0}
PEAK = 30.0


def inputs(kind: str, dtype: torch.dtype, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(head.tokens, head.hidden, generator=random)
    weight = torch.randn(head.vocab, head.hidden, generator=random)
    weight *= SPREAD[kind] / head.hidden**0.5
    targets = torch.randint(head.vocab, (head.tokens,), generator=random)
    if kind == "peaked":
        weight[targets] += hidden * PEAK / hidden.square().sum(1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), targets


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    out = rlkern.linear_logprob(hidden, weight, targets, outputs=("logprob", "entropy"))
    return out.logprob, out.entropy


def wide(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return peers.logprob_entropy(hidden.float() @ weight.float().T, targets)


def double(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    logprob = log_p.gather(-1, targets[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def implementations(dtype: torch.dtype) -> dict[str, Callable]:
    found = {"rlkern": ours, "torch, float32 logits": wide}
    if dtype != torch.float32:
        found["torch, 16-bit logits"] = peers.linear_logprob_entropy
    for name, peer in linear_peers().items():
        found[name] = lambda h, w, t, call=peer.call: call(h, w, t, 1.0)
    return found


def value_errors(kind: str, dtype: torch.dtype) -> dict[str, dict]:
    """By implementation."""
    problem = inputs(kind, dtype, VALUES)
    rows = {}
    with torch.no_grad():
        truth = double(*problem)
        for name, call in implementations(dtype).items():
            rows[name] = {}
            for output, got, want in zip(("logprob", "entropy"), call(*problem), truth):
                # a peer without entropies has None there
                error = None if got is None else (got.double() - want).abs()
                rows[name][f"{output}_mean"] = None if got is None else error.mean().item()
                rows[name][f"{output}_max"] = None if got is None else error.max().item()
    return rows


def gradient_errors(kind: str, dtype: torch.dtype) -> dict[str, dict]:
    """By implementation; a peer without entropies has none."""
    *leaves, targets = inputs(kind, dtype, GRADIENTS)
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(GRADIENTS.tokens, generator=random) for _ in range(2)]

    def gradients(call: Callable, leaves: list[Tensor], upstream: list[Tensor]) -> tuple | None:
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        values = call(*leaves, targets)
        if any(value is None for value in values):
            return None
        return torch.autograd.grad(values, leaves, upstream)

    truth = gradients(double, [x.double() for x in leaves], [x.double() for x in upstream])
    rows = {}
    for name, call in implementations(dtype).items():
        found = gradients(call, leaves, upstream)
        if found is None:
            continue
        errors = [(got.double() - want).norm() / want.norm() for got, want in zip(found, truth)]
        rows[name] = {"d hidden": errors[0].item(), "d weight": errors[1].item()}
    return rows


def main() -> int:
    info = machine()
    folder = ROOT / "bench/results" / info["name"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, errors, dtypes, head in (
        ("error_table", value_errors, DTYPES, VALUES),
        ("error_table_gradients", gradient_errors, GRADIENT_DTYPES, GRADIENTS),
    ):
        rows = []
        for kind in SPREAD:
            for dtype in dtypes:
                about = {"rows": kind, "dtype": str(dtype).removeprefix("torch.")}
                for variant, figures in errors(kind, dtype).items():
                    rows.append(about | {"variant": variant} | figures)
                    print(rows[-1], flush=True)
        saved = {
            "kind": "errors",
            "machine_info": info,
            "versions": versions(),
            "command": "python -m bench.error_table",
            "shape": head._asdict(),
            "rows": rows,
        }
        path = folder / f"{name}.json"
        path.write_text(json.dumps(saved, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
