"""NVFP4: bytes equal to each library's formula, and the same from every kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks, quant_oracle

import rlkern
from rlkern.ops._dequantize import unpack_e2m1
from rlkern.ops.quantize_nvfp4 import reference, samples
from rlkern.ops.quantize_nvfp4.reference import RECIPES
from rlkern.testing.numerics import assert_same_bits

OP = "quantize_nvfp4"
SAME_BYTES = "test_every_kernel_writes_the_same_bytes"
NAN, INF = float("nan"), float("inf")


def awkward(rows=64, columns=544):
    """Blocks of zeros, of what underflows in the scale, of NaN and infinities, and outliers."""
    w = torch.randn(rows, columns) * 10.0 ** torch.randint(-4, 1, (rows, 1))
    for i, value in enumerate((0.0, -0.0, 1e-30, -1e-42, 3e38, NAN, INF, -INF, 6.0, 1e-7)):
        w[i, :32] = value
        w[i + 10, 40] = value
        w[i + 20, 64:80] *= 1e-6
    return w


def finite(w):
    return torch.where(w.abs() < 1e30, w, 1.0)


def test_the_encoder_rounds_to_nearest_even_everywhere():
    patterns = np.random.default_rng(0).integers(0, 2**32, 10**6, np.uint32).view(np.float32)
    near = np.random.default_rng(1).normal(0, 3, 10**6).astype(np.float32)
    x = np.concatenate([quant_oracle.edges(quant_oracle.E2M1), patterns, near])
    codes = reference.e2m1(torch.from_numpy(x))
    np.testing.assert_array_equal(codes.numpy(), quant_oracle.e2m1(x))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_the_formula_s(recipe, square):
    """A million elements and every special value, against numpy."""
    block = "16x16" if square else "1x16"
    for w, amax in (
        (torch.randn(1026, 992) * 0.02, None),
        (torch.randn(1026, 992).bfloat16().float(), None),
        (awkward(), None),
        (awkward(), 3.0),
        (awkward(), NAN),
        (awkward(), INF),
        (awkward(), 0.0),
        (awkward(), 1e-37),
        (finite(awkward()), None),
        (torch.zeros(3, 32), None),
        (torch.full((3, 32), 1e-40), None),
    ):
        given = None if amax is None else torch.tensor(amax)
        q = rlkern.quantize_nvfp4(w, recipe, block=block, amax=given)
        codes, scale, decode = quant_oracle.nvfp4(w.numpy(), recipe, amax, square)
        np.testing.assert_array_equal(q.scale.view(torch.uint8).numpy(), scale)
        np.testing.assert_array_equal(q.data.numpy(), codes)
        np.testing.assert_array_equal(q.global_scale.numpy(), decode)


@pytest.mark.parametrize("recipe", ["te", "fouroversix"])
@pytest.mark.parametrize("rule", ["mse", "mae"])
def test_four_over_six_is_the_formula(rule, recipe):
    for w, amax in (
        (torch.randn(1026, 992) * 0.02, None),
        (awkward(), None),
        (awkward(), 3.0),
        (finite(awkward()), None),
        (torch.zeros(3, 32), None),
    ):
        given = None if amax is None else torch.tensor(amax)
        q = rlkern.quantize_nvfp4(w, recipe, four_over_six=rule, amax=given)
        codes, scale, decode = quant_oracle.four_over_six(w.numpy(), rule, amax, recipe)
        np.testing.assert_array_equal(q.scale.view(torch.uint8).numpy(), scale)
        np.testing.assert_array_equal(q.data.numpy(), codes)
        np.testing.assert_array_equal(q.global_scale.numpy(), decode)


@pytest.mark.parametrize("recipe", ["te", "fouroversix"])
@pytest.mark.parametrize("rule", ["mse", "mae"])
def test_candidates_whose_errors_are_next_to_equal(rule, recipe):
    """An element of each block is moved to where the choice changes, and some units around it: the
    kernels compare rough sums first, which cannot tell there."""
    amax = torch.tensor(4.0)

    def scales(w):
        return torch.from_numpy(quant_oracle.four_over_six(w.numpy(), rule, 4.0, recipe)[1])

    w = torch.randn(4096, 16, generator=torch.Generator().manual_seed(3)).clamp(-3.5, 3.5)
    w[:, 7] = 4.0
    other = w.clone()
    other[:, 0] = torch.rand(4096, generator=torch.Generator().manual_seed(4)) * 3.5
    w, other = (x[(scales(w) != scales(other)).flatten()] for x in (w, other))
    assert len(w) > 100
    low, high = w[:, 0].clone(), other[:, 0].clone()
    for _ in range(40):
        w[:, 0] = (low + high) / 2
        moved = (scales(w) == scales(other)).flatten()
        low, high = torch.where(moved, low, w[:, 0]), torch.where(moved, w[:, 0], high)
    units = torch.arange(-8, 9, dtype=torch.int32)
    near = w[:, None].repeat(1, len(units), 1)
    near[..., 0] = (w[:, :1].contiguous().view(torch.int32) + units).view(torch.float32)
    near = near.view(-1, 16)
    q = rlkern.quantize_nvfp4(near, recipe, four_over_six=rule, amax=amax)
    codes, scale, _ = quant_oracle.four_over_six(near.numpy(), rule, 4.0, recipe)
    assert len(np.unique(scale)) == 2
    np.testing.assert_array_equal(q.scale.view(torch.uint8).numpy(), scale)
    np.testing.assert_array_equal(q.data.numpy(), codes)


def test_four_over_six_is_nearer():
    w = torch.randn(256, 1024) * 0.02
    off = {
        rule: (rlkern.dequantize(rlkern.quantize_nvfp4(w, four_over_six=rule)) - w).abs()
        for rule in (False, True, "mse", "mae")
    }
    assert torch.equal(off[True], off["mae"])
    assert off["mae"].mean() < off["mse"].mean() < 0.97 * off[False].mean()
    # 16 % less on normal weights
    assert off["mse"].square().mean() < 0.87 * off[False].square().mean()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_writes_the_same_bytes(device, dtype):
    cases = list(samples.sample_inputs(device, dtype))
    hard = awkward(32, 144).to(device, dtype)
    given = [None, *(torch.tensor(a, device=device) for a in (3.0, NAN, 1e-37))]
    for recipe, name in enumerate(RECIPES):
        for square in (False, True):
            for i, amax in enumerate(given):
                # rounded by random bits every other time
                args = (hard, amax, None, recipe, square, 0, i % 2 == 1, 2**62 + 3, True)
                cases.append((f"awkward {name} {square} {amax}", args))
    for rule in (1, 2):
        for recipe in (0, RECIPES.index("fouroversix")):
            for amax in given:
                args = (hard, amax, None, recipe, False, rule, False, 0, True)
                cases.append((f"awkward {recipe} rule {rule} {amax}", args))
    for name, args in cases:
        want = reference.forward(*args)
        for kernel in checks.kernels(OP, device):
            ours = kernel.forward(*args)
            what = f"{kernel.name} {dtype} {name}"
            assert_same_bits(f"{what} scales", ours[1], want[1])
            assert_same_bits(f"{what} codes", ours[0], want[0])
            torch.testing.assert_close(
                ours[2], want[2], rtol=0, atol=0, equal_nan=True, msg=f"{what} decodes"
            )
            checks.assert_same_counts(what, ours[3], want[3])


def test_random_bits_are_philox():
    """A known answer of Random123's Philox4x32-10."""
    got = reference.philox(torch.zeros(1, dtype=torch.int64), 0)
    assert [int(x) for x in got] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_stochastic_rounding_is_unbiased_and_follows_its_seed(device, block):
    w = torch.rand(96, 160, device=device) * 2 - 1
    # a scale that is exact, so that only the rounding of elements is seen
    w[::16, ::16] = 1.0
    near = rlkern.dequantize(rlkern.quantize_nvfp4(w, block=block))
    runs = [rlkern.quantize_nvfp4(w, block=block, seed=seed) for seed in range(200)]
    assert torch.equal(runs[7].data, rlkern.quantize_nvfp4(w, block=block, seed=7).data)
    assert not torch.equal(runs[7].data, runs[8].data)
    assert torch.equal(runs[7].scale.view(torch.uint8), runs[8].scale.view(torch.uint8))
    mean = torch.stack([rlkern.dequantize(q) for q in runs]).mean(0)
    # a step is at most a third; a byte of bits leaves 1/512 of a step
    assert (mean - w)[:, 1:].mean().abs() < 1e-3
    assert (mean - w).abs().max() < 6 * (1 / 3) / 2 / 200**0.5
    assert (mean - w).square().mean() < 0.1 * (near - w).square().mean()


