"""kv.flash: its calls add up to attention along the tree. flash-attn itself is stood in for.

The stand-in has the signatures of flash-attn 2.7 and 2.8 and their meaning, in plain torch: the
backward takes its weights from the logsumexp that it is given, as theirs does.
"""

import importlib.util
import random
import sys
import types

import pytest
import torch

import rlkern
from rlkern.kv import flash


def weights(q, k, lse, scale, causal, softcap):
    """-> exp(s - lse) (H, Tq, Tk), and what a gradient of s is multiplied with under a soft cap."""
    s = scale * torch.einsum("qhd,khd->hqk", q, k)
    slope = torch.ones_like(s)
    if softcap:
        capped = softcap * torch.tanh(s / softcap)
        s, slope = capped, 1 - (capped / softcap) ** 2
    if causal:
        s = s.masked_fill(torch.ones(s.shape[1:]).triu(1).bool(), -torch.inf)
    if lse is None:
        lse = s.logsumexp(-1)
    return (s - lse[..., None]).exp(), lse, slope


def wide(x, heads):
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def pairs(cu_q, cu_k):
    spans = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in spans]


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
):  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for at, of in pairs(cu_seqlens_q, cu_seqlens_k):
        assert at.stop - at.start <= max_seqlen_q
        assert of.stop - of.start <= max_seqlen_k
        keys, values = (wide(x[of], q.shape[1]) for x in (k, v))
        p, lse[:, at], _ = weights(q[at].float(), keys, None, softmax_scale, causal, softcap)
        out[at] = torch.einsum("hqk,khd->qhd", p, values).to(q.dtype)
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    heads, kv_heads = q.shape[1], k.shape[1]
    for at, of in pairs(cu_seqlens_q, cu_seqlens_k):
        x, g = q[at].float(), dout[at].float()
        keys, values = wide(k[of], heads), wide(v[of], heads)
        p, _, slope = weights(x, keys, softmax_lse[:, at], softmax_scale, causal, softcap)
        delta = (g * out[at].float()).sum(-1).T
        dp = torch.einsum("qhd,khd->hqk", g, values)
        ds = p * (dp - delta[..., None]) * slope * softmax_scale
        dq[at] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
        for to, whole in ((dk, torch.einsum("hqk,qhd->khd", ds, x)),
                          (dv, torch.einsum("hqk,qhd->khd", p, g))):  # fmt: skip
            to[of] = whole.unflatten(1, (kv_heads, -1)).sum(2).to(q.dtype)


@pytest.fixture
def flash_attn(monkeypatch):
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)


def grown(rng, depth):
    """subtree_end of a random tree, whose rows begin at 0."""
    own = rng.randint(1, 5)
    below = [] if depth == 0 else [grown(rng, depth - 1) for _ in range(rng.choice([0, 1, 2, 3]))]
    end, rows = own, []
    for child in below:
        rows += [e + end for e in child]
        end += len(child)
    return [end] * own + rows


def pack(seed):
    rng = random.Random(seed)
    trees = [grown(rng, depth) for depth in (0, 1, 2, 3, 3)]
    bounds, ends = [0], []
    for tree in trees:
        ends += [e + bounds[-1] for e in tree]
        bounds.append(len(ends))
    return torch.tensor(ends, dtype=torch.int32), torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_passes_are_attention_along_the_tree(flash_attn, seed, softcap):
    end, bounds = pack(seed)
    random = torch.Generator().manual_seed(seed)
    args = [torch.randn(len(end), heads, 16, generator=random) for heads in (4, 2, 2)]
    grad = torch.randn(len(end), 4, 16, generator=random)
    results = []
    for attend in (
        flash.along_tree(end, bounds),
        rlkern.kv.hf.along_tree(end, bounds),
    ):
        q, k, v = (x.clone().requires_grad_() for x in args)
        out = attend(0, q, k, v, 0.3, softcap)
        out.backward(grad)
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_a_group_is_two_calls():
    """A prompt of 3 tokens and answers of 2, 4 and 1; beside it a chain."""
    end = torch.tensor([10] * 3 + [5] * 2 + [9] * 4 + [10] + [14] * 4, dtype=torch.int32)
    first, second = flash.passes_of(end, torch.tensor([0, 10, 14]))
    assert first.sequences["cu_seqlens_q"].tolist() == [0, 3, 5, 9, 10, 14]
    assert first.causal
    assert second.queries.tolist() == list(range(3, 10))
    assert second.keys.tolist() == [0, 1, 2]
    assert (second.sequences["max_seqlen_q"], second.sequences["max_seqlen_k"]) == (7, 3)
    assert not second.causal


def test_no_tokens(flash_attn):
    none = torch.zeros(0, 2, 8)
    empty = torch.zeros(0, dtype=torch.int32)
    assert flash.along_tree(empty)(0, none, none, none, 1.0, None).shape == (0, 2, 8)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_without_the_package_it_says_what_to_install():
    with pytest.raises(RuntimeError, match=r"kv.flash: needs flash-attn .*pip install flash-attn"):
        flash.along_tree(torch.tensor([1], dtype=torch.int32))


def test_another_signature_is_refused(flash_attn, monkeypatch):
    interface = sys.modules["flash_attn.flash_attn_interface"]
    monkeypatch.setattr(interface, "_flash_attn_varlen_forward", lambda q, k, v, cu_seqlens: None)
    with pytest.raises(RuntimeError, match=r"as in flash-attn >=2.7,<2.9, got flash-attn"):
        flash.along_tree(torch.tensor([1], dtype=torch.int32))


def test_heads_that_it_would_pad_are_refused(flash_attn):
    x = torch.zeros(1, 1, 12)
    with pytest.raises(ValueError, match="multiple of 8 elements, got 12"):
        flash.along_tree(torch.tensor([1], dtype=torch.int32))(0, x, x, x, 1.0, None)


@pytest.mark.gpu
def test_flash_attn_itself():
    pytest.importorskip("flash_attn")
    end, bounds = (x.cuda() for x in pack(3))
    args = [torch.randn(len(end), heads, 64).cuda().bfloat16() for heads in (4, 2, 2)]
    results = []
    for attend in (flash.along_tree(end, bounds), rlkern.kv.hf.along_tree(end, bounds)):
        q, k, v = (x.clone().requires_grad_() for x in args)
        out = attend(0, q, k, v, 0.125, None)
        out.float().square().sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
