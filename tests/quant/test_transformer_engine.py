"""Transformer Engine's tensors, which need a GPU: against what its source says of their arguments,
attributes and scales (TransformerEngine 01634950 and 006b3360), recorded here."""

import enum
import math
import sys
import types

import pytest
import torch

import rlkern
from rlkern.quant.transformer_engine import from_transformer_engine, to_transformer_engine
from rlkern.testing.numerics import assert_same_bits


class DType(enum.Enum):
    kFloat8E4M3 = 1
    kFloat8E5M2 = 2
    kFloat4E2M1 = 3


class Recorded:
    """Keeps each argument under its name and an underscore, as theirs do."""

    def __init__(self, *, shape, dtype, requires_grad, quantizer, **arguments):
        assert set(arguments) == self.ARGUMENTS
        self.shape, self.dtype, self._quantizer = shape, dtype, quantizer
        for name, value in arguments.items():
            setattr(self, f"_{name}", value)


ROWWISE = {"rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"}


class Float8BlockwiseQTensor(Recorded):
    ARGUMENTS = ROWWISE | {"fp8_dtype", "is_2D_scaled"}

    def dequantize(self):
        rows, columns = self._rowwise_data.shape
        values = self._rowwise_data.view(torch.float8_e4m3fn).float()
        across = math.ceil(columns / 128)
        if self._is_2D_scaled:
            assert self._rowwise_scale_inv.shape == (math.ceil(rows / 128), -(-across // 4) * 4)
            scale = self._rowwise_scale_inv.repeat_interleave(128, 0)[:rows]
        else:
            assert self._rowwise_scale_inv.shape == (across, -(-rows // 4) * 4)
            scale = self._rowwise_scale_inv.T[:rows]
        return values * scale.repeat_interleave(128, 1)[:, :columns]


class NVFP4Tensor(Recorded):
    ARGUMENTS = ROWWISE | {
        "amax_rowwise",
        "amax_columnwise",
        "fp4_dtype",
        "with_gemm_swizzled_scales",
    }

    def dequantize(self):
        rows, columns = self._rowwise_data.shape[0], 2 * self._rowwise_data.shape[1]
        assert self._rowwise_scale_inv.dtype == torch.uint8
        high, wide = -(-rows // 128) * 128, -(-(columns // 16) // 4) * 4
        assert self._rowwise_scale_inv.shape == (high, wide)
        assert self._amax_rowwise.shape == (1,)
        scale = self._rowwise_scale_inv
        if self._with_gemm_swizzled_scales:
            tiles = scale.view(high // 128, wide // 4, 32, 4, 4)
            scale = tiles.permute(0, 3, 2, 1, 4).reshape(high, wide)
        scale = scale[:rows, : columns // 16].contiguous().view(torch.float8_e4m3fn).float()
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = torch.stack((self._rowwise_data & 15, self._rowwise_data >> 4), -1)
        codes = codes.view(rows, columns).long()
        values = table[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        return values * scale.repeat_interleave(16, 1) * (self._amax_rowwise / (6 * 448))


class Float8BlockQuantizer:
    def __init__(
        self,
        fp8_dtype,
        *,
        rowwise,
        columnwise,
        amax_epsilon=0.0,
        force_pow_2_scales=True,
        block_scaling_dim=2,
    ):
        self.dtype, self.rowwise_usage, self.columnwise_usage = fp8_dtype, rowwise, columnwise
        self.force_pow_2_scales, self.block_scaling_dim = force_pow_2_scales, block_scaling_dim


@pytest.fixture
def engine(monkeypatch):
    """Modules of the names that theirs have."""
    folder = "transformer_engine.pytorch.tensor"
    tensor = types.ModuleType(folder)
    blocks = types.ModuleType(f"{folder}.float8_blockwise_tensor")
    blocks.Float8BlockwiseQTensor = Float8BlockwiseQTensor
    blocks.Float8BlockQuantizer = Float8BlockQuantizer
    fours = types.ModuleType(f"{folder}.nvfp4_tensor")
    fours.NVFP4Tensor = NVFP4Tensor
    tensor.float8_blockwise_tensor, tensor.nvfp4_tensor = blocks, fours
    torch_part = types.ModuleType("transformer_engine_torch")
    torch_part.DType = DType
    outer = [types.ModuleType(n) for n in ("transformer_engine", "transformer_engine.pytorch")]
    for module in (*outer, tensor, blocks, fours, torch_part):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def same(a, b):
    for name in ("data", "scale", "global_scale"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours is not None:
            assert_same_bits(name, ours.contiguous(), theirs.contiguous())
    assert (a.format, a.shape, a.layout) == (b.format, b.shape, b.layout)


@pytest.mark.parametrize("shape", [(128, 256), (130, 700), (7, 129)])
@pytest.mark.parametrize("granularity", ["block128", "group128"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_blocks_there_and_back(engine, shape, granularity, power_of_two):
    w = torch.randn(shape)
    q = rlkern.quantize_fp8(w, granularity, recipe="te", power_of_two=power_of_two)
    theirs = to_transformer_engine(q, torch.float16)
    assert (theirs.shape, theirs.dtype) == (shape, torch.float16)
    assert theirs._columnwise_data is None
    quantizer = theirs._quantizer
    assert quantizer.force_pow_2_scales == power_of_two
    assert quantizer.block_scaling_dim == (2 if granularity == "block128" else 1)
    assert (quantizer.rowwise_usage, quantizer.columnwise_usage) == (True, False)
    assert_same_bits("values", theirs.dequantize(), rlkern.dequantize(q))
    assert theirs._rowwise_data.data_ptr() == q.data.data_ptr()
    same(from_transformer_engine(theirs), q)


@pytest.mark.parametrize("shape", [(128, 64), (144, 1040), (16, 16)])
@pytest.mark.parametrize("layout", ["linear", "swizzle_128x4"])
@pytest.mark.parametrize("options", [{}, {"block": "16x16"}, {"four_over_six": True}])
def test_nvfp4_there_and_back(engine, shape, layout, options):
    w = torch.randn(shape)
    if "four_over_six" in options:
        # A / 1536 is 2688 times a float32 for about nine in ten amaxes
        options = options | {"amax": torch.tensor(6.0)}
    q = rlkern.quantize_nvfp4(w, "te", layout=layout, **options)
    theirs = to_transformer_engine(q)
    assert theirs._with_gemm_swizzled_scales == (layout != "linear")
    if not options:
        torch.testing.assert_close(theirs._amax_rowwise[0], w.abs().max(), rtol=2**-23, atol=0)
    assert_same_bits("values", theirs.dequantize(), rlkern.dequantize(q))
    same(from_transformer_engine(theirs), rlkern.quantize_nvfp4(w, "te", **options))


@pytest.mark.parametrize("recipe", ["torchao", "modelopt"])
def test_other_recipes_of_an_amax_over_2688_fit(engine, recipe):
    for _ in range(20):
        q = rlkern.quantize_nvfp4(torch.randn(16, 64), recipe)
        assert_same_bits(recipe, to_transformer_engine(q).dequantize(), rlkern.dequantize(q))


def test_a_global_scale_that_no_amax_gives_is_refused(engine):
    refused = 0
    for _ in range(40):
        q = rlkern.quantize_nvfp4(torch.randn(16, 64), "vllm")
        try:
            theirs = to_transformer_engine(q)
        except ValueError as error:
            assert "no float32 over 2688 is" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert_same_bits("values", theirs.dequantize(), rlkern.dequantize(q))
    assert 0 < refused < 40


def test_what_does_not_fit_is_refused(engine):
    w = torch.randn(8, 128)
    with pytest.raises(ValueError, match=r"^to_transformer_engine: .*N a multiple of 16, got"):
        to_transformer_engine(rlkern.quantize_nvfp4(w))
    with pytest.raises(ValueError, match=r"q\.format to be one of .*, got 'fp8_row'"):
        to_transformer_engine(rlkern.quantize_fp8(w, "row"))
    with pytest.raises(TypeError, match="expected q to be a QuantizedTensor, got Tensor"):
        to_transformer_engine(w)
    with pytest.raises(TypeError, match=r"expected a Float8BlockwiseQTensor .*, got Tensor"):
        from_transformer_engine(w)
    theirs = to_transformer_engine(rlkern.quantize_fp8(w, "block128"))
    theirs._fp8_dtype = DType.kFloat8E5M2
    with pytest.raises(ValueError, match=r"with E4M3 codes, got DType\.kFloat8E5M2"):
        from_transformer_engine(theirs)
    theirs._rowwise_data = None
    with pytest.raises(ValueError, match="with rowwise data, got columnwise data alone"):
        from_transformer_engine(theirs)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", None)
    q = rlkern.quantize_fp8(torch.randn(8, 128), "block128")
    with pytest.raises(RuntimeError, match="pip install transformer-engine"):
        to_transformer_engine(q)
