"""Adapters without the library, or with another version of it than those tested. With it:
tests/peers/test_adapters.py."""

import sys
import types

import pytest
import torch

import rlkern
from rlkern.quant.compressed_tensors import from_compressed_tensors, to_compressed_tensors
from rlkern.quant.modelopt import from_modelopt, to_modelopt
from rlkern.quant.torchao import from_torchao, to_torchao
from rlkern.testing.numerics import assert_same_bits

CALLS = {
    "torchao.quantization": (to_torchao, "Float8Tensor", "torchao"),
    "compressed_tensors.quantization": (
        to_compressed_tensors,
        "QuantizationArgs",
        "compressed-tensors",
    ),
    "modelopt.torch.quantization.qtensor": (to_modelopt, "FP8QTensor", "nvidia-modelopt"),
}


@pytest.fixture
def q():
    return rlkern.quantize_fp8(torch.randn(8, 128), "row")


def put(monkeypatch, path, **held):
    """A module of that name, in packages of its names."""
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, value in held.items():
        setattr(module, name, value)


@pytest.mark.parametrize("path", CALLS)
def test_without_the_package_the_remedy_and_the_versions_are_named(monkeypatch, path, q):
    call, _, package = CALLS[path]
    monkeypatch.setitem(sys.modules, path.partition(".")[0], None)
    with pytest.raises(RuntimeError, match=rf"needs {package} >=0\.\d+,<0\.\d+ \(pip install"):
        call(q)


@pytest.mark.parametrize("path", CALLS)
def test_another_signature_is_refused_before_it_is_called(monkeypatch, path, q):
    call, name, package = CALLS[path]

    def other(quite_another, **more):
        raise AssertionError("called")

    put(monkeypatch, path, **{name: other})
    with pytest.raises(
        RuntimeError, match=rf"expected {path}\.{name}\(.*\) as in {package} .*'quite_another'"
    ):
        call(q)
    put(monkeypatch, path)
    with pytest.raises(RuntimeError, match=rf"{path}\.{name}\(.*there is none"):
        call(q)


def test_reading_needs_nothing_of_theirs(monkeypatch, q):
    """Attributes and mappings are enough."""
    for path in CALLS:
        monkeypatch.setitem(sys.modules, path.partition(".")[0], None)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    state = {"weight": q.data, "weight_scale": q.scale}
    config = {"weights": weights | {"strategy": "channel"}}
    tensor = types.SimpleNamespace(qdata=q.data, scale=q.scale, block_size=[1, 128])
    of_modelopt = types.SimpleNamespace(_quantized_data=q.data)
    for got in (
        from_compressed_tensors(state, config),
        from_torchao(tensor),
        from_modelopt(of_modelopt, scale=q.scale),
    ):
        assert_same_bits(got.recipe, rlkern.dequantize(got), rlkern.dequantize(q))
