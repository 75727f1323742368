"""Log-prob and entropy from hidden states."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.linear_logprob import reference, samples
from rlkern.ops.logprob_from_logits import reference as from_logits
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "linear_logprob"
ALL = ("logprob", "entropy", "logsumexp")
# temperature, logit_scale, softcap, ignore_index
PLAIN = (1.0, 1.0, 0.0, -100)
# the order of the ops' outputs
NAMES = ("logprob", "logsumexp", "entropy")
# the products are summed in another order than torch's
SUM_ULPS = 64


def plain_torch_gradients(inputs: tuple) -> tuple:
    """What torch's own matmuls give in the inputs' dtype: the yardstick of 16-bit gradients."""
    *grads, hidden, weight, targets, lse, entropy, rows = inputs[:9]
    logits = (hidden @ weight.T).float()
    saved = (logits, targets, lse, entropy, rows, *inputs[9:-2])
    d_logits = from_logits.backward(*grads, *saved).to(hidden.dtype)
    return d_logits @ weight, d_logits.T @ hidden


def assert_close_as_torch(what, got, truth, torchs):
    """Gradients of 16-bit inputs: the root mean square error is at most 1.1 times torch's own."""
    if got.numel() == 0 or got.dtype == torch.float32:
        assert_within_budget(what, got, truth, torchs, SUM_ULPS)
        return

    def error(x):
        return (x.double() - truth).square().mean().sqrt()

    floor = torch.finfo(got.dtype).eps * truth.square().mean().sqrt() / 2
    assert error(got) <= 1.1 * error(torchs) + floor, f"{what}: {error(got)}, {error(torchs)}"


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradient_is_the_derivative(per_row, cap):
    targets = torch.tensor([0, 6, -100, 3])
    rows = torch.linspace(0.5, 2, 4, dtype=torch.float64) if per_row else None
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    outputs = reference.forward(hidden, weight, targets, rows, 0.7, 1.3, cap, -100, True)
    upstream = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    want = torch.autograd.grad(outputs, (hidden, weight), upstream)
    a, c, b = upstream
    with torch.no_grad():
        saved = (hidden, weight, targets, outputs[1], outputs[2], rows, 0.7, 1.3, cap, -100)
        got = reference.backward(a, c, b, *saved, True, True)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


def test_gradcheck_through_the_public_function():
    targets = torch.tensor([4, 0, 2])
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def run(h, w):
        return tuple(rlkern.linear_logprob(h, w, targets, temperature=1.7, outputs=ALL))

    assert torch.autograd.gradcheck(run, (hidden, weight))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        truth = reference.forward(*to_double(args))
        torchs = reference.forward(*args)
        exact = samples.backward_inputs(to_double(args), truth)
        exact_grads = reference.backward(*to_double(exact))
        torch_grads = plain_torch_gradients(samples.backward_inputs(args, torchs))
        for kernel in checks.kernels(OP, device):
            what = f"{kernel.name} {dtype} {name!r}"
            ours = kernel.forward(*args)
            for got, want, peer, part in zip(ours, truth, torchs, NAMES):
                assert_within_budget(f"{what} {part}", got, want, peer, SUM_ULPS)
            gots = kernel.backward(*samples.backward_inputs(args, ours))
            for got, want, peer in zip(gots, exact_grads, torch_grads):
                assert_close_as_torch(f"{what} gradient", got, want, peer)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_row_does_not_depend_on_its_batch(device, dtype):
    hidden, weight = (
        torch.randn(1700, 33).to(device, dtype),
        torch.randn(1031, 33).to(device, dtype),
    )
    targets = torch.randint(1031, (1700,)).to(device)
    # the interpreter takes a second for each thousand rows
    for kernel in checks.kernels(OP, device):
        if kernel.name == "reference":
            continue
        count = 1700 if kernel.name == "native" or device == "cuda" else 150
        h, t = hidden[:count], targets[:count]
        whole = kernel.forward(h, weight, t, None, 0.8, 1.0, 0.0, -100, True)
        for rows in (slice(0, 1), slice(5, 60), slice(count - 20, count)):
            part = kernel.forward(h[rows], weight, t[rows], None, 0.8, 1.0, 0.0, -100, True)
            for a, b in zip(part, whole):
                assert_same_bits(f"{kernel.name} {rows}", a, b[rows])
        order = torch.randperm(count)
        shuffled = kernel.forward(h[order], weight, t[order], None, 0.8, 1.0, 0.0, -100, True)
        for a, b in zip(shuffled, whole):
            assert_same_bits(f"{kernel.name} permuted", a, b[order])


