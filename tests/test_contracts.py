"""What holds for every op, read off the registry and the tree."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern import _library
from rlkern.testing.implementations import OPS, schema_names

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_all_its_parts(op):
    for part in (
        *(f"rlkern/ops/{op}/{n}.py" for n in ("__init__", "op", "reference", "triton", "samples")),
        f"csrc/cpu/{op}.cpp",
        f"tests/ops/test_{op}.py",
        f"bench/ops/bench_{op}.py",
        f"docs/ops/{op}.md",
    ):
        assert (ROOT / part).is_file(), f"{op} has no {part}"
    assert op in rlkern.__all__


def test_every_folder_of_ops_is_listed():
    folders = {p.parent.name for p in (ROOT / "rlkern/ops").glob("*/op.py")}
    assert folders == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_the_compiled_kernel_owns_the_cpu(op):
    for name in schema_names(op):
        owner = _library.OWNERS[name]["CPU"]
        assert owner.kernel == "native", f"{name}: {owner.reason}"
        assert _library.OWNERS[name]["CUDA"].kernel == "triton"


def test_a_second_claim_on_a_key_is_refused():
    name = next(iter(_library.OWNERS))
    with pytest.raises(RuntimeError, match=f"rlkern::{name} on CPU is owned by"):
        _library._claim(name, "CPU", _library.Owner("triton", "late"))


# Which layer may import which: the later ones know the earlier ones.
LAYERS = ["_native", "_library", "_check", "ops", "quant", "kv", "rollout", "report", "train"]


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "rlkern"}


def test_data_flows_one_way():
    for path in (ROOT / "rlkern").rglob("*.py"):
        parts = path.relative_to(ROOT / "rlkern").with_suffix("").parts
        if parts[0] not in LAYERS:
            continue
        for name in _imports(path):
            target = name.split(".")[1] if "." in name else ""
            assert target not in ("integrations", "testing"), f"{path.name} imports {name}"
            if target in LAYERS:
                assert LAYERS.index(target) <= LAYERS.index(parts[0]), f"{path}: {name}"


def test_references_import_torch_and_each_other_alone():
    for path in (ROOT / "rlkern/ops").glob("*/reference.py"):
        for name in _imports(path):
            assert re.fullmatch(r"rlkern\.ops\.\w+\.reference", name), f"{path}: {name}"
    for path in (ROOT / "rlkern/ops").glob("*/triton.py"):
        assert not any("reference" in name for name in _imports(path)), path


def test_import_is_light():
    """No CUDA context (it would break forked rollout workers), no Triton, no transformers."""
    code = (
        "import sys, torch, rlkern; "
        "assert not torch.cuda.is_initialized(); "
        "assert not {'triton', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("backend", "kernel"), [("reference", "reference"), ("triton", "triton"), ("auto", "native")]
)
def test_the_backend_can_be_chosen(backend, kernel):
    code = "from rlkern._library import OWNERS; print({o['CPU'].kernel for o in OWNERS.values()})"
    env = {"PATH": "", "RLKERN_BACKEND": backend, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", "import rlkern; " + code],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert run.stdout.strip() == f"{{'{kernel}'}}", run.stderr


def test_an_unknown_backend_is_refused():
    env = {"PATH": "", "RLKERN_BACKEND": "cuda"}
    run = subprocess.run(
        [sys.executable, "-c", "import rlkern"], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert "RLKERN_BACKEND: expected one of auto, reference, triton, native" in run.stderr


def test_the_report_names_every_op():
    run = subprocess.run(
        [sys.executable, "-m", "rlkern"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    for name in _library.OWNERS:
        assert name in run.stdout
    assert torch.__version__ in run.stdout


def test_the_tables_say_what_the_results_say():
    run = subprocess.run(
        [sys.executable, "-m", "bench.report", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("op", OPS)
def test_triton_kernels_compile_for_every_gpu_without_spills(op):
    pytest.importorskip("triton")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "rlkern.testing.cross_compile", op],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert {r["capability"] for r in results} == {80, 90, 100, 120}
    for r in results:
        assert r["local_bytes"] == 0, f"spills: {r}"
        assert r["shared_bytes"] <= r["shared_limit"], r
