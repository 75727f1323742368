"""Documentation that is held to the code: its examples run, its links resolve, its lists are whole.

Every block of Python in README, CONTRIBUTING and docs is run, page by page, one block after the
other in the same names. One that cannot be has `<!-- not run: why -->` above it.
"""

import copy
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlkern

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S
)
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
FENCED = [page for page in PAGES if "```python\n" in page.read_text()]
SOURCES = [f"{part}/**/*.py" for part in ("rlkern", "bench", "tests", "docs")]
SOURCES += [f"csrc/**/*{kind}" for kind in (".h", ".cpp", ".cu", ".cuh")]
SOURCES += ["bench/*.sh", ".ci/run", "Makefile", "setup.py"]
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))

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

    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "num_pages": 64}
    cache = TreeKVCache(**shape, dtype=torch.float32)
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
    trees = {"cache": _tree(folder)["cache"], "groups": [0], "prompt_lengths": [3]}
    return _group(folder) | shared | trees | {"objective": objective, "old": torch.randn(T)}


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

    from rlkern.quant import WeightSync, quantize_model

    model = AutoModelForCausalLM.from_config(tiny())
    other = WeightSync(quantize_model(copy.deepcopy(model), "nvfp4-modelopt"))
    given = dict(model.named_parameters())
    other.update(given)
    return {"model": model, "weights": given, "other_copy": other}


def _packed(folder: Path) -> dict:
    return {name: torch.randn(T) for name in ("rewards", "returns", "old_values")}


def _values(folder: Path) -> dict:
    return _packed(folder) | {"values": torch.randn(T, requires_grad=True)}


def _smc(folder: Path) -> dict:
    given = _tree(folder)
    given["cache"].append_slots(given["branches"])
    last = rlkern.sample_tokens(
        torch.randn(2, V), seed=0, branch_ids=given["branches"], positions=torch.zeros(2).long()
    )
    weights = {"log_w": torch.zeros(2), "u": torch.rand(1), "groups": torch.tensor([0, 2])}
    return given | weights | {"alpha": 4.0, "out": last, "parents": None}


def _heads(folder: Path) -> dict:
    norm = torch.nn.Module()
    norm.weight, norm.variance_epsilon = torch.ones(16), 1e-6
    turn = {"cos": torch.ones(T, 8), "sin": torch.zeros(T, 8)}
    heads = {"x": torch.randn(T, 16), "q": torch.randn(T, 2, 16), "eps": 1e-6}
    return {"norm": norm, "q_norm": norm, **heads, **turn}


def _rows(folder: Path) -> dict:
    rows = {"uid": torch.arange(T), "length": torch.arange(T)}
    return rows | {"run_seed": 1, "hidden": torch.randn(T, H)}


def _kept(folder: Path) -> dict:
    from types import SimpleNamespace

    ids = torch.arange(V).repeat(T)
    return {"mask": SimpleNamespace(token_ids=ids, offsets=torch.arange(T + 1) * V)}


def _branches(folder: Path) -> dict:
    from types import SimpleNamespace

    embedding = torch.nn.Embedding(V, H)
    return {"model": SimpleNamespace(get_input_embeddings=lambda: embedding)}


def _distill(folder: Path) -> dict:
    teacher = torch.nn.Linear(2 * H, V, bias=False)
    return {"teacher_hidden": torch.randn(T, 2 * H), "teacher_head": teacher}


def _merge(folder: Path) -> dict:
    parts = {name: torch.randn(T, 2, 16) for name in ("out_prefix", "out_suffix")}
    return parts | {name: torch.randn(T, 2) for name in ("lse_p", "lse_s")}


OWN = {
    "docs/kv.md": _kv,
    "docs/quant.md": _quant,
    "docs/ops/branch_select.md": _branches,
    "docs/ops/gae.md": _values,
    "docs/ops/linear_distill_loss.md": _distill,
    "docs/ops/merge_attention.md": _merge,
    "docs/ops/policy_loss.md": lambda folder: {"log": dict},
    "docs/ops/quantize_nvfp4.md": lambda folder: {n: torch.randn(32, 64) for n in ("gate", "up")},
    "docs/ops/quantized_linear.md": lambda folder: {
        "x": torch.randn(3, 256),
        "bias": torch.randn(128),
        "weight": torch.randn(128, 256, requires_grad=True),
    },
    "docs/ops/rms_norm.md": _heads,
    "docs/ops/sample_tokens.md": _rows,
    "docs/ops/segment_reduce.md": lambda folder: {"is_response": torch.ones(T, dtype=torch.bool)},
    "docs/ops/shared_prefix_attention.md": _group,
    "docs/ops/smc_resample.md": _smc,
    "docs/ops/sparse_linear_logprob.md": _kept,
    "docs/ops/suffix_similarity.md": lambda folder: {
        name: torch.randint(V, (4, 20)) for name in ("child", "parent")
    },
    "docs/ops/tree_attention.md": _tree,
    "docs/ops/value_loss.md": _values,
    "docs/ops/write_kv.md": _tree,
}


@pytest.mark.no_poison  # transformers reads memory that it has not written
@pytest.mark.parametrize("page", FENCED, ids=name_of)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = names(name_of(page), tmp_path)
    for block in BLOCK.finditer(page.read_text()):
        if block["why"] is None:
            line = page.read_text()[: block.start("code")].count("\n")
            code = compile("\n" * line + block["code"], name_of(page), "exec")
            exec(code, given)


@pytest.mark.parametrize("page", FENCED, ids=name_of)
def test_every_example_is_told_apart(page):
    """None that the test above would not see: indented, or with options after the language."""
    text = page.read_text()
    assert len(re.findall(r"^\s*```+ *py", text, re.M)) == len(BLOCK.findall(text))
    assert all(b["why"] is None or len(b["why"]) > 10 for b in BLOCK.finditer(text))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path, tmp_path):
    run = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout
    assert f"[{path.name}]({path.name})" in (ROOT / "docs/examples/README.md").read_text()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text()), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {s + f"-{i}" * (i > 0) for s, n in found.items() for i in range(n + 1)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    """In the checkout, as on GitHub; the site's build says so of the site."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs/env.md").read_text()
    listed = re.findall(r"^\| `(RLKERN_\w+)` \|", page, re.M)
    assert len(listed) == len(set(listed))
    used = set()
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            # in C++ macros have such names, too
            python = path.suffix not in (".h", ".cpp", ".cu", ".cuh")
            name = r"\b(RLKERN_[A-Z_]*[A-Z])\b" if python else r"getenv\(\"(RLKERN_\w+)\""
            used |= set(re.findall(name, path.read_text())) if path != Path(__file__) else set()
    assert used == set(listed)


def test_the_api_has_every_public_name():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    for package in site.PACKAGES:
        module = importlib.import_module(package)
        names = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
        constants = {
            name for name in names if name.isupper() and name not in site.public_names(package)
        }
        assert set(site.public_names(package)) >= names - constants, package
        for name in set(site.public_names(package)):
            assert inspect.getdoc(getattr(module, name)), f"{package}.{name} has no docstring"


def test_every_result_is_shown():
    """A file under bench/results that no page has a table of is measured for nobody."""
    shown = {n for page in PAGES for n in re.findall(r"bench:begin ([\w-]+)", page.read_text())}
    assert {path.stem for path in (ROOT / "bench/results").glob("*/*.json")} <= shown