def test_training_and_scoring_give_the_same_bits(device):
    hidden = torch.randn(9, 16).to(device).requires_grad_()
    weight, targets = torch.randn(50, 16).to(device), torch.randint(50, (9,)).to(device)
    train = rlkern.linear_logprob(hidden, weight, targets, outputs=ALL)
    with torch.no_grad():
        score = rlkern.linear_logprob(hidden, weight, targets)
    assert_same_bits("logprob", train.logprob.detach(), score.logprob)
    assert (train.logprob.detach() - score.logprob).exp().eq(1).all()


def test_equals_torch_and_differentiates(device):
    hidden = torch.randn(70, 40).to(device).requires_grad_()
    weight = (torch.randn(611, 40) / 4).to(device).requires_grad_()
    targets = torch.randint(611, (70,)).to(device)
    out = rlkern.linear_logprob(hidden, weight, targets, temperature=0.6, outputs=ALL)
    z = hidden @ weight.T / 0.6
    logp = z.log_softmax(-1)
    want = (
        logp.gather(-1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        z.logsumexp(-1),
    )
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    d_want = torch.autograd.grad(want, (hidden, weight), upstream)
    d_got = torch.autograd.grad(tuple(out), (hidden, weight), upstream)
    for got, expected in zip((*out, *d_got), (*want, *d_want)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_rows_without_a_gradient_drop_out_exactly():
    """Not multiplied by zero: what they hold does not matter."""
    hidden, weight = torch.randn(40, 16), torch.randn(90, 16)
    targets = torch.randint(90, (40,))
    live = torch.arange(0, 40, 3)
    hidden[1::3] = float("nan")
    upstream = torch.zeros(2, 40)
    upstream[:, live] = torch.randn(2, len(live))
    targets[2::3], upstream[0, 2::3] = -100, 1.0  # a gradient into an ignored row is none
    _, lse, entropy = torch.ops.rlkern.linear_logprob_fwd(
        hidden, weight, targets, None, *PLAIN, True
    )

    def backward(rows):
        grads = (upstream[0, rows], None, upstream[1, rows])
        saved = (hidden[rows], weight, targets[rows], lse[rows], entropy[rows], None, *PLAIN)
        return torch.ops.rlkern.linear_logprob_bwd(*grads, *saved, True, True)

    got, want = backward(torch.arange(40)), backward(live)
    assert_same_bits("weight", got[1], want[1])
    assert_same_bits("hidden", got[0][live], want[0])
    dead = torch.ones(40, dtype=torch.bool)
    dead[live] = False
    assert (got[0][dead] == 0).all()
    none = torch.zeros(40)
    saved = (hidden, weight, targets, lse, entropy, None, *PLAIN, True, True)
    for grad in torch.ops.rlkern.linear_logprob_bwd(none, None, none, *saved):
        assert (grad == 0).all()


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True)])
def test_frozen_inputs_get_no_gradient(train_hidden, train_weight):
    hidden = torch.randn(5, 8, requires_grad=train_hidden)
    weight = torch.randn(20, 8, requires_grad=train_weight)
    targets = torch.randint(20, (5,))
    rlkern.linear_logprob(hidden, weight, targets).logprob.sum().backward()
    assert (hidden.grad is not None) == train_hidden
    assert (weight.grad is not None) == train_weight


def test_a_transposed_head_and_strided_hidden_states():
    weight = torch.randn(16, 50).T
    hidden = torch.randn(2, 9, 16)[:, ::2].reshape(-1, 16)[::2]
    targets = torch.randint(50, hidden.shape[:1])
    got = rlkern.linear_logprob(hidden, weight, targets).logprob
    want = reference.forward(hidden, weight, targets, None, *PLAIN, False)[0]
    torch.testing.assert_close(got, want)


