"""Documentation that is held to the code: its examples run, its links resolve, its lists are whole.

Every block of Python in README, CONTRIBUTING and docs is run, page by page, one block after the
other in the same names. One that cannot be has `<!-- not run: why -->` above it.
"""

import ast
import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern.rollout import strategies
from rlkern.testing.implementations import OPS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
FENCED = [page for page in PAGES if "```python\n" in page.read_text()]

T, S, H, V = 24, 4, 16, 64  # tokens, sequences, hidden, vocabulary


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def names(page: str, folder: Path) -> dict:
    """What the examples of a page take for granted."""
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(H, V, bias=False)
    tokens = torch.randint(V, (T,))
    cu_seqlens = torch.arange(S + 1) * (T // S)
    logprob = torch.randn(T, requires_grad=True)
    given = {
        "torch": torch,
        "rlkern": rlkern,
        "copy": copy,
        "hidden": torch.randn(T, H, requires_grad=True),
        "lm_head": lm_head,
        "head": lm_head.weight,
        "tokens": tokens,
        "targets": tokens,
        "logits": torch.randn(T, V),
        "logprob": logprob,
        "old_logprob": logprob.detach() + 0.01,
        "advantages": torch.randn(S),
        "rewards": torch.rand(S),
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "cu_seqlens": cu_seqlens,
        "mask": torch.ones(T, dtype=torch.bool),
        "weight": torch.randn(128, 256),
    }
    return given | OWN.get(page, lambda folder: {})(folder)


def _tree(folder: Path) -> dict:
    """A decode step over a cache of two branches."""
    from rlkern.kv import TreeKVCache

    cache = TreeKVCache(num_layers=1, num_kv_heads=1, head_dim=16, num_pages=64)
    root = cache.new(torch.tensor([5, 6, 7]))
    cache.append_slots(root)
    branches = cache.fork(root, 2)
    cache.append(branches, torch.tensor([8, 9]))
    rows = {"key": torch.randn(2, 1, 16), "value": torch.randn(2, 1, 16)}
    turn = {"cos": torch.ones(2, 8), "sin": torch.zeros(2, 8)}
    given = {"cache": cache, "branches": branches, "layer": 0, "q": torch.randn(2, 2, 16)}
    return given | rows | turn


def _group(folder: Path) -> dict:
    """Two prompts of three tokens, two responses of each."""
    return {
        "prompts": torch.tensor([1, 2, 3, 4, 5, 6]),
        "prompt_cu_seqlens": torch.tensor([0, 3, 6]),
        **{name: torch.randn(6 + T, 2, 16) for name in ("q", "k", "v")},
    }


def _kv(folder: Path) -> dict:
    from transformers import AutoModelForCausalLM

    from rlkern import kv
    from rlkern.kv import hf

    model = AutoModelForCausalLM.from_config(tiny())
    objective = rlkern.PolicyObjective.preset("grpo")
    shared = {"kv": kv, "hf": hf, "model": model, "head": model.lm_head.weight}
    return _group(folder) | shared | {"objective": objective}


def tiny():
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )


def _quant(folder: Path) -> dict:
    from transformers import AutoModelForCausalLM

    return {"model": AutoModelForCausalLM.from_config(tiny()).bfloat16()}


OWN = {}
