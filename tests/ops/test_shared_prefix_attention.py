"""shared_prefix_attention: every branch as if it were alone; float64 as the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import checks

import rlkern
from rlkern.ops.shared_prefix_attention import reference, samples
from rlkern.ops.shared_prefix_attention.op import SharedPrefixAttention
from rlkern.testing.implementations import implementations
from rlkern.testing.numerics import assert_same_bits, assert_within_budget, to_double

OP = "shared_prefix_attention"
NAN = float("nan")
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("softcap", [0.0, 1.7])
@pytest.mark.parametrize("trees", [[samples.CHAIN], [(4, [(3, [(2, []), (5, [])]), (2, [])])]])
def test_the_formula_s_gradient(trees, softcap):
    ends, bounds = samples.ends_of(trees)
    q, k, v = (torch.randn(len(ends), h, 5, dtype=torch.float64) for h in (4, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    run = lambda *qkv: SharedPrefixAttention.apply(*qkv, ends, bounds, 0.6, softcap)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


def roundings(args, truth, grads):
    """What rounding the weights and their gradients to the inputs' dtype may cost, in its half
    ulps: of out, dq, dk and dv in float64."""
    q, k, v, ends, bounds, scale, softcap = args
    grad_out, _, *_ = grads
    bounds_of = [torch.zeros_like(x) for x in (q, q, k, v)]
    for rows, s in reference._scores(q, k, ends, bounds, scale, softcap):
        p = reference._weights(s, truth[1][rows])
        keys, values = (reference._heads(x[rows], q) for x in (k, v))
        g = grad_out[rows]
        delta = (g * truth[0][rows]).sum(-1)
        ds = p * (torch.einsum("ihd,jhd->ihj", g, values) - delta[..., None])
        # the saved output was rounded too
        ds = ds.abs() + p * (g * truth[0][rows]).abs().sum(-1)[..., None]
        fold = lambda x: x.unflatten(1, (k.shape[1], -1)).sum(2)  # noqa: E731
        found = (
            torch.einsum("ihj,jhd->ihd", p, values.abs()),
            scale * torch.einsum("ihj,jhd->ihd", ds, keys.abs()),
            fold(scale * torch.einsum("ihj,ihd->jhd", ds, q[rows].abs())),
            fold(torch.einsum("ihj,ihd->jhd", p, g.abs())),
        )
        for bound, x in zip(bounds_of, found):
            bound[rows] = x
    return bounds_of


def assert_near(what, ours, truth, torchs, slack, float32_ulps=64.0):
    """Within the budget once `slack` is taken off the error."""
    error = ours.double() - truth
    rest = torch.sign(error) * (error.abs() - slack).clamp(min=0.0)
    assert_within_budget(what, (truth + rest).to(ours.dtype), truth, torchs, float32_ulps)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_kernel_is_within_the_budget(device, dtype):
    """16-bit weights are rounded to the dtype of the values, as in any flash attention."""
    for name, args in samples.sample_inputs(device, dtype):
        wide = to_double(args)
        truth, torchs = reference.forward(*wide), reference.forward(*args)
        grads64 = samples.backward_inputs(wide, truth)
        wants = reference.backward(*grads64)
        peers = reference.backward(*samples.backward_inputs(args, torchs))
        slacks = [HALF_ULP[dtype] * x for x in roundings(wide, truth, grads64)]
        for kernel in implementations(OP, device):
            what = f"{OP} {kernel.name} {dtype} {name!r}"
            out, lse = kernel.forward(*args)
            assert_near(f"{what} out", out, truth[0], torchs[0], slacks[0])
            assert_within_budget(f"{what} lse", lse, truth[1], torchs[1], 64.0)
            found = kernel.backward(*samples.backward_inputs(args, (out, lse)))
            for x, got, want, peer, slack in zip("qkv", found, wants, peers, slacks[1:]):
                assert_near(f"{what} gradient of {x}", got, want, peer, slack, 256.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_is_its_unshared_copies(dtype):
    """Against torch's own attention on every branch with a copy of the prompt."""
    prompt, lengths = 70, [33, 1, 50]
    ends, _ = samples.ends_of([(prompt, [(n, []) for n in lengths])])
    q, k, v = (torch.randn(len(ends), h, 32).to(dtype).requires_grad_() for h in (4, 2, 2))
    out = rlkern.shared_prefix_attention(q, k, v, ends)
    upstream = torch.randn(out.shape)
    (out * upstream).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    total, begin = 0.0, prompt
    want = torch.empty(out.shape, dtype=torch.float64)
    for i, n in enumerate(lengths):
        rows = torch.tensor([*range(prompt), *range(begin, begin + n)])
        begin += n
        branch = (x[rows].transpose(0, 1)[None] for x in wide)
        got = torch.nn.functional.scaled_dot_product_attention(
            *branch, is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        own = slice(0 if i == 0 else prompt, None)  # the prompt's rows count once
        want[rows[own]] = got[own].detach()
        total = total + (got[own] * upstream[rows[own]]).sum()
    total.backward()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip((q, k, v), wide):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_the_same_bits(dtype):
    """A pack in any company; a tree's first branch as a chain; ends that say what bounds say."""
    trees = [(100, [(40, []), (50, [(9, []), (30, [])])]), samples.DEEP, (64, [])]
    ends, bounds = samples.ends_of(trees)
    tensors = [torch.randn(len(ends), h, 48).to(dtype) for h in (2, 1, 1)]

    def run(kernel, rows, ends, bounds):
        args = (*(x[rows].contiguous() for x in tensors), ends, bounds, 0.3, 0.0)
        out = kernel.forward(*args)
        grad = torch.sin(torch.arange(out[0].numel())).view(out[0].shape).to(dtype)
        return *out, *kernel.backward(grad, None, *args[:3], *out, *args[3:])

    whole = slice(0, len(ends))
    for kernel in implementations(OP, "cpu"):
        if kernel.name == "reference":
            continue
        want = run(kernel, whole, ends, bounds)
        for first, last in bounds.unfold(0, 2, 1).tolist():
            rows = slice(first, last)
            alone = run(kernel, rows, ends[rows] - first, torch.tensor([0, last - first]).int())
            for a, b in zip(alone[:2], want[:2]):
                assert_same_bits(f"{kernel.name} pack at {first}", a, b[rows].contiguous())
        chain = run(
            kernel, slice(0, 140), torch.full((140,), 140).int(), torch.tensor([0, 140]).int()
        )
        for a, b in zip(chain[:2], want[:2]):
            assert_same_bits(f"{kernel.name} first branch", a, b[:140].contiguous())
    out = rlkern.shared_prefix_attention(*tensors, cu_seqlens=bounds)
    limits = torch.repeat_interleave(bounds[1:], bounds.diff())
    assert_same_bits(
        "chains", out, rlkern.shared_prefix_attention(*tensors, limits, cu_seqlens=bounds)
    )


def test_opcheck(device):
    checks.check_opcheck(OP, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice_and_on_any_number_of_threads(device, dtype):
    checks.check_deterministic(OP, device, dtype)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "default"])
