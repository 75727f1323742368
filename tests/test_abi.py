"""The compiled libraries take nothing of torch but its stable ABI, and a smoke test tells."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlkern import _native
from rlkern.testing import abi, self_test

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


@pytest.mark.parametrize("name", abi.LIBRARIES)
def test_nothing_is_taken_that_another_torch_may_lack(name):
    path = _native.path_of(name)
    if path is None:
        pytest.skip(f"{name} was not built")
    assert abi.problems(name, path) == []


def test_a_torch_symbol_outside_the_stable_abi_is_found():
    """torch's own library takes C++ functions of libc10."""
    path = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    found = abi.problems("_C_cpu", path)
    assert any("c10" in line and line.startswith("takes ") for line in found)
    assert any(line.startswith("exports ") for line in found)


def test_versions_are_read():
    found = abi.needs(_native.path_of("_C_cpu"))
    assert "torch_parallel_for" in found.torch
    assert (2, 14) <= found.versions["GLIBC"] < (3,)
    assert not found.python


def test_the_self_test_passes():
    run = subprocess.run(
        [sys.executable, "-m", "rlkern", "--self-test"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for op in self_test.OPS:
        assert op in run.stdout


def test_the_self_test_finds_a_wrong_kernel(monkeypatch, capsys):
    from rlkern.ops.merge_attention import reference

    right = reference.forward

    def wrong(outs, lse):
        out, merged = right(outs, lse)
        return out * 1.1, merged

    monkeypatch.setattr(reference, "forward", wrong)
    monkeypatch.setattr(self_test, "OPS", ("segment_reduce", "merge_attention"))
    assert self_test.main() == 1
    lines = capsys.readouterr().out
    assert "merge_attention  cpu     native     FAILED: " in lines
    assert ": result 0 has " in lines
    assert "segment_reduce   cpu     native          36  0.0" in lines


def test_the_self_test_compares_codes_and_shapes():
    a = torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn)
    with pytest.raises(AssertionError, match="differs in 1 of 2 elements"):
        self_test._compare((a,), (torch.ones(2).to(a.dtype),))
    with pytest.raises(AssertionError, match=r"result 1 is \(2,\) torch.float32"):
        self_test._compare((a, torch.zeros(2)), (a, torch.zeros(3)))
    nan, inf = torch.tensor([float("nan")]), torch.tensor([float("inf")])
    assert self_test._compare((nan, inf), (nan, inf)) == 0
    with pytest.raises(AssertionError, match="result 0 has nan"):
        self_test._compare((nan,), (inf,))
