"""Tensors of torchao, compressed-tensors and ModelOpt from our codes and back: the same bytes, and
values that their own `dequantize` gives bit for bit.

A value of NVFP4 is (code * scale) * global_scale here, and code * (scale * global_scale) there: the
same where the global scale is a power of two, else one rounding apart.
"""

import logging

import pytest
import torch

import rlkern
from rlkern.quant.compressed_tensors import from_compressed_tensors, to_compressed_tensors
from rlkern.quant.modelopt import from_modelopt, to_modelopt
from rlkern.quant.torchao import from_torchao, to_torchao
from rlkern.testing.numerics import assert_same_bits

# torchao has no library for this machine's Python, and says so
logging.getLogger("torchao").setLevel(logging.ERROR)

GRANULARITIES = ("tensor", "row", "block128", "group128", "mx32")
SHAPES = [(256, 384), (128, 128), (130, 320)]
TORCHAO = [((256, 384), g) for g in GRANULARITIES] + [((130, 320), "mx32"), ((130, 320), "row")]
# 2688 / 2^5, so that every recipe's global scale is 2^-5
AMAX = torch.tensor(84.0)


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(got, q, shared=True):
    assert (got.format, got.shape) == (q.format, q.shape)
    assert_same_bits("codes", got.data, q.data)
    assert not shared or got.data.data_ptr() == q.data.data_ptr()
    assert_same_bits("scales", got.scale, q.scale)
    assert (got.layout, got.scale.dtype) == (q.layout, q.scale.dtype)
    if q.global_scale is not None:
        assert_same_bits("global scale", got.global_scale, q.global_scale)


def nvfp4(recipe, known, layout="linear"):
    """Weights in whose dequantised values the order of products cannot be seen, or can."""
    w = matrix((130, 320))
    return rlkern.quantize_nvfp4(w, recipe, amax=AMAX if known else None, layout=layout)


def other_order(q):
    """code * (scale * global_scale)."""
    codes = rlkern.dequantize(q.__class__(**{**vars(q), "scale": torch.ones_like(q.scale)}))
    codes = codes / q.global_scale
    return codes * (q.scale.float() * q.global_scale).repeat_interleave(16, 1)


def check_values(name, got, q, known):
    ours = rlkern.dequantize(q)
    if known:
        return assert_same_bits(name, got, ours)
    assert not torch.equal(got, ours), "an order that cannot be told from ours needs no exception"
    return torch.testing.assert_close(got, ours, rtol=2**-23, atol=0)


@pytest.mark.parametrize(("shape", "granularity"), TORCHAO)
def test_torchao_fp8(shape, granularity):
    pytest.importorskip("torchao")
    q = rlkern.quantize_fp8(matrix(shape), granularity)
    theirs = to_torchao(q, torch.float32)
    assert (theirs.shape, theirs.dtype) == (shape, torch.float32)
    assert_same_bits("values", theirs.dequantize(), rlkern.dequantize(q))
    assert_same_bits(
        "bf16", theirs.dequantize(torch.bfloat16), rlkern.dequantize(q, torch.bfloat16)
    )
    got = from_torchao(theirs)
    same(got, q)
    assert got.recipe == "torchao"


@pytest.mark.parametrize("granularity", ["tensor", "row", "block128", "group128"])
def test_torchao_s_own_fp8_is_ours(granularity):
    """Their tensor of their quantiser, and ours of ours: the same attributes."""
    quantization = pytest.importorskip("torchao.quantization")
    kind = {
        "tensor": quantization.PerTensor(),
        "row": quantization.PerRow(),
        "block128": quantization.PerBlock([128, 128]),
        "group128": quantization.PerBlock([1, 128]),
    }[granularity]
    w = matrix((256, 384))
    theirs = quantization.Float8Tensor.from_hp(w, granularity=kind)
    q = rlkern.quantize_fp8(w, granularity, recipe="torchao")
    same(from_torchao(theirs), q, shared=False)
    made = to_torchao(q, torch.float32)
    assert made.scale.shape == theirs.scale.shape
    assert made.block_size == theirs.block_size
    x = matrix((4, 384), 1)
    assert_same_bits(
        "product",
        torch.nn.functional.linear(x, made.dequantize()),
        torch.nn.functional.linear(x, theirs.dequantize()),
    )