def test_other_instruction_sets(isa):
    checks.check_instruction_set(__file__, isa)


def test_compiles_whole_with_gradients(device):
    _, args = next(iter(samples.sample_inputs(device, torch.float32)))
    q, k, v, ends, bounds, *_ = args

    def step(q):
        out, lse = rlkern.shared_prefix_attention(
            q * 2, k, v, ends, cu_seqlens=bounds, scale=0.3, softcap=9.0, return_lse=True
        )
        return out.square().sum() + lse.sum()

    grads = []
    for run in (checks.compiled(step), step):
        q.grad = None
        run(q.requires_grad_()).backward()
        grads.append(q.grad)
    assert_same_bits("gradient", *grads)


def test_strided_inputs():
    """As transformers gives them: heads before tokens."""
    q, k, v = (torch.randn(h, 50, 16).transpose(0, 1).requires_grad_() for h in (4, 2, 2))
    out = rlkern.shared_prefix_attention(q, k, v)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(out, want)


@settings(max_examples=40, deadline=None)
@given(
    spec=st.lists(
        st.recursive(
            st.tuples(st.integers(0, 90), st.just([])),
            lambda child: st.tuples(st.integers(0, 60), st.lists(child, max_size=3)),
            max_leaves=6,
        ),
        max_size=3,
    ),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    softcap=st.sampled_from([0.0, 3.0]),
)
def test_any_forest(spec, group, kv_heads, width, dtype, softcap):
    ends, bounds = samples.ends_of(spec)
    heads = (group * kv_heads, kv_heads, kv_heads)
    qkv = [torch.randn(len(ends), h, width).to(dtype) for h in heads]
    args = (*qkv, ends, bounds, width**-0.5, softcap)
    out = torch.ops.rlkern.shared_prefix_attention_fwd(*args)
    grads = torch.ops.rlkern.shared_prefix_attention_bwd(*samples.backward_inputs(args, out))
    wide = to_double(args)
    truth = reference.forward(*wide)
    wants = reference.backward(*samples.backward_inputs(wide, truth))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip((*out, *grads), (*truth, *wants)):
        size = float(want.nan_to_num(neginf=0.0).abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance * max(1.0, size)
        )


GOOD = next(iter(samples.sample_inputs("cpu", torch.float32)))[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "expected q to be a Tensor, got list"),
        ({"q": GOOD[0].int()}, TypeError, "q of dtype float32"),
        ({"q": GOOD[0][0]}, ValueError, r"q of shape \(T, Hq, D\), got \(4, 64\)"),
        ({"q": GOOD[0][:, :3]}, ValueError, "q with a multiple of Hkv = 2 heads, got 3"),
        ({"k": GOOD[1].half()}, TypeError, "k of dtype float32, got float16"),
        ({"k": GOOD[1][:5]}, ValueError, "k of shape"),
        ({"v": GOOD[2][..., :8]}, ValueError, "v of shape"),
        ({"subtree_end": GOOD[3].long()}, TypeError, "subtree_end of dtype int32, got int64"),
        ({"subtree_end": GOOD[3][:5]}, ValueError, r"subtree_end of shape \(T,\) = \(81,\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens to rise from 0 to T = 81"),
        ({"softcap": -1.0}, ValueError, "softcap to be positive"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    arguments = dict(zip(("q", "k", "v", "subtree_end"), GOOD[:4])) | change
    with pytest.raises(error, match=f"^{OP}: .*{message}"):
        rlkern.shared_prefix_attention(**arguments)
