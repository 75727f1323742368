"""Divergence between a student's and a teacher's heads."""

import subprocess
import sys

import pytest
import torch
from ops import checks

import rlkern
from rlkern.ops.linear_distill_loss import reference, samples
from rlkern.ops.linear_distill_loss.topk import topk_divergence
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "linear_distill_loss"
# (divergence, beta, the ops' beta)
KINDS = [("forward_kl", 0.5, 0.0), ("reverse_kl", 0.5, 1.0), ("jsd", 0.5, 0.5), ("jsd", 0.1, 0.1)]
# Triton's interpreter: 0 times infinity, in lanes that are not selected
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
# The products are summed in another order than torch's, and the gradients multiply the errors of
# logits by log-ratios of ten and more.
SUM_ULPS = 64


def plain(log_s, log_t, beta):
    """As torch has it: of two (T, V) tensors of log-probs."""
    kl = torch.nn.functional.kl_div
    how = {"reduction": "none", "log_target": True}
    if beta in (0.0, 1.0):
        pair = (log_s, log_t) if beta == 0.0 else (log_t, log_s)
        return kl(*pair, **how).sum(-1)
    log_m = ((1 - beta) * log_s.exp() + beta * log_t.exp()).log()
    terms = beta * kl(log_m, log_t, **how) + (1 - beta) * kl(log_m, log_s, **how)
    return terms.sum(-1)


class Heads:
    def __init__(self, device="cpu", dtype=torch.float32, tokens=70, vocab=611):
        random = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

        self.hidden = normal(tokens, 40).requires_grad_()
        self.weight = normal(vocab, 40, scale=0.25).requires_grad_()
        self.bias = normal(vocab).requires_grad_()
        self.teacher = (normal(tokens, 24), normal(vocab, 24, scale=0.4))
        self.teacher_bias = normal(vocab)
        self.targets = torch.randint(vocab, (tokens,), generator=random).to(device)

    def student(self):
        return self.hidden, self.weight, self.bias

    def log_probs(self, temperature=1.0):
        own = self.hidden @ self.weight.T + self.bias
        theirs = self.teacher[0] @ self.teacher[1].T + self.teacher_bias
        return tuple((z / temperature).log_softmax(-1) for z in (own, theirs))

    def ours(self, **how):
        how = {"bias": self.bias, "teacher_bias": self.teacher_bias} | how
        return rlkern.linear_distill_loss(self.hidden, self.weight, *self.teacher, **how)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.1])
