"""build.toml, for Hugging Face's kernel-builder, lists what setup.py builds."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(monkeypatch):
    """The names in setup.py, which has built nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setenv("RLKERN_BUILD_CUDA", "0")
    return runpy.run_path(str(ROOT / "setup.py"))


def test_the_sources_are_those_of_setup(setup):
    build = tomllib.loads((ROOT / "build.toml").read_text())
    kernels, torch = build["kernel"], build["torch"]
    listed = {name: set(held["src"]) for name, held in kernels.items()}
    sources = setup["sources"]
    compiled = {
        "cpu": set(sources("csrc/cpu", ".cpp")),
        "cuda": set(sources("csrc/cuda", ".cu") + sources("csrc/cuda", ".cpp")),
    }
    headers = {str(Path(path).relative_to(ROOT)) for path in setup["headers"]()}
    for name, wanted in compiled.items():
        assert wanted
        own = {path for path in headers if path.startswith(f"csrc/{name}/")}
        assert listed[name] == wanted | own, f"[kernel.{name}] of build.toml"
        assert kernels[name]["include"] == torch["include"] == ["csrc/include", "csrc/torch"]
    shared = {path for path in headers if re.match(r"csrc/(include|torch)/", path)}
    assert set(torch["src"]) == shared, "[torch] of build.toml"
    assert build["general"]["backends"] == sorted(kernels)


def test_the_flags_that_change_results_are_those_of_setup(setup):
    build = tomllib.loads((ROOT / "build.toml").read_text())["kernel"]
    for flag in ("-std=c++20", "-fno-math-errno", "-fno-trapping-math", *setup["STABLE"]):
        assert flag in setup["CXX"]
        assert flag in build["cpu"]["cxx-flags"]
    assert setup["STABLE"][0] in build["cuda"]["cuda-flags"]