def test_of_two_formats_that_say_the_same_torchao_s_is_the_numbered_one():
    pytest.importorskip("torchao")
    q = rlkern.quantize_fp8(matrix((128, 128)))
    got = from_torchao(to_torchao(q))
    assert got.format == "fp8_block128"
    assert_same_bits("values", rlkern.dequantize(got), rlkern.dequantize(q))


@pytest.mark.parametrize("layout", ["linear", "swizzle_128x4"])
def test_torchao_mx(layout):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    w = matrix((130, 320))
    q = rlkern.quantize_fp8(w, "mx32", recipe="torchao", layout=layout)
    theirs = to_torchao(q, torch.float32)
    assert_same_bits("values", theirs.dequantize(), rlkern.dequantize(q))
    same(from_torchao(theirs), q)
    own = mx.MXTensor.to_mx(
        w,
        torch.float8_e4m3fn,
        scaling_mode=mx.ScaleCalculationMode.RCEIL,
        is_swizzled_scales=layout != "linear",
    )
    assert own.scale.shape == theirs.scale.shape
    assert own.kernel_preference == theirs.kernel_preference
    same(from_torchao(own), q, shared=False)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("layout", ["linear", "swizzle_128x4"])
def test_torchao_nvfp4(layout, known):
    fours = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    q = nvfp4("torchao", known, layout)
    theirs = to_torchao(q, torch.float32)
    check_values("values", theirs.dequantize(), q, known)
    plain = nvfp4("torchao", known)
    assert_same_bits("their order", theirs.dequantize(), other_order(plain))
    same(from_torchao(theirs), q)
    own = fours.NVFP4Tensor.to_nvfp4(
        matrix((130, 320)),
        per_tensor_scale=q.global_scale,
        is_swizzled_scales=layout != "linear",
    )
    assert own.scale.shape == theirs.scale.shape
    same(from_torchao(own), q, shared=False)
    one_level = fours.NVFP4Tensor.to_nvfp4(matrix((130, 320)))
    got = from_torchao(one_level)
    assert_same_bits("one level", rlkern.dequantize(got), one_level.dequantize())


def test_torchao_refuses():
    quantization = pytest.importorskip("torchao.quantization")
    ragged = rlkern.quantize_fp8(matrix((130, 256)), "block128")
    with pytest.raises(ValueError, match=r"^to_torchao: expected q of blocks of \[128, 128\] that"):
        to_torchao(ragged)
    with pytest.raises(TypeError, match="expected q to be a QuantizedTensor, got Tensor"):
        to_torchao(matrix((4, 4)))
    with pytest.raises(TypeError, match="expected a Float8Tensor, MXTensor or NVFP4Tensor, got"):
        from_torchao(matrix((4, 4)))
    theirs = quantization.Float8Tensor.from_hp(
        matrix((64, 64)), granularity=quantization.PerBlock([32, 32])
    )
    with pytest.raises(ValueError, match=r"of the blocks of fp8_block128.*got \[32, 32\]"):
        from_torchao(theirs)
    theirs = quantization.Float8Tensor.from_hp(matrix((64, 64)), torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"with E4M3 codes, got torch\.float8_e5m2"):
        from_torchao(theirs)
    fours = to_torchao(rlkern.quantize_nvfp4(matrix((16, 32)), "torchao"))
    fours.qdata = fours.qdata.t()
    with pytest.raises(ValueError, match=r"to be a matrix, row by row, got \(16, 16\) with"):
        from_torchao(fours)


