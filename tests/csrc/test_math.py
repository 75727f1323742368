"""Compiles the maths headers with the system's C++ compiler alone and runs their own tests."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "csrc/include"
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.mark.parametrize("source", sorted(HERE.glob("test_*.cpp")), ids=lambda p: p.stem)
def test_maths_in_double(source, tmp_path):
    program = tmp_path / source.stem
    subprocess.run([COMPILER, *FLAGS, str(source), "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("header", sorted(INCLUDE.rglob("*.h")), ids=lambda p: p.name)
def test_a_header_compiles_alone(header, tmp_path):
    """Without torch, without CUDA."""
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\nint main() {{}}\n')
    subprocess.run([COMPILER, *FLAGS, "-fsyntax-only", str(source)], check=True)
