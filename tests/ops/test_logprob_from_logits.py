"""Log-prob, entropy and logsumexp from logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.logprob_from_logits import reference
from rlkern.testing.numerics import assert_same_bits, assert_within_budget

OP = "logprob_from_logits"
ALL = ("logprob", "entropy", "logsumexp")
# temperature, logit_scale, softcap, ignore_index
PLAIN = (1.0, 1.0, 0.0, -100)


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradient_is_the_derivative(per_row, cap):
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100, 3])
    rows = torch.linspace(0.5, 2, 4, dtype=torch.float64) if per_row else None

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = reference.forward(x, targets, rows, 0.7, 1.3, cap, -100, True)
            ctx.save_for_backward(x, *out[1:])
            return out

        @staticmethod
        def backward(ctx, a, c, b):
            x, lse, entropy = ctx.saved_tensors
            return reference.backward(a, c, b, x, targets, lse, entropy, rows, 0.7, 1.3, cap, -100)

    def forward(x):
        return reference.forward(x, targets, rows, 0.7, 1.3, cap, -100, True)

    upstream = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    (want,) = torch.autograd.grad(forward(logits), logits, upstream)
    (got,) = torch.autograd.grad(Op.apply(logits), logits, upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(Op.apply, (logits,))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    checks.check_budget(OP, device, dtype)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


def test_every_instruction_set_is_as_exact():
    checks.check_instruction_set(__file__, "avx2")


def test_a_row_does_not_depend_on_its_batch(device):
    logits = torch.randn(33, 3001).to(device)
    targets = torch.randint(3001, (33,)).to(device)
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        whole = kernel.forward(logits, targets, None, 0.8, 1.0, 0.0, -100, True)
        for rows in (slice(0, 1), slice(5, 9), slice(32, 33)):
            part = kernel.forward(logits[rows], targets[rows], None, 0.8, 1.0, 0.0, -100, True)
            for a, b in zip(part, whole):
                assert_same_bits(f"{kernel.name} {rows}", a, b[rows])


def test_equals_torch_and_differentiates(device):
    logits = (torch.randn(6, 211) * 3).to(device).requires_grad_()
    targets = torch.randint(211, (6,)).to(device)
    out = rlkern.logprob_from_logits(logits, targets, temperature=0.6, outputs=ALL)
    logp = (logits / 0.6).log_softmax(-1)
    want = (
        logp.gather(-1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (logits / 0.6).logsumexp(-1),
    )
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    (d_want,) = torch.autograd.grad(want, logits, upstream)
    (d_got,) = torch.autograd.grad(tuple(out), logits, upstream)
    for got, expected in zip((*out, d_got), (*want, d_want)):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_only_what_was_asked_for_is_returned():
    logits, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int32)
    out = rlkern.logprob_from_logits(logits, targets, outputs=("entropy",))
    assert out.logprob is None
    assert out.logsumexp is None
    assert out.entropy.dtype == torch.float32


def test_upstream_of_one_output_only():
    logits = torch.randn(3, 8, requires_grad=True)
    targets = torch.tensor([1, -100, 2])
    out = rlkern.logprob_from_logits(logits, targets, outputs=ALL)
    assert out.logprob[1] == 0
    (grad,) = torch.autograd.grad(out.logprob.sum(), logits, retain_graph=True)
    assert (grad[1] == 0).all()
    for value in out:
        (grad,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert grad.isfinite().all()


def test_double_precision_gradcheck_through_the_public_function():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, 0, 2])

    def run(x):
        return tuple(rlkern.logprob_from_logits(x, targets, temperature=1.7, outputs=ALL))

    assert torch.autograd.gradcheck(run, (logits,))


def test_scalars_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    logits, targets = torch.randn(4, 9), torch.tensor([3, 7, 7, 1])
    for scalars in ((0.37, 1.0, 0.0, 7), (2.25, 0.61, 0.0, 7), (1.0, 1.7, 2.9, 7)):
        got = torch.ops.rlkern.logprob_from_logits_fwd(logits, targets, None, *scalars, True)
        want = reference.forward(logits, targets, None, *scalars, True)
        torch.testing.assert_close(got, want)
        assert (got[0][1:3] == 0).all()
    nothing = torch.ops.rlkern.logprob_from_logits_fwd(logits, targets, None, *scalars, False)
    assert nothing[2].numel() == 0


def test_out_of_range_targets_give_nan_and_stay_in_bounds(device):
    logits = torch.randn(4, 6).to(device)
    targets = torch.tensor([-1, 6, 2**40, 5]).to(device)
    for kernel in checks.kernels(OP, device):
        logprob, lse, entropy = kernel.forward(logits, targets, None, *PLAIN, True)
        assert logprob.isnan().tolist() == [True, True, True, False], kernel.name
        upstream = torch.ones(4).to(device)
        grad = kernel.backward(upstream, None, None, logits, targets, lse, entropy, None, *PLAIN)
        assert grad.isfinite().all(), kernel.name


def test_nan_logits_are_not_hidden(device):
    logits = torch.randn(3, 2100).to(device)
    logits[1, 2050] = float("nan")
    targets = torch.tensor([0, 1, 2]).to(device)
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(logits, targets, None, *PLAIN, True)
        for value in out:
            assert value.isnan().tolist() == [False, True, False], kernel.name


def test_more_rows_than_a_grid_dimension():
    logits = torch.randn(70_000, 3)
    targets = torch.randint(3, (70_000,))
    out = rlkern.logprob_from_logits(logits, targets)
    want = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logprob, want)


def test_padded_vocabulary_is_not_read(device):
    logits = torch.randn(4, 30).to(device)
    padded = torch.cat([logits, torch.full((4, 3), float("nan")).to(device)], 1).requires_grad_()
    targets = torch.randint(30, (4,)).to(device)
    out = rlkern.logprob_from_logits(padded, targets, vocab_size=30, outputs=ALL)
    plain = rlkern.logprob_from_logits(logits, targets, outputs=ALL)
    for a, b in zip(out, plain):
        assert_same_bits("padded", a.detach(), b.detach())
    out.entropy.sum().backward()
    assert (padded.grad[:, 30:] == 0).all()
    assert padded.grad.isfinite().all()


def test_compiles_whole():
    def loss(logits, targets):
        out = rlkern.logprob_from_logits(logits, targets, temperature=0.9, outputs=ALL)
        return (out.logprob - 0.1 * out.entropy).sum()

    logits = torch.randn(5, 12, requires_grad=True)
    targets = torch.randint(12, (5,))
    want = torch.autograd.grad(loss(logits, targets), logits)[0]
    got = torch.autograd.grad(checks.compiled(loss)(logits, targets), logits)[0]
    assert_same_bits("gradient", got, want)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 5000),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.floats(0.05, 20.0),
    dtype=st.sampled_from(checks.DTYPES),
    gap=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, vocab, scale, temperature, dtype, gap, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab + 3, generator=generator) * scale).to(dtype)
    logits = logits[:, :vocab] if gap else logits[:, :vocab].contiguous()
    targets = torch.randint(vocab, (rows,), generator=generator)
    got = rlkern.logprob_from_logits(logits, targets, temperature=temperature, outputs=ALL)
    args = (targets, None, temperature, 1.0, 0.0, -100, True)
    truth = reference.forward(logits.double(), *args)
    torchs = reference.forward(logits, *args)
    for name, want, peer in zip(("logprob", "logsumexp", "entropy"), truth, torchs):
        assert_within_budget(name, getattr(got, name), want, peer)


LOGITS, TARGETS = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "expected logits to be a Tensor, got list"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "expected logits of dtype"),
        ({"logits": torch.zeros(8)}, ValueError, r"logits of shape \(T, V\), got \(8,\)"),
        ({"targets": torch.zeros(4, 1)}, TypeError, "expected targets of dtype int64 or int32"),
        (
            {"targets": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"expected targets of shape \(T,\) = \(4,\), got \(3,\)",
        ),
        ({"temperature": 0.0}, ValueError, "temperature to be positive and finite, got 0.0"),
        ({"temperature": "1"}, TypeError, "expected temperature to be a number, got str"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature of shape \(T,\) = \(4,\)"),
        ({"outputs": ("logp",)}, ValueError, "one of entropy, logprob, logsumexp, got 'logp'"),
        ({"outputs": "logprob"}, ValueError, "outputs to be a non-empty tuple"),
        ({"targets": TARGETS.to("meta")}, ValueError, "targets on cpu like logits, got meta"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS} | change
    with pytest.raises(error, match=f"logprob_from_logits: .*{message}"):
        rlkern.logprob_from_logits(arguments.pop("logits"), arguments.pop("targets"), **arguments)