def test_rows_of_a_shard_do_not_change_the_bits_of_the_first(device):
    """Bits follow from the index of an element, whatever the number of rows after it."""
    w = torch.randn(40, 96, device=device)
    amax = w.abs().max()
    whole = rlkern.quantize_nvfp4(w, amax=amax, seed=3)
    part = rlkern.quantize_nvfp4(w[:17], amax=amax, seed=3)
    assert torch.equal(whole.data[:17], part.data)


@pytest.mark.parametrize("options", [{}, {"block": "16x16"}, {"four_over_six": True}, {"seed": 5}])
def test_statistics_are_those_of_the_result(device, options):
    w = torch.randn(70, 288, device=device)
    w[:, 40] = 1e-9
    before = rlkern.quantize_nvfp4(w, **options)
    w[3, :9] *= 1.5
    q = rlkern.quantize_nvfp4(w, statistics=True, previous=before, **options)
    back = rlkern.dequantize(q)
    changed = unpack_e2m1(q.data) != unpack_e2m1(before.data)
    signs = q.data ^ before.data
    assert changed.sum() <= q.statistics.changed <= changed.sum() + (signs & 0x88 != 0).sum() * 2
    assert q.statistics.changed > 0
    assert q.statistics.flushed == (back == 0).sum() >= 70
    error = ((back - w).square().sum() / w.square().sum()).sqrt()
    torch.testing.assert_close(q.statistics.relative_rms.float(), error, rtol=1e-5, atol=0)
    plain = rlkern.quantize_nvfp4(w, statistics=True, **options)
    assert plain.statistics.changed is None
    assert plain.statistics[1:] == q.statistics[1:]
    assert rlkern.quantize_nvfp4(w, **options).statistics is None