@pytest.mark.parametrize("caps", [(0.0, 0.0), (1.5, 3.0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradient_is_the_derivative(per_row, caps, beta):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    inputs = tuple(x.requires_grad_() for x in (normal(4, 3), normal(9, 3), normal(9)))
    rows = torch.linspace(0.5, 2, 4, dtype=torch.float64) if per_row else None
    scalars = (beta, 0.7, 1.3, caps[0], 0.9, caps[1], 8)
    heads = (*inputs, normal(4, 5), normal(9, 5), normal(9))
    divergence, *_, stats = reference.forward(*heads, None, rows, *scalars, -100)
    upstream = normal(4)
    want = torch.autograd.grad(divergence, inputs, upstream)
    with torch.no_grad():
        got = reference.backward(upstream, *heads, rows, stats, *scalars, True, True, True)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("divergence", "beta", "_"), KINDS)
def test_gradcheck_through_the_public_function(divergence, beta, _):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    inputs = tuple(x.requires_grad_() for x in (normal(3, 4), normal(6, 4), normal(6)))
    teacher, teacher_bias = (normal(3, 2), normal(7, 2)), normal(7)
    how = {"softcap": 6.0, "teacher_logit_scale": 0.7, "temperature": 1.7, "vocab_size": 5}

    def run(h, w, b):
        return rlkern.linear_distill_loss(
            h,
            w,
            *teacher,
            divergence=divergence,
            beta=beta,
            bias=b,
            teacher_bias=teacher_bias,
            **how,
        ).divergence

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize(("divergence", "beta", "_"), KINDS)
def test_gradcheck_of_cached_log_probs(divergence, beta, _, tail):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    inputs = tuple(x.requires_grad_() for x in (normal(3, 4), normal(9, 4), normal(9)))
    log_t, ids = normal(3, 9).log_softmax(-1).topk(4)
    log_t[1, 2:] = float("-inf")

    def run(h, w, b):
        return rlkern.linear_distill_loss(
            h,
            w,
            divergence=divergence,
            beta=beta,
            teacher_topk_ids=ids,
            teacher_topk_logprobs=log_t,
            tail=tail,
            bias=b,
            temperature=0.8,
        ).divergence

    assert torch.autograd.gradcheck(run, inputs)


def plain_torch_gradients(inputs: tuple) -> tuple:
    """What torch's own matmuls give in the inputs' dtype: the yardstick of 16-bit gradients."""
    hidden, weight, bias = inputs[1:4]
    d = reference.logit_gradient(*inputs[:-3])
    pad, size = len(weight) - d.shape[1], d.shape[1]
    d_bias = torch.nn.functional.pad(d.sum(0), (0, pad)).to(hidden.dtype)
    d = d.to(hidden.dtype)
    d_weight = torch.nn.functional.pad(d.T @ hidden, (0, 0, 0, pad))
    return d @ weight[:size], d_weight, weight[:0, 0] if bias is None else d_bias


def assert_close_as_torch(what, got, truth, torchs):
    """Gradients of 16-bit inputs: the root mean square error is at most 1.1 times torch's own."""
    if got.numel() == 0 or got.dtype == torch.float32:
        assert_within_budget(what, got, truth, torchs, SUM_ULPS)
        return

    def error(x):
        return (x.double() - truth).square().mean().sqrt()

    floor = torch.finfo(got.dtype).eps * truth.square().mean().sqrt() / 2
    assert error(got) <= 1.1 * error(torchs) + floor, f"{what}: {error(got)}, {error(torchs)}"


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    for name, args in samples.sample_inputs(device, dtype):
        truth = reference.forward(*to_double(args))
        torchs = reference.forward(*args)
        exact = reference.backward(*to_double(samples.backward_inputs(to_double(args), truth)))
        peers = plain_torch_gradients(samples.backward_inputs(args, torchs))
        for kernel in checks.kernels(OP, device):
            what = f"{kernel.name} {dtype} {name!r}"
            ours = kernel.forward(*args)
            for i, (got, want, peer) in enumerate(zip(ours, truth, torchs, strict=True)):
                assert_within_budget(f"{what} output {i}", got, want, peer, SUM_ULPS)
            gots = kernel.backward(*samples.backward_inputs(args, ours))
            for i, (got, want, peer) in enumerate(zip(gots, exact, peers, strict=True)):
                assert_close_as_torch(f"{what} gradient {i}", got, want, peer)


def test_opcheck(device):
    checks.check_opcheck(OP, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set_is_as_exact(isa):
    checks.check_instruction_set(__file__, isa)


@pytest.mark.parametrize(("divergence", "beta", "kind"), KINDS)
def test_equals_torch_and_differentiates(device, divergence, beta, kind):
    heads = Heads(device)
    out = heads.ours(divergence=divergence, beta=beta, temperature=0.6, targets=heads.targets)
    log_s, log_t = heads.log_probs(0.6)
    want = plain(log_s, log_t, kind)
    torch.testing.assert_close(out.divergence, want, rtol=1e-5, atol=1e-5)
    logprob = log_s.gather(-1, heads.targets[:, None])[:, 0]
    torch.testing.assert_close(out.logprob, logprob.detach(), rtol=1e-5, atol=2e-5)
    entropy = -(log_s.exp() * log_s).sum(-1).detach()
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-5, atol=1e-5)
    assert not out.logprob.requires_grad
    assert not out.entropy.requires_grad
    upstream = checks.random_sign(want)
    d_want = torch.autograd.grad(want, heads.student(), upstream)
    d_got = torch.autograd.grad(out.divergence, heads.student(), upstream)
    for g, w in zip(d_got, d_want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=2e-5)


def test_every_scalar_has_its_own_place(device):
    """The stable ABI does not compare signatures with schemas."""
    heads = Heads(device)
    scalars = {"temperature": 0.7, "logit_scale": 1.3, "softcap": 2.5}
    scalars |= {"teacher_logit_scale": 0.6, "teacher_softcap": 3.5, "vocab_size": 600}
    targets = heads.targets.clone()
    targets[3] = 7
    how = {"divergence": "jsd", "beta": 0.3, "targets": targets, "ignore_index": 7}
    out = heads.ours(**scalars, **how)
    inputs = (*heads.student(), *heads.teacher, heads.teacher_bias)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    wide = (0.3, 0.7, 1.3, 2.5, 0.6, 3.5, 600, 7)
    want = reference.forward(*doubles, targets, None, *wide)
    for got, exact in zip((out.divergence, out.logprob, out.entropy), want):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert out.logprob[3] == 0
    got = torch.autograd.grad(out.divergence.sum(), heads.student())
    for g, w in zip(got, torch.autograd.grad(want[0].sum(), doubles[:3])):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)
    assert (got[1][600:] == 0).all()
    assert (got[2][600:] == 0).all()


@pytest.mark.parametrize(("divergence", "beta", "_"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(device, dtype, divergence, beta, _):
    heads = Heads(device, dtype)
    heads.teacher, heads.teacher_bias = heads.student()[:2], heads.bias
    out = heads.ours(divergence=divergence, beta=beta, softcap=5.0).divergence
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), heads.student()))