def decompressed(state, scheme):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    kind = base.BaseCompressor.get_value_from_registry(scheme.format)
    assert set(kind.compression_param_names(scheme)) == set(state)
    return kind.decompress(state, scheme)["weight"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compressed_tensors_fp8(shape, granularity):
    pytest.importorskip("compressed_tensors")
    if granularity == "group128" and shape[1] % 128:
        pytest.skip("their groups divide a row")
    q = rlkern.quantize_fp8(matrix(shape), granularity, recipe="compressed_tensors")
    state, scheme = to_compressed_tensors(q)
    # MXFP8 they expand to bfloat16, which has room for a code times a power of two
    dtype = torch.bfloat16 if granularity == "mx32" else torch.float32
    assert_same_bits("values", decompressed(state, scheme), rlkern.dequantize(q, dtype))
    for how in (scheme, scheme.weights, scheme.weights.model_dump(), scheme.model_dump()):
        same(from_compressed_tensors(state, how), q)


@pytest.mark.parametrize("granularity", ["row", "block128", "group128", "mx32"])
def test_compressed_tensors_own_state_is_ours(granularity):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    w = matrix((256, 384))
    q = rlkern.quantize_fp8(w, granularity, recipe="compressed_tensors")
    state, scheme = to_compressed_tensors(q)
    kind = base.BaseCompressor.get_value_from_registry(scheme.format)
    scale = q.scale.float() if granularity == "mx32" else q.scale
    theirs = kind.compress({"weight": w, "weight_scale": scale}, scheme)
    assert set(theirs) == set(state)
    for name, ours in state.items():
        assert (theirs[name].dtype, theirs[name].shape) == (ours.dtype, ours.shape)
        assert_same_bits(name, theirs[name], ours)
    same(from_compressed_tensors(theirs, scheme), q, shared=False)


@pytest.mark.parametrize("known", [False, True])
def test_compressed_tensors_nvfp4(known):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    q = nvfp4("compressed_tensors", known)
    state, scheme = to_compressed_tensors(q)
    values = decompressed(state, scheme)
    assert values.dtype == torch.bfloat16
    assert_same_bits("their order", values, _divided(state, q).bfloat16())
    if known:
        assert_same_bits("values", values, rlkern.dequantize(q, torch.bfloat16))
    same(from_compressed_tensors(state, scheme), q)
    kind = base.BaseCompressor.get_value_from_registry(scheme.format)
    given = {"weight": matrix((130, 320)), "weight_scale": q.scale.float()}
    theirs = kind.compress(given | {"weight_global_scale": state["weight_global_scale"]}, scheme)
    assert set(theirs) == set(state)
    for name, ours in state.items():
        assert (theirs[name].dtype, theirs[name].shape) == (ours.dtype, ours.shape)
        assert_same_bits(name, theirs[name], ours)
    swizzled, _ = to_compressed_tensors(nvfp4("compressed_tensors", known, "swizzle_128x4"))
    assert_same_bits("unswizzled", swizzled["weight_scale"], q.scale)


def _divided(state, q):
    """code * (scale / S)."""
    codes = rlkern.dequantize(q.__class__(**{**vars(q), "scale": torch.ones_like(q.scale)}))
    codes = codes / q.global_scale
    return codes * (q.scale.float() / state["weight_global_scale"]).repeat_interleave(16, 1)


def test_compressed_tensors_refuses():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    q = nvfp4("compressed_tensors", False)
    state, scheme = to_compressed_tensors(q)
    del state["weight_global_scale"]
    with pytest.raises(ValueError, match=r"with weight_packed, .*got no weight_global_scale"):
        from_compressed_tensors(state, scheme)
    integers = quantization.QuantizationArgs(num_bits=8, type="int", strategy="channel")
    with pytest.raises(ValueError, match=r"expected scheme of the weights of .*'type': 'int'"):
        from_compressed_tensors(state, integers)
    fp8, scheme = to_compressed_tensors(rlkern.quantize_fp8(matrix((256, 256)), "block128"))
    fp8["weight_scale"] = fp8["weight_scale"][:1]
    with pytest.raises(ValueError, match=r"with weight_scale of \(2, 2\) blocks, got \(1, 2\)"):
        from_compressed_tensors(fp8, scheme)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_modelopt_fp8(shape, granularity):
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    w = matrix(shape)
    q = rlkern.quantize_fp8(w, granularity, recipe="modelopt")
    theirs, scales = to_modelopt(q, torch.float32)
    if shape[0] % 128 == 0 or granularity in ("tensor", "row", "mx32"):
        assert_same_bits("values", theirs.dequantize(**scales), rlkern.dequantize(q))
    same(from_modelopt(theirs, **scales), q)
    if granularity == "mx32":
        own, scale = qtensor.MXFP8QTensor.quantize(w.clone())[:2]
        how = {"scale": scale, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
    else:
        how = {"axis": 0} if granularity == "row" else {"block_sizes": scales["block_sizes"]}
        own, scale = qtensor.FP8QTensor.quantize(w.clone(), **how)
        how = {"scale": scale, "block_sizes": scales["block_sizes"]}
    same(from_modelopt(own, **how), q, shared=False)


@pytest.mark.parametrize("known", [False, True])
def test_modelopt_nvfp4(known):
    fours = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    wrapper = pytest.importorskip("modelopt.torch.quantization.qtensor").QTensorWrapper
    q = nvfp4("modelopt", known)
    theirs, scales = to_modelopt(q, torch.float32)
    # their table has 0 for -0
    values = theirs.dequantize(**scales)
    assert not bool(values[values == 0].signbit().any())
    values = torch.where((values == 0) & rlkern.dequantize(q).signbit(), -values, values)
    check_values("values", values, q, known)
    assert_same_bits("their order", values, other_order(q))
    same(from_modelopt(theirs, **scales), q)
    same(from_modelopt(wrapper(theirs), **scales), q)
    if not known:
        own, scale, g = fours.NVFP4QTensor.quantize(matrix((130, 320)), 16)
        how = {"scale": scale, "double_scale": g, "block_sizes": {-1: 16, "type": "dynamic"}}
        same(from_modelopt(own, **how), q, shared=False)


def test_modelopt_s_own_quantizer_gives_and_takes_ours():
    """The buffers of their TensorQuantizer are our scales."""
    nn = pytest.importorskip("modelopt.torch.quantization.nn")
    config = pytest.importorskip("modelopt.torch.quantization.config")
    w = matrix((128, 320))
    how = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    quantizer = nn.TensorQuantizer(config.QuantizerAttributeConfig(**how), amax=w.abs().max())
    quantizer._fake_quant = False
    theirs = quantizer(w.clone())
    got = from_modelopt(
        theirs,
        scale=quantizer._scale,
        double_scale=quantizer._double_scale,
        block_sizes=quantizer.block_sizes,
    )
    q = rlkern.quantize_nvfp4(w, "modelopt")
    same(got, q, shared=False)
    made, _ = to_modelopt(q, torch.float32)
    assert_same_bits("values", quantizer(made), quantizer(theirs))


def test_modelopt_refuses():
    pytest.importorskip("modelopt")
    theirs, scales = to_modelopt(rlkern.quantize_fp8(matrix((256, 256)), "block128"))
    with pytest.raises(ValueError, match=r"block_sizes of 128 x 128 with fp8_block128, got"):
        from_modelopt(theirs, scale=scales["scale"], block_sizes={-1: 64, -2: 64})
    with pytest.raises(ValueError, match=r"expected scale of \(2, 2\) blocks, got \(1, 2\)"):
        from_modelopt(theirs, scale=scales["scale"][:1], block_sizes=scales["block_sizes"])
    fours, scales = to_modelopt(nvfp4("modelopt", False))
    with pytest.raises(ValueError, match="expected double_scale with NVFP4, got None"):
        from_modelopt(fours, scale=scales["scale"])
    with pytest.raises(TypeError, match="expected a QTensor, got Tensor"):
        from_modelopt(matrix((4, 4)), scale=matrix((4, 1)))
