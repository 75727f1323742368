"""The KV tree under random operations against a dense dictionary, compiled with the sanitizers.

FUZZ_OPERATIONS=1500000 FUZZ_SEED=7 pytest tests/csrc/test_tree.py    is the long run of docs/kv.md
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HOST = HERE.parents[1] / "csrc/host"
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS", f"-I{HOST}"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# A stack is kept for every allocation: short ones, or the run takes ten times as long.
SANITIZERS += ["-fno-omit-frame-pointer"]
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "malloc_context_size=2"}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.mark.slow
def test_no_operation_breaks_the_tree(tmp_path):
    operations = os.environ.get("FUZZ_OPERATIONS", "200000")
    program = tmp_path / "fuzz_tree"
    sources = [str(HERE / "fuzz_tree.cpp"), str(HOST / "tree.cpp")]
    subprocess.run([COMPILER, *FLAGS, *SANITIZERS, *sources, "-o", str(program)], check=True)
    command = [str(program), operations, os.environ.get("FUZZ_SEED", "0")]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    assert run.stdout.startswith(f"{operations} operations, ")