def test_the_teacher_gets_no_gradient():
    heads = Heads()
    for x in (*heads.teacher, heads.teacher_bias):
        x.requires_grad_()
    heads.ours().divergence.sum().backward()
    assert heads.hidden.grad is not None
    assert all(x.grad is None for x in (*heads.teacher, heads.teacher_bias))
    heads.hidden = heads.hidden.detach()
    heads.weight, heads.bias = heads.weight.detach(), heads.bias.detach()
    assert not heads.ours().divergence.requires_grad


def test_rows_without_a_gradient_drop_out_exactly():
    """Not multiplied by zero: what they hold does not matter."""
    heads = Heads()
    upstream = torch.randn(70)
    upstream[::3] = 0.0
    live = upstream != 0
    with torch.no_grad():
        heads.hidden[::3], heads.teacher[0][1::9] = float("nan"), float("inf")
    upstream[1::9] = 0.0
    live &= upstream != 0
    got = torch.autograd.grad(heads.ours().divergence, heads.student(), upstream)
    part = Heads()
    part.hidden = heads.hidden.detach()[live].requires_grad_()
    part.teacher = heads.teacher[0][live], heads.teacher[1]
    want = torch.autograd.grad(part.ours().divergence, part.student(), upstream[live])
    assert (got[0][~live] == 0).all()
    assert_same_bits("hidden", got[0][live], want[0])
    assert_same_bits("weight", got[1], want[1])
    assert_same_bits("bias", got[2], want[2])
    none = torch.autograd.grad(heads.ours().divergence, heads.student(), torch.zeros(70))
    assert all((g == 0).all() for g in none)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("cached", [False, True])
def test_a_token_weight_is_a_constant_factor(cached, kind):
    heads = Heads()
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(70, generator=random).relu().to(kind)
    live = weight != 0
    teacher, how = heads.teacher, {}
    if not cached:
        with torch.no_grad():
            heads.hidden[~live] = float("inf")
    else:
        teacher = ()
        how["teacher_topk_ids"] = torch.arange(5).expand(70, 5)
        how["teacher_topk_logprobs"] = torch.randn(70, 5, generator=random).log_softmax(-1) - 0.1

    def run(**more):
        args = (heads.hidden, heads.weight, *teacher)
        return rlkern.linear_distill_loss(*args, bias=heads.bias, **how, **more).divergence

    got, plain = run(token_weight=weight), run()
    assert_same_bits("divergence", got, torch.where(live, plain * weight.float(), 0.0))
    upstream = torch.randn(70, generator=random)
    grads = torch.autograd.grad(got, heads.student(), upstream)
    want = torch.autograd.grad(plain, heads.student(), upstream * weight.float())
    for name, g, w in zip(("hidden", "weight", "bias"), grads, want):
        assert_same_bits(name, g, w)
        assert g.isfinite().all()
    assert (grads[0][~live] == 0).all()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype):
    """In blocks of tokens too: 2^26 logits are 1,536 tokens here."""
    torch.manual_seed(0)
    hidden, theirs = (torch.randn(1700, 9).to(dtype) for _ in range(2))
    weight, head = (torch.randn(1031, 9).to(dtype) for _ in range(2))
    whole = rlkern.linear_distill_loss(hidden, weight, theirs, head, divergence="jsd")
    for rows in (slice(0, 1), slice(5, 60), slice(1530, 1545)):
        part = rlkern.linear_distill_loss(
            hidden[rows], weight, theirs[rows], head, divergence="jsd"
        )
        assert_same_bits("divergence", part.divergence, whole.divergence[rows])
        assert_same_bits("entropy", part.entropy, whole.entropy[rows])


