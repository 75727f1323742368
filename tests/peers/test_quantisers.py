"""The quantisers' bytes against the libraries whose recipes they follow, on CPU.

A million random elements, zeros, blocks that underflow, negative zeros and outliers. Codes of
blocks whose scale is NaN are not compared: nothing reads them.
"""

import pytest
import torch

import rlkern


def weights():
    """(name, w): random, and random with awkward blocks but without NaN."""
    torch.manual_seed(0)
    yield "random", torch.randn(1024, 1024) * 0.02
    w = torch.randn(256, 1024) * 10.0 ** torch.randint(-4, 1, (256, 1))
    for i, value in enumerate((0.0, -0.0, 1e-30, -1e-38, 6.0, 1e-7, 448.0)):
        w[i, :32] = value
        w[i + 10, 40] = value
        w[i + 20, 64:80] *= 1e-6
    w[128:, 256:384] = 0.0
    yield "awkward", w


def bytes_of(x):
    return x.contiguous().view(torch.uint8)


def agree(what, ours, theirs, scale):
    """Equal bytes wherever the scale of the block is a number, by elements (or pairs) of a row."""
    broken = scale.float().isnan().repeat_interleave(ours.shape[1] // scale.shape[1], 1)
    differ = (bytes_of(ours) != bytes_of(theirs)) & ~broken
    assert not bool(differ.any()), f"{what}: {int(differ.sum())} bytes differ"


def test_torchao_nvfp4():
    tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for name, w in weights():
        q = rlkern.quantize_nvfp4(w, "torchao")
        g = tensor.per_tensor_amax_to_scale(w.abs().max())
        scale, data = tensor.nvfp4_quantize(w, 16, g)
        assert torch.equal(q.global_scale, g)
        assert torch.equal(bytes_of(q.scale), bytes_of(scale.view(q.scale.shape))), name
        agree(name, q.data, data.view(q.data.shape), q.scale)


def test_torchao_mxfp8_and_swizzle():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    for name, w in weights():
        q = rlkern.quantize_fp8(w, "mx32")
        scale, data = mx.to_mx(w, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.RCEIL)
        assert torch.equal(bytes_of(q.scale), bytes_of(scale)), name
        assert torch.equal(bytes_of(q.data), bytes_of(data)), name
        swizzled = rlkern.quantize_fp8(w, "mx32", layout="swizzle_128x4")
        assert torch.equal(bytes_of(swizzled.scale), bytes_of(utils.to_blocked(scale)).flatten())


def test_torchao_fp8():
    quantization = pytest.importorskip("torchao.quantization")
    kinds = {
        "tensor": quantization.PerTensor(),
        "row": quantization.PerRow(),
        "block128": quantization.PerBlock([128, 128]),
    }
    for name, w in weights():
        for granularity, kind in kinds.items():
            q = rlkern.quantize_fp8(w, granularity, recipe="torchao")
            theirs = quantization.Float8Tensor.from_hp(w, granularity=kind)
            what = f"{name} {granularity}"
            assert torch.equal(q.scale.flatten(), theirs.scale.flatten()), what
            number = ~q.data.float().isnan()
            assert torch.equal(theirs.qdata.float().isnan(), ~number), what
            assert torch.equal(bytes_of(q.data)[number], bytes_of(theirs.qdata)[number]), what


def compressed_tensors_args(**options):
    args = pytest.importorskip("compressed_tensors.quantization")
    return args.QuantizationArgs(type="float", symmetric=True, dynamic=False, **options)


def test_compressed_tensors_nvfp4():
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.lifecycle.forward import quantize

    args = compressed_tensors_args(
        num_bits=4, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    for name, w in weights():
        divisor = utils.generate_gparam(w.min(), w.max())
        blocks = w.view(w.shape[0], -1, 16)
        scale, _ = utils.calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor
        )
        data = pack_fp4_to_uint8(quantize(w, scale, None, args, global_scale=divisor))
        q = rlkern.quantize_nvfp4(w, "compressed_tensors")
        assert torch.equal(q.global_scale, torch.ones(()) / divisor.view(()))
        assert torch.equal(bytes_of(q.scale), bytes_of(scale.to(torch.float8_e4m3fn))), name
        agree(name, q.data, data, q.scale)


def test_compressed_tensors_fp8_blocks():
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    from compressed_tensors.quantization.lifecycle.forward import quantize

    args = compressed_tensors_args(num_bits=8, strategy="block", block_structure=[128, 128])
    for name, w in weights():
        tiles = w.view(w.shape[0] // 128, 128, -1, 128)
        scale, zero = utils.calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), args)
        data = quantize(w, scale, zero, args, dtype=torch.float8_e4m3fn)
        q = rlkern.quantize_fp8(w, "block128", recipe="compressed_tensors")
        assert torch.equal(q.scale, scale), name
        assert torch.equal(bytes_of(q.data), bytes_of(data)), name


def test_modelopt_nvfp4():
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    for name, w in weights():
        theirs, scale, g = tensor.NVFP4QTensor.quantize(w.clone(), 16)
        q = rlkern.quantize_nvfp4(w, "modelopt")
        assert torch.equal(q.global_scale, g.view(()))
        assert torch.equal(bytes_of(q.scale), bytes_of(scale)), name
        agree(name, q.data, theirs._quantized_data, q.scale)


def test_modelopt_fp8_blocks():
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    for name, w in weights():
        theirs, scale = qtensor.FP8QTensor.quantize(w.clone(), block_sizes={-1: 128, -2: 128})
        q = rlkern.quantize_fp8(w, "block128", recipe="modelopt")
        assert torch.equal(q.scale, scale.view(q.scale.shape)), name
        number = ~q.data.float().isnan()
        data = theirs._quantized_data.view(q.data.shape)
        assert torch.equal(bytes_of(q.data)[number], bytes_of(data)[number]), name


def test_modelopt_mxfp8():
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    for name, w in weights():
        theirs, scale = qtensor.MXFP8QTensor.quantize(w.clone())[:2]
        q = rlkern.quantize_fp8(w, "mx32")
        assert torch.equal(bytes_of(q.scale), bytes_of(scale).view(q.scale.shape)), name
        assert torch.equal(bytes_of(q.data), bytes_of(theirs._quantized_data)), name