def test_what_a_given_amax_is_too_small_for_saturates(device):
    w = torch.linspace(-2, 2, 3200, device=device).view(40, 80)
    # block scales are 448 from 1 on
    q = rlkern.quantize_nvfp4(w, amax=torch.ones((), device=device), statistics=True)
    assert q.statistics.saturated >= (w.abs() > 1.05).sum()


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_same_bits_twice_and_on_any_number_of_threads(device):
    checks.check_deterministic(OP, device, torch.float32)
    w = torch.randn(700, 912, device=device)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([rlkern.quantize_nvfp4(w, r) for r in RECIPES])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same_bits("codes", a.data, b.data)
            assert_same_bits("scale", a.scale.view(torch.uint8), b.scale.view(torch.uint8))


@pytest.mark.gpu
def test_cuda_cpp_writes_the_same_bytes():
    checks.check_native_on_cuda(OP, __file__, SAME_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_other_instruction_sets_write_the_same_bytes(isa):
    checks.check_instruction_set(__file__, isa, SAME_BYTES)


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 20).map(lambda n: 16 * n),
    recipe=st.sampled_from(RECIPES),
    dtype=st.sampled_from(checks.DTYPES),
    block=st.sampled_from(["1x16", "16x16"]),
    layout=st.sampled_from(["linear", "swizzle_128x4"]),
)
@settings(max_examples=40, deadline=None)
def test_dequantized_values_are_near(rows, columns, recipe, dtype, block, layout):
    random = torch.Generator().manual_seed(rows + columns)
    w = torch.randn(columns, rows, generator=random).to(dtype).T
    q = rlkern.quantize_nvfp4(w, recipe, block=block, layout=layout)
    assert q.data.shape == (rows, columns // 2)
    assert q.data.dtype == torch.uint8
    assert q.scale.dtype == torch.float8_e4m3fn
    back = rlkern.dequantize(q)
    assert back.shape == q.shape == (rows, columns)
    if w.numel():
        # half the widest gap, 6 - 4, of the block's largest element over 6, and a scale's rounding
        most = w.float().abs().max()
        assert bool(((back - w.float()).abs() <= most / 6 * 1.15).all())


def test_a_swizzled_scale_dequantizes_alike():
    w = torch.randn(133, 416)
    linear, other = (rlkern.quantize_nvfp4(w, layout=x) for x in ("linear", "swizzle_128x4"))
    assert other.scale.shape == (256 * 28,)
    assert_same_bits("swizzled", rlkern.dequantize(other), rlkern.dequantize(linear))


def test_every_code_is_unpacked():
    data = torch.arange(256, dtype=torch.uint8).view(1, -1)
    values = np.concatenate([quant_oracle.E2M1, -quant_oracle.E2M1]).astype(np.float32)
    want = torch.from_numpy(np.stack([values[np.arange(256) & 15], values[np.arange(256) >> 4]], 1))
    assert_same_bits("values", unpack_e2m1(data), want.reshape(1, -1))


def test_a_square_block_is_the_same_transposed(device):
    w = torch.randn(64, 96, device=device) * 0.02
    a = rlkern.dequantize(rlkern.quantize_nvfp4(w, block="16x16"))
    b = rlkern.dequantize(rlkern.quantize_nvfp4(w.T, block="16x16"))
    assert_same_bits("transposed", a, b.T)


def test_a_shared_amax_gives_the_bytes_of_the_whole(device):
    w = torch.randn(64, 48, device=device)
    whole = rlkern.quantize_nvfp4(w)
    parts = [rlkern.quantize_nvfp4(part, amax=w.abs().max()) for part in w.split(16)]
    assert torch.equal(torch.cat([part.data for part in parts]), whole.data)
    assert all(torch.equal(part.global_scale, whole.global_scale) for part in parts)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiles_without_a_graph_break(device, recipe):
    w = torch.randn(40, 256, device=device)

    def run(w):
        q = rlkern.quantize_nvfp4(w, recipe)
        return q.data, rlkern.dequantize(q, torch.bfloat16)

    for a, b in zip(checks.compiled(run)(w), run(w)):
        assert_same_bits(recipe, a, b)


W = torch.ones(4, 64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": [1.0]}, TypeError, "expected w to be a Tensor, got list"),
        ({"w": W.double()}, TypeError, "expected w of dtype float32 or bfloat16 or float16"),
        ({"w": W[0]}, ValueError, r"w of shape \(N, K\), got \(64,\)"),
        ({"w": W[:, :40]}, ValueError, r"K a multiple of 16, got \(4, 40\)"),
        ({"recipe": "verl"}, ValueError, "recipe to be one of .*, got 'verl'"),
        ({"block": "1x32"}, ValueError, "block to be one of 16x16, 1x16, got '1x32'"),
        ({"four_over_six": "max"}, ValueError, "four_over_six to be one of mae, mse, got 'max'"),
        (
            {"four_over_six": True, "recipe": "vllm"},
            ValueError,
            "four_over_six with recipe 'te' or 'fouroversix' and block '1x16', got recipe 'vllm'",
        ),
        ({"layout": "marlin"}, ValueError, "layout to be one of linear, swizzle_128x4, got"),
        ({"amax": 1.0}, TypeError, "expected amax to be a Tensor, got float"),
        ({"seed": -1}, ValueError, r"seed an int in \[0, 2\^63\), got -1"),
        ({"seed": 1, "four_over_six": True}, ValueError, "seed without four_over_six, got 1"),
        ({"previous": 3}, TypeError, "expected previous to be a QuantizedTensor, got int"),
        ({"amax": torch.ones(1)}, ValueError, r"amax of shape \(\) = \(\), got \(1,\)"),
        ({"amax": torch.ones(()).double()}, TypeError, "amax of dtype float32, got float64"),
        ({"amax": torch.ones((), device="meta")}, ValueError, "amax on cpu like w, got meta"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"w": W} | change
    with pytest.raises(error, match=f"^quantize_nvfp4: .*{message}"):
        rlkern.quantize_nvfp4(arguments.pop("w"), **arguments)
