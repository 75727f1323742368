"""rms_norm: float64 as the oracle, transformers' own modules, and every kernel."""

import pytest
import torch
from ops import checks

import rlkern
from rlkern.ops.rms_norm import reference, samples
from rlkern.testing.implementations import implementations
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "rms_norm"


def steps_of_rounding(args):
    """What rounding every product to 16 bits may move an output by, in float64."""
    x, weight, eps, cos, _ = to_double(args)
    y = reference.forward(x, weight, eps, None, None).abs()
    if cos is not None:
        half = cos.shape[1]
        both = y[..., :half] + y[..., half : 2 * half]
        y = torch.cat([both, both, y[..., 2 * half :]], -1)
    return y


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        truth, torchs = reference.forward(*to_double(args)), reference.forward(*args)
        for kernel in implementations(OP, device):
            what = f"{OP} {kernel.name} {dtype} {name!r}"
            ours = kernel.forward(*args)
            assert (ours.dtype, ours.shape) == (dtype, args[0].shape)
            if dtype == torch.float32:
                assert_within_budget(what, ours, truth, torchs)
            # three roundings in a row, of which the last counts half
            limit = 2.5 * torch.finfo(dtype).eps * steps_of_rounding(args) + 1e-6
            assert ((ours.double() - truth).abs() <= limit).all(), what


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_rounds_where_the_modules_of_transformers_round(device, dtype):
    """All but the few elements that another order of additions moves are equal in bits."""
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    torch.manual_seed(0)
    norm = qwen.Qwen3RMSNorm(64, eps=1e-5).to(device, dtype)
    norm.weight.data.normal_(1.0, 0.2)
    x = torch.randn(50, 3, 64, device=device).to(dtype)
    angle = 6 * torch.rand(50, 32, device=device)
    cos, sin = (f.to(dtype) for f in (angle.cos(), angle.sin()))
    tables = [torch.cat([f, f], -1)[None] for f in (cos, sin)]
    normed = norm(x)
    turned = qwen.apply_rotary_pos_emb(normed[None], normed[None], *tables, 2)[0][0]
    wants = {"norm": (normed, {}), "rope": (turned, {"cos": cos.float(), "sin": sin.float()})}
    for name, (want, rope) in wants.items():
        got = rlkern.rms_norm(x, norm.weight, eps=1e-5, **rope)
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
        share = (got == want).float().mean().item()
        assert share > (0.5 if dtype == torch.float32 else 0.99), (name, share)
    # without a sum there is nothing to order
    got = rlkern.rms_norm(x, None, cos=cos.float(), sin=sin.float())
    want = qwen.apply_rotary_pos_emb(x[None], x[None], *tables, 2)[0][0]
    if dtype != torch.float32:  # which may be fused into one rounding
        assert_same_bits("rope alone", got, want)
    torch.testing.assert_close(got, want)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_same_bits_on_any_number_of_threads_and_in_any_batch(device):
    x = torch.randn(3000, 2, 64, device=device)
    weight, angle = torch.randn(64, device=device), torch.rand(3000, 32, device=device)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(rlkern.rms_norm(x, weight, cos=angle.cos(), sin=angle.sin()))
    torch.set_num_threads(threads)
    few = slice(17, 20)
    part = rlkern.rms_norm(x[few], weight, cos=angle[few].cos(), sin=angle[few].sin())
    for other in results[1:]:
        assert_same_bits("threads", results[0], other)
    assert_same_bits("batch", results[0][few], part)


def test_compiles_whole(device):
    x, weight, eps, cos, sin = next(
        a for n, a in samples.sample_inputs(device, torch.float32) if n == "turned"
    )

    def step(x):
        return rlkern.rms_norm(x * 2, weight, eps=eps, cos=cos, sin=sin).sum()

    assert_same_bits("sum", checks.compiled(step)(x), step(x))


def test_nan_and_infinity_stay_in_their_row(device):
    x = torch.ones(3, 20, device=device)
    x[1, 4], x[2, 4] = float("nan"), float("inf")
    weight = torch.ones(20, device=device)
    for kernel in implementations(OP, device):
        out = kernel.forward(x, weight, 0.0, None, None)
        assert (out[0] == 1).all(), kernel.name
        assert out[1].isnan().all(), kernel.name
        assert out[2, 4].isnan(), kernel.name
        assert (out[2, :4] == 0).all(), kernel.name


GOOD = {
    "x": torch.zeros(3, 2, 8),
    "weight": torch.zeros(8),
    "cos": torch.zeros(3, 4),
    "sin": torch.zeros(3, 4),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "expected x to be a Tensor, got list"),
        ({"x": torch.zeros(8)}, ValueError, r"x of shape \(T, D\) or \(T, H, D\), got \(8,\)"),
        ({"x": torch.zeros(3, 8)}, ValueError, r"x of shape \(T, H, D\) with cos and sin"),
        ({"x": torch.zeros(3, 2, 8).long()}, TypeError, "x of dtype"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight of shape \(D,\) = \(8,\), got \(4,\)"),
        ({"weight": torch.zeros(8).half()}, TypeError, "weight of dtype float32, got float16"),
        ({"eps": -1.0}, ValueError, "eps >= 0, got -1.0"),
        ({"sin": None}, ValueError, "cos and sin to be given together, got one of them"),
        ({"cos": torch.zeros(3, 4).half()}, TypeError, "cos of dtype float32, got float16"),
        ({"sin": torch.zeros(3, 3)}, ValueError, r"sin of shape \(T, R/2\) = \(3, 4\)"),
        ({"cos": torch.zeros(3, 5), "sin": torch.zeros(3, 5)}, ValueError, "at most D / 2 = 4"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    with pytest.raises(error, match=f"^rms_norm: .*{message}"):
        rlkern.rms_norm(**(GOOD | change))