def test_large_biases_do_not_reach_the_gradient_through_padding(device):
    """Panels of tokens are filled up with lanes that see the bias alone."""
    heads = Heads(device, tokens=5)
    with torch.no_grad():
        heads.bias[7], heads.teacher_bias[9] = 120.0, 150.0
    out = heads.ours(divergence="jsd").divergence
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), heads.student()))


def test_a_token_that_only_the_student_has(device):
    """Its reverse KL is infinite; the other divergences are not."""
    heads = Heads(device, tokens=3)
    heads.teacher_bias[5] = float("-inf")
    assert (heads.ours(divergence="reverse_kl").divergence == float("inf")).all()
    for divergence in ("forward_kl", "jsd"):
        out = heads.ours(divergence=divergence).divergence
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), heads.student()))


def test_compiles_whole():
    heads = Heads(tokens=5, vocab=12)

    def loss(hidden, weight):
        out = rlkern.linear_distill_loss(hidden, weight, *heads.teacher, divergence="jsd")
        return (out.divergence * out.entropy).sum()

    inputs = heads.student()[:2]
    want = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(checks.compiled(loss)(*inputs), inputs)
    for g, w in zip(got, want):
        assert_same_bits("gradient", g, w)


def test_no_tensor_of_rows_times_vocabulary():
    """The logits of both heads would take 2 GiB in float32; 256 MiB of them exist at a time."""
    code = """
import resource, torch, rlkern
def run(tokens, vocab):
    hidden = torch.randn(tokens, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 16, dtype=torch.bfloat16, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rlkern.linear_distill_loss(hidden, weight, hidden.detach(), -weight).divergence.sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
run(64, 512)
print(run(2048, 131072))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 400, f"{run.stdout} MiB"


@pytest.mark.parametrize(("divergence", "beta", "kind"), KINDS)
def test_the_whole_vocabulary_as_top_k_is_the_whole_divergence(divergence, beta, kind):
    heads = Heads(vocab=50)
    log_t = heads.log_probs()[1]
    ids = torch.stack([torch.randperm(50) for _ in range(70)])
    cached = {"teacher_topk_ids": ids, "teacher_topk_logprobs": log_t.gather(1, ids)}
    how = {"divergence": divergence, "beta": beta, "bias": heads.bias, "targets": heads.targets}
    whole = heads.ours(divergence=divergence, beta=beta, targets=heads.targets)
    for tail in ("renormalize", "drop", "bucket"):
        out = rlkern.linear_distill_loss(heads.hidden, heads.weight, **cached, tail=tail, **how)
        torch.testing.assert_close(out.divergence, whole.divergence, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.logprob, whole.logprob, rtol=1e-5, atol=1e-5)
        assert not out.logprob.requires_grad


@pytest.mark.parametrize(("divergence", "beta", "kind"), KINDS)
def test_what_becomes_of_the_tail(divergence, beta, kind):
    heads = Heads(vocab=50)
    log_s, log_t = heads.log_probs()
    top, ids = log_t.topk(5)
    own = log_s.gather(1, ids)

    def ours(tail):
        return rlkern.linear_distill_loss(
            heads.hidden,
            heads.weight,
            divergence=divergence,
            beta=beta,
            teacher_topk_ids=ids.int(),
            teacher_topk_logprobs=top,
            tail=tail,
            bias=heads.bias,
        ).divergence

    def with_tail(x):
        return torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1)

    want = {
        "drop": plain(own, top, kind),
        "renormalize": plain(own.log_softmax(-1), top.log_softmax(-1), kind),
        "bucket": plain(with_tail(own), with_tail(top), kind),
    }
    for tail, value in want.items():
        got = ours(tail)
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
        upstream = checks.random_sign(got)
        d_got = torch.autograd.grad(got, heads.student(), upstream)
        d_want = torch.autograd.grad(value, heads.student(), upstream, retain_graph=True)
        for g, w in zip(d_got, d_want):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-5)
    # merging events loses information
    assert (ours("bucket") <= plain(log_s, log_t, kind) + 1e-5).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_slots_without_a_teacher_do_not_count(tail, beta):
    log_s = torch.randn(4, 9, dtype=torch.float64).log_softmax(-1)[:, :6].requires_grad_()
    log_t = torch.randn(4, 9, dtype=torch.float64).log_softmax(-1)[:, :6]
    padded = log_t.clone()
    padded[:3, 4:] = float("-inf")
    got = topk_divergence(log_s, padded, beta, tail)
    short = topk_divergence(log_s[:3, :4], log_t[:3, :4], beta, tail)
    torch.testing.assert_close(got[:3], short)
    (grad,) = torch.autograd.grad(got.sum(), log_s)
    assert (grad[:3, 4:] == 0).all()
    assert grad.isfinite().all()
    nothing = topk_divergence(log_s, torch.full_like(log_t, float("-inf")), beta, tail)
    assert (nothing == 0).all()
    assert torch.autograd.grad(nothing.sum(), log_s)[0].isfinite().all()


HIDDEN, WEIGHT = torch.zeros(4, 8), torch.zeros(10, 8)
THEIRS, HEAD = torch.zeros(4, 6), torch.zeros(10, 6)
IDS, TOP = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)
CACHED = {"teacher_hidden": None, "teacher_weight": None}
CACHED |= {"teacher_topk_ids": IDS, "teacher_topk_logprobs": TOP}
EITHER = "expected either teacher_hidden and teacher_weight, or teacher_topk_ids and"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": 3}, TypeError, "expected hidden to be a Tensor, got int"),
        ({"weight": torch.zeros(10, 7)}, ValueError, r"weight of shape \(V, H\) = \(10, 8\)"),
        ({"teacher_hidden": None}, ValueError, EITHER),
        ({"teacher_hidden": None, "teacher_weight": None}, ValueError, EITHER),
        ({"teacher_topk_ids": IDS}, ValueError, EITHER),
        ({"teacher_topk_ids": IDS, "teacher_topk_logprobs": TOP}, ValueError, EITHER),
        ({"teacher_hidden": THEIRS[:3]}, ValueError, r"teacher_hidden of shape \(T, H'\)"),
        ({"teacher_hidden": THEIRS.double()}, TypeError, "teacher_weight of dtype float64"),
        (
            {"teacher_hidden": THEIRS.half(), "teacher_weight": HEAD.half()},
            TypeError,
            "teacher_hidden of dtype float32, got float16",
        ),
        ({"teacher_weight": HEAD[:, :5]}, ValueError, r"teacher_weight of shape \(V, H\)"),
        ({"teacher_weight": HEAD[:9]}, ValueError, r"teacher_weight of shape \(V, H'\)"),
        ({"teacher_weight": HEAD[:9], "vocab_size": 10}, ValueError, r"vocab_size in \[1, V\]"),
        ({"teacher_bias": torch.zeros(9)}, ValueError, r"teacher_bias of shape \(V,\)"),
        ({"bias": torch.zeros(9)}, ValueError, r"expected bias of shape \(V,\)"),
        ({"divergence": "kl"}, ValueError, "divergence to be one of forward_kl, jsd, reverse_kl"),
        ({"divergence": "jsd", "beta": 0.0}, ValueError, "beta to be positive and finite"),
        ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta between 0 and 1, got 1.0"),
        ({"targets": torch.zeros(4)}, TypeError, "targets of dtype int64 or int32"),
        ({"token_weight": IDS[:, 0]}, TypeError, "token_weight of dtype float32 or .* or bool"),
        ({"token_weight": TOP[:3, 0]}, ValueError, r"token_weight of shape \(T,\) = \(4,\)"),
        ({"temperature": 0.0}, ValueError, "temperature to be positive and finite"),
        ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap to be positive and finite"),
        ({"teacher_logit_scale": 0.0}, ValueError, "teacher_logit_scale to be positive"),
        (CACHED | {"tail": "bin"}, ValueError, "tail to be one of bucket, drop, renormalize"),
        (
            CACHED | {"teacher_softcap": 3.0},
            ValueError,
            "teacher_softcap to be None beside teacher_topk_logprobs, got 3.0",
        ),
        (CACHED | {"teacher_topk_ids": TOP}, TypeError, "teacher_topk_ids of dtype int64 or int32"),
        (CACHED | {"teacher_topk_ids": IDS[:3]}, ValueError, r"teacher_topk_ids of shape \(T, K\)"),
        (CACHED | {"teacher_topk_ids": IDS[:, :0]}, ValueError, "at least one token a row"),
        (
            CACHED | {"teacher_topk_logprobs": TOP[:, :1]},
            ValueError,
            r"teacher_topk_logprobs of shape \(T, K\) = \(4, 2\), got \(4, 1\)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    values = {"hidden": HIDDEN, "weight": WEIGHT, "teacher_hidden": THEIRS, "teacher_weight": HEAD}
    with pytest.raises(error, match=f"linear_distill_loss: .*{message}"):
        rlkern.linear_distill_loss(**values | change)
