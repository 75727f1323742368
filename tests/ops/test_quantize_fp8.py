"""FP8 by blocks: bytes equal to the libraries' formulas, and the same from every kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks, quant_oracle

import rlkern
from rlkern.ops import _quantized
from rlkern.ops.quantize_fp8 import RECIPES, reference, samples
from rlkern.testing.numerics import assert_same_bits

OP = "quantize_fp8"
NAN, INF = float("nan"), float("inf")
SAME_BYTES = "test_every_kernel_writes_the_same_bytes"
EVERY_RECIPE = [(g, r, p) for g, known in RECIPES.items() for r in known for p in (False, True)]
EVERY_RECIPE = [case for case in EVERY_RECIPE if case[0] != "mx32" or not case[2]]


def awkward(rows, columns):
    """Random rows of many sizes, and zeros, the tiny, the huge, NaN and infinities among them."""
    w = torch.randn(rows, columns) * 10.0 ** torch.randint(-8, 4, (rows, 1))
    w[:128, 128:256] = 0.0
    step = rows // 10
    for i, value in enumerate((-0.0, 0.0, 1e-30, 1e-42, 3e38, NAN, INF, -INF, 448.0, 1e-10)):
        w[i * step, columns // 7] = value
        w[i * step + 1, : columns // 3] = value
    return w


def finite(w):
    return torch.where(w.abs() < 1e30, w, 1.0)


def test_the_encoder_rounds_to_nearest_even_everywhere():
    patterns = np.random.default_rng(0).integers(0, 2**32, 10**6, np.uint32).view(np.float32)
    near = np.random.default_rng(1).normal(0, 100, 10**6).astype(np.float32)
    x = np.concatenate([quant_oracle.edges(quant_oracle.E4M3), patterns, near])
    codes = reference.e4m3(torch.from_numpy(x))
    np.testing.assert_array_equal(codes.numpy(), quant_oracle.e4m3(x))
    kept = torch.from_numpy(x[~np.isnan(x)]).clamp(-448, 448)
    assert torch.equal(kept.to(torch.float8_e4m3fn).view(torch.uint8), reference.e4m3(kept))


@pytest.mark.parametrize(("granularity", "recipe", "power_of_two"), EVERY_RECIPE)
def test_bytes_are_the_formula_s(granularity, recipe, power_of_two):
    """A million elements and every special value, against numpy."""
    hard = awkward(1500, 992)
    zeros = torch.zeros(3, 64)
    for w in (torch.randn(1025, 992) * 0.02, hard, finite(hard), awkward(129, 96), zeros):
        q = rlkern.quantize_fp8(w, granularity, recipe=recipe, power_of_two=power_of_two)
        codes, scale = quant_oracle.fp8(w.numpy(), granularity, recipe, power_of_two)
        np.testing.assert_array_equal(q.data.view(torch.uint8).numpy(), codes)
        got = q.scale.view(torch.uint8) if granularity == "mx32" else q.scale
        np.testing.assert_array_equal(got.numpy().reshape(scale.shape), scale)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_writes_the_same_bytes(device, dtype):
    cases = list(samples.sample_inputs(device, dtype))
    hard = awkward(20, 288).to(device, dtype)
    for high, wide in (*samples.BLOCKS.values(), (1, 32)):
        orders = range(4, 8) if wide == 32 else range(4)
        for order in orders:
            for power in (False, True):
                args = (hard, None, None, high, wide, order, 1e-10, 1e-12, 0.5, power, True)
                cases.append((f"awkward {args[3:]}", args))
    for name, args in cases:
        codes, scales, counts = reference.forward(*args)
        for kernel in checks.kernels(OP, device):
            ours = kernel.forward(*args)
            what = f"{kernel.name} {dtype} {name}"
            assert_same_bits(f"{what} codes", ours[0], codes)
            torch.testing.assert_close(
                ours[1], scales, rtol=0, atol=0, equal_nan=True, msg=f"{what} scales"
            )
            checks.assert_same_counts(what, ours[2], counts)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_same_bits_twice_and_on_any_number_of_threads(device):
    checks.check_deterministic(OP, device, torch.float32)
    w = torch.randn(700, 900, device=device)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([rlkern.quantize_fp8(w, g) for g in ("tensor", "row", "block128")])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same_bits("codes", a.data.view(torch.uint8), b.data.view(torch.uint8))
            assert_same_bits("scale", a.scale, b.scale)


@pytest.mark.gpu
def test_cuda_cpp_writes_the_same_bytes():
    checks.check_native_on_cuda(OP, __file__, SAME_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_other_instruction_sets_write_the_same_bytes(isa):
    checks.check_instruction_set(__file__, isa, SAME_BYTES)


@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 9).map(lambda n: 32 * n),
    granularity=st.sampled_from(sorted(RECIPES)),
    dtype=st.sampled_from(checks.DTYPES),
    strided=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_dequantized_values_are_near(rows, columns, granularity, dtype, strided):
    """Within half a unit of E4M3: a sixteenth of an element, or of the smallest normal step."""
    random = torch.Generator().manual_seed(rows + columns)
    w = torch.randn(columns, rows, generator=random).to(dtype).T
    w = w if strided else w.contiguous()
    q = rlkern.quantize_fp8(w, granularity)
    assert q.data.dtype == torch.float8_e4m3fn
    assert q.shape == q.data.shape == (rows, columns)
    back = rlkern.dequantize(q)
    w = w.float()
    if w.numel():
        step = w.abs().max() * 2.0**-6 / 224 * 2**-3
        assert bool(((back - w).abs() <= w.abs() / 16 * 1.001 + step).all())


@pytest.mark.parametrize("granularity", sorted(RECIPES))
def test_compiles_without_a_graph_break(device, granularity):
    w = torch.randn(40, 256, device=device)

    def run(w):
        q = rlkern.quantize_fp8(w, granularity)
        return q.data.view(torch.uint8), rlkern.dequantize(q)

    for a, b in zip(checks.compiled(run)(w), run(w)):
        assert_same_bits(granularity, a, b)


def test_an_amax_of_all_shards_gives_the_bytes_of_the_whole(device):
    w = torch.randn(64, 48, device=device)
    whole = rlkern.quantize_fp8(w)
    parts = [rlkern.quantize_fp8(part, amax=w.abs().max()) for part in w.split(16)]
    codes = torch.cat([part.data.view(torch.uint8) for part in parts])
    assert torch.equal(codes, whole.data.view(torch.uint8))
    assert all(torch.equal(part.scale, whole.scale) for part in parts)


@pytest.mark.parametrize("granularity", sorted(RECIPES))
def test_statistics_are_those_of_the_result(device, granularity):
    w = torch.randn(70, 288, device=device)
    w[:, 40] = 1e-9
    before = rlkern.quantize_fp8(w, granularity)
    w[3, :9] *= 3
    q = rlkern.quantize_fp8(w, granularity, statistics=True, previous=before)
    back = rlkern.dequantize(q)
    changed = q.data.view(torch.uint8) != before.data.view(torch.uint8)
    assert q.statistics.changed == changed.sum() > 0
    assert q.statistics.flushed == (back == 0).sum() >= 70
    error = ((back - w).square().sum() / w.square().sum()).sqrt()
    torch.testing.assert_close(q.statistics.relative_rms.float(), error, rtol=1e-5, atol=0)
    assert 0.01 < error < 0.05
    plain = rlkern.quantize_fp8(w, granularity, statistics=True)
    assert plain.statistics.changed is None
    assert plain.statistics[1:] == q.statistics[1:]
    assert rlkern.quantize_fp8(w, granularity).statistics is None


def test_what_a_given_amax_is_too_small_for_saturates(device):
    w = torch.linspace(-2, 2, 4000, device=device).view(40, 100)
    q = rlkern.quantize_fp8(w, amax=torch.ones((), device=device), statistics=True)
    assert q.statistics.saturated == (w.abs() > 1).sum()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (130, 9), (300, 7)])
def test_swizzle_is_the_documented_permutation(rows, columns):
    scale = torch.randint(1, 255, (rows, columns), dtype=torch.uint8)
    flat = _quantized.swizzle_128x4(scale)
    across = -(-columns // 4)
    assert flat.shape == (-(-rows // 128) * 128 * across * 4,)
    seen = torch.zeros_like(flat, dtype=torch.bool)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128 * across + c // 4) * 512
            at = tile + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            assert flat[at] == scale[r, c]
            seen[at] = True
    assert bool((flat[~seen] == 0).all()), "padding is 0"
    assert torch.equal(_quantized.unswizzle_128x4(flat, rows, columns), scale)


@pytest.mark.parametrize(
    ("granularity", "layout", "power_of_two"),
    [
        ("mx32", "swizzle_128x4", False),
        ("group128", "deepgemm_sm90", False),
        ("group128", "deepgemm_sm100", True),
    ],
)
def test_every_layout_dequantizes_alike(granularity, layout, power_of_two):
    w = torch.randn(133, 416)
    options = {"power_of_two": power_of_two}
    linear = rlkern.quantize_fp8(w, granularity, **options)
    other = rlkern.quantize_fp8(w, granularity, layout=layout, **options)
    assert other.layout == layout
    assert_same_bits(layout, rlkern.dequantize(other), rlkern.dequantize(linear))


def test_deepgemm_layouts():
    w = torch.randn(133, 700)
    q = rlkern.quantize_fp8(w, "group128", power_of_two=True)
    sm90 = _quantized.deepgemm_sm90(q.scale)
    assert sm90.shape == (133, 6)
    assert sm90.stride() == (1, 136)
    assert torch.equal(sm90, q.scale)
    sm100 = _quantized.deepgemm_sm100(q.scale)
    assert sm100.shape == (133, 2)
    assert sm100.stride() == (1, 136)
    for c in range(6):
        byte = (sm100[:, c // 4] >> 8 * (c % 4)) & 0xFF
        assert torch.equal(byte, torch.frexp(q.scale[:, c])[1] - 1 + 127)
    assert bool(((sm100[:, 1] >> 16) == 0).all()), "padding is 0"


W = torch.ones(4, 64)
Q = rlkern.quantize_fp8(W)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": [1.0]}, TypeError, "expected w to be a Tensor, got list"),
        ({"w": W.double()}, TypeError, "expected w of dtype float32 or bfloat16 or float16"),
        ({"w": W[0]}, ValueError, r"w of shape \(N, K\), got \(64,\)"),
        ({"granularity": "column"}, ValueError, "granularity to be one of block128, .*'column'"),
        ({"recipe": "verl"}, ValueError, "recipe for 'tensor' to be one of .*, got 'verl'"),
        ({"layout": "swizzle_128x4"}, ValueError, "layout for 'tensor' to be one of linear, got"),
        ({"w": W[:, :40], "granularity": "mx32"}, ValueError, r"K a multiple of 32, got \(4, 40\)"),
        (
            {"granularity": "group128", "layout": "deepgemm_sm100"},
            ValueError,
            "power_of_two with layout 'deepgemm_sm100', got False",
        ),
        ({"amax": 1.0}, TypeError, "expected amax to be a Tensor, got float"),
        ({"amax": torch.ones(1)}, ValueError, r"amax of shape \(\) = \(\), got \(1,\)"),
        ({"amax": torch.ones(()).double()}, TypeError, "amax of dtype float32, got float64"),
        ({"amax": torch.ones((), device="meta")}, ValueError, "amax on cpu like w, got meta"),
        ({"amax": torch.ones(()), "granularity": "row"}, ValueError, "amax with granularity"),
        ({"previous": W}, TypeError, "expected previous to be a QuantizedTensor, got Tensor"),
        ({"previous": Q}, ValueError, "previous with statistics=True, got statistics=False"),
        (
            {"previous": Q, "statistics": True, "granularity": "row"},
            ValueError,
            r"previous of format fp8_row and shape \(4, 64\), got fp8_tensor \(4, 64\)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"w": W} | change
    with pytest.raises(error, match=f"^quantize_fp8: .*{message}"):
        rlkern.quantize_fp8(arguments.pop("w"), **arguments)


def test_dequantize_refuses_what_it_is_not_for():
    with pytest.raises(TypeError, match=r"^dequantize: expected q to be a QuantizedTensor, got"):
        rlkern.dequantize(W)
    with pytest.raises(ValueError, match=r"^dequantize: expected dtype float32, .* got torch.int8"):
        rlkern.dequantize(rlkern.quantize_fp8(W), torch.int8)
