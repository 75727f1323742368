"""smc_resample: every particle has its share of children, and no group knows of another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.smc_resample import reference, samples
from rlkern.testing.implementations import implementations
from rlkern.testing.numerics import assert_same_bits

OP = "smc_resample"
INF, NAN = float("inf"), float("nan")


def test_every_kernel_is_the_reference(device):
    for name, args in samples.sample_inputs(device, torch.float32):
        want = reference.forward(*args)
        for kernel in implementations(OP, device):
            parents, ess, weights = kernel.forward(*args)
            assert torch.equal(parents, want[0]), f"{kernel.name} {name}"
            for got, ref in ((ess, want[1]), (weights, want[2])):
                torch.testing.assert_close(got, ref, rtol=1e-6, atol=1e-6, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 200), spread=st.floats(0, 20), seed=st.integers(0, 2**31))
def test_children_are_the_share_rounded_down_or_up(n, spread, seed):
    random = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(n, generator=random)
    u = torch.rand(1, generator=random)
    out = rlkern.smc_resample(x, u, ess_threshold=1.0)
    w = x.double().softmax(0)
    torch.testing.assert_close(out.ess[0].double(), 1 / (w * w).sum(), rtol=1e-5, atol=0)
    if out.ess[0] >= n:
        return
    children = torch.bincount(out.parents, minlength=n)
    assert children.sum() == n
    assert ((children - n * w).abs() < 1 + 1e-6).all()
    assert (out.parents.diff() >= 0).all()
    # the mean weight stays
    mean = x.double().logsumexp(0) - torch.tensor(n).log()
    torch.testing.assert_close(out.log_weights.double(), mean.expand(n), rtol=1e-6, atol=1e-5)


def test_children_are_unbiased():
    """Over evenly spread offsets, the mean number of children is the share."""
    x = torch.randn(7, generator=torch.Generator().manual_seed(0))
    steps = 2000
    bounds = torch.arange(steps + 1) * 7
    u = (torch.arange(steps) + 0.5) / steps
    out = rlkern.smc_resample(x.repeat(steps), u, cu_seqlens=bounds, ess_threshold=1.0)
    children = torch.bincount(out.parents % 7, minlength=7).double() / steps
    torch.testing.assert_close(children, 7 * x.double().softmax(0), rtol=0, atol=2e-3)
    assert (out.parents // 7 == torch.arange(7 * steps) // 7).all()


def test_only_degenerate_groups_are_resampled(device):
    even, peaked = torch.tensor([0.1, 0.0, -0.1, 0.0]), torch.tensor([5.0, 0.0, 0.0, 0.0])
    x = torch.cat([even, peaked, even]).to(device)
    bounds = torch.tensor([0, 4, 8, 12], device=device)
    u = torch.full((3,), 0.5, device=device)
    out = rlkern.smc_resample(x, u, cu_seqlens=bounds)
    assert out.parents.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 8, 9, 10, 11]
    assert_same_bits("kept", out.log_weights[:4].contiguous(), x[:4].contiguous())
    assert (out.ess[[0, 2]] > 3.9).all()
    assert out.ess[1] < 1.1
    # the threshold is a share of the group
    tight = rlkern.smc_resample(x, u, cu_seqlens=bounds, ess_threshold=0.25)
    assert tight.parents.tolist() == list(range(12))


def test_weights_that_are_none(device):
    x = torch.tensor([-INF, -INF, NAN, 0.0, INF, 0.0, -INF, 1.0], device=device)
    bounds = torch.tensor([0, 2, 4, 6, 8, 8], device=device)
    out = rlkern.smc_resample(
        x, torch.zeros(5, device=device), cu_seqlens=bounds, ess_threshold=1.0
    )
    assert out.parents.tolist() == [0, 1, 2, 3, 4, 5, 7, 7]
    torch.testing.assert_close(
        out.ess.cpu(), torch.tensor([0.0, NAN, NAN, 1.0, 0.0]), equal_nan=True
    )
    assert_same_bits("kept", out.log_weights[:6].contiguous(), x[:6].contiguous())


def test_opcheck(device):
    checks.check_opcheck(OP, device)


def test_deterministic(device):
    checks.check_deterministic(OP, device, torch.float32)


def test_compiles_whole(device):
    x, u = torch.randn(12, device=device), torch.rand(1, device=device)

    def step(x, u):
        return rlkern.smc_resample(x * 3, u).parents + 1

    assert_same_bits("compiled", checks.compiled(step)(x, u), step(x, u))


X, U = torch.zeros(4), torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_weights": [1.0]}, TypeError, "log_weights to be a Tensor, got list"),
        ({"log_weights": X.double()}, TypeError, "log_weights of dtype float32"),
        ({"log_weights": X[None]}, ValueError, r"log_weights of shape \(N,\)"),
        ({"u": torch.zeros(2)}, ValueError, r"u of shape \(S,\) = \(1,\), got \(2,\)"),
        ({"u": U + 1}, ValueError, r"u in \[0, 1\), got 1.0"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens to rise from 0 to T = 4"),
        ({"ess_threshold": 1.5}, ValueError, r"ess_threshold in \[0, 1\], got 1.5"),
        ({"ess_threshold": "half"}, TypeError, "ess_threshold to be a number, got str"),
        ({"kind": "residual"}, ValueError, "kind to be one of systematic"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"log_weights": X, "u": U} | change
    with pytest.raises(error, match=f"^smc_resample: .*{message}"):
        rlkern.smc_resample(arguments.pop("log_weights"), arguments.pop("u"), **arguments)