def test_scale_and_soft_cap_as_models_apply_them(device):
    """Gemma 2: cap tanh(logits / cap); Cohere: logits times logit_scale."""
    hidden = torch.randn(9, 24).to(device).requires_grad_()
    weight = torch.randn(70, 24).to(device).requires_grad_()
    targets = torch.randint(70, (9,)).to(device)
    z = 5.0 * torch.tanh(0.8 * (hidden @ weight.T) / 5.0) / 0.7
    logp = z.log_softmax(-1)
    want = (logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1))
    options = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.8, "outputs": ALL}
    upstream = [checks.random_sign(w, seed) for seed, w in enumerate(want)]
    expected = torch.autograd.grad(want, (hidden, weight), upstream)
    out = rlkern.linear_logprob(hidden, weight, targets, **options)
    got = torch.autograd.grad(tuple(out), (hidden, weight), upstream)
    for a, b in zip((*out, *got), (*want, *expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    from_logits = rlkern.logprob_from_logits(hidden @ weight.T, targets, **options)
    for a, b in zip(from_logits, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_padded_vocabulary_is_not_read(device):
    hidden = torch.randn(6, 16).to(device).requires_grad_()
    weight = torch.randn(64, 16).to(device)
    padded = torch.cat([weight, torch.full((8, 16), float("nan")).to(device)]).requires_grad_()
    targets = torch.randint(64, (6,)).to(device)
    out = rlkern.linear_logprob(hidden, padded, targets, vocab_size=64, outputs=ALL)
    plain = rlkern.linear_logprob(hidden, weight, targets, outputs=ALL)
    for a, b in zip(out, plain):
        assert_same_bits("padded", a.detach(), b.detach())
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert (padded.grad[64:] == 0).all()
    assert padded.grad[:64].abs().sum() > 0


def test_scalars_reach_the_kernel():
    """The stable ABI does not compare C++ parameter types with the schema."""
    hidden, weight = torch.randn(4, 6), torch.randn(9, 6)
    targets = torch.tensor([3, 7, 7, 1])
    for scalars in ((0.37, 1.0, 0.0, 7), (2.25, 0.61, 0.0, 7), (1.0, 1.7, 2.9, 7)):
        args = (hidden, weight, targets, None, *scalars, True)
        got = torch.ops.rlkern.linear_logprob_fwd(*args)
        torch.testing.assert_close(got, reference.forward(*args))
        assert (got[0][1:3] == 0).all()
        inputs = samples.backward_inputs(args, got)
        for needs in ((True, True), (True, False), (False, True)):
            chosen = (*inputs[:-2], *needs)
            grads = torch.ops.rlkern.linear_logprob_bwd(*chosen)
            torch.testing.assert_close(grads, reference.backward(*chosen), rtol=1e-5, atol=1e-5)
    assert torch.ops.rlkern.linear_logprob_fwd(*args[:-1], False)[2].numel() == 0


def test_out_of_range_targets_give_nan_and_stay_in_bounds(device):
    hidden, weight = torch.randn(4, 8).to(device), torch.randn(6, 8).to(device)
    targets = torch.tensor([-1, 6, 2**40, 5]).to(device)
    for kernel in checks.kernels(OP, device):
        out = kernel.forward(hidden, weight, targets, None, *PLAIN, True)
        assert out[0].isnan().tolist() == [True, True, True, False], kernel.name
        saved = (hidden, weight, targets, out[1], out[2], None, *PLAIN, True, True)
        grads = kernel.backward(torch.ones(4).to(device), None, None, *saved)
        assert all(g.isfinite().all() for g in grads), kernel.name


def test_no_tensor_of_rows_times_vocabulary():
    """Peak memory of forward + backward stays far below one (T, V) float32 tensor."""
    code = """
import resource, torch, rlkern
hidden = torch.randn(2048, 64, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(65536, 64, dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(65536, (2048,))
rlkern.linear_logprob(hidden[:64], weight[:512], targets[:64] % 512).logprob.sum().backward()
weight.grad = torch.zeros_like(weight)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = rlkern.linear_logprob(hidden, weight, targets, outputs=("logprob", "entropy"))
(out.logprob + out.entropy).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 128, f"{run.stdout} MiB; one (T, V) float32 tensor is 512 MiB"


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set_is_as_exact(isa):
    checks.check_instruction_set(__file__, isa)


def test_compiles_whole():
    def loss(hidden, weight, targets):
        out = rlkern.linear_logprob(hidden, weight, targets, temperature=0.9, outputs=ALL)
        return (out.logprob - 0.1 * out.entropy).sum()

    hidden = torch.randn(5, 8, requires_grad=True)
    weight, targets = torch.randn(12, 8, requires_grad=True), torch.randint(12, (5,))
    want = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
    run = checks.compiled(loss)
    got = torch.autograd.grad(run(hidden, weight, targets), (hidden, weight))
    for g, w in zip(got, want):
        assert_same_bits("gradient", g, w)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 130),
    depth=st.integers(1, 70),
    vocab=st.integers(1, 1500),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.floats(0.1, 10.0),
    dtype=st.sampled_from(checks.DTYPES),
    gap=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, depth, vocab, scale, temperature, dtype, gap, seed):
    generator = torch.Generator().manual_seed(seed)
    extra = 3 if gap else 0
    hidden = torch.randn(rows, depth + extra, generator=generator).to(dtype)[:, :depth]
    weight = (torch.randn(vocab, depth + extra, generator=generator) * scale).to(dtype)[:, :depth]
    targets = torch.randint(vocab, (rows,), generator=generator)
    args = (hidden, weight, targets, None, temperature, 1.0, 0.0, -100, True)
    truth, torchs = reference.forward(*to_double(args)), reference.forward(*args)
    ours = torch.ops.rlkern.linear_logprob_fwd(*args)
    for got, want, peer, name in zip(ours, truth, torchs, NAMES):
        assert_within_budget(name, got, want, peer, SUM_ULPS)
    exact = reference.backward(*to_double(samples.backward_inputs(to_double(args), truth)))
    peers = plain_torch_gradients(samples.backward_inputs(args, torchs))
    gots = torch.ops.rlkern.linear_logprob_bwd(*samples.backward_inputs(args, ours))
    for got, want, peer in zip(gots, exact, peers):
        if rows:
            scale_of = want.abs().max().clamp(min=1e-3)
            limit = 3 * (peer.double() - want).abs().max() + 1e-4 * scale_of
            assert (got.double() - want).abs().max() <= limit


HIDDEN, WEIGHT = torch.zeros(4, 8), torch.zeros(10, 8)
TARGETS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": 3}, TypeError, "expected hidden to be a Tensor, got int"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "expected hidden of dtype"),
        (
            {"hidden": torch.zeros(1, 4, 8)},
            ValueError,
            r"hidden of shape \(T, H\), got \(1, 4, 8\)",
        ),
        ({"weight": WEIGHT.bfloat16()}, TypeError, "weight of dtype float32, got bfloat16"),
        (
            {"weight": torch.zeros(10, 7)},
            ValueError,
            r"expected weight of shape \(V, H\) = \(10, 8\), got \(10, 7\)",
        ),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets of shape \(T,\)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "expected weight on cpu like hidden, got meta"),
        ({"temperature": -1.0}, ValueError, "temperature to be positive and finite, got -1.0"),
        ({"outputs": ()}, ValueError, "outputs to be a non-empty tuple"),
        ({"softcap": 0.0}, ValueError, "softcap to be positive and finite, got 0.0"),
        ({"logit_scale": -2}, ValueError, "logit_scale to be positive and finite, got -2"),
        ({"vocab_size": 11}, ValueError, r"vocab_size in \[1, V\] = \[1, 10\], got 11"),
        ({"vocab_size": 8.0}, TypeError, "expected vocab_size to be an int, got float"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    values = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS} | change
    tensors = [values.pop(name) for name in ("hidden", "weight", "targets")]
    with pytest.raises(error, match=f"linear_logprob: .*{message}"):
        rlkern.linear_logprob(*tensors, **values)
