"""Training attention over packed trees: a prefix that many sequences share is computed once."""

import math

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.shared_prefix_attention.op import SharedPrefixAttention

_OP = "shared_prefix_attention"


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which a row sees the tokens on its path from the root, and no others.

        s[i, j] = scale q[i] . k[j]   (with a soft cap: softcap tanh(s / softcap))
        out[i] = sum_j exp(s[i, j] - lse[i]) v[j];   lse[i] = log sum_j exp(s[i, j])

    over the keys j of row i's pack with j <= i < subtree_end[j]. Trees lie in depth-first order, a
    node's tokens before its children's (`rlkern.kv.tree_pack` lays them out so): then subtree_end
    is the row after the last token at or below the token's node. Query head h reads head
    h // (Hq / Hkv) of keys. One number a key is the column-wise mask of arXiv 2410.01359.

    Args:
        q: (T, Hq, D) float32, bfloat16 or float16. float64 is computed by the reference.
        k, v: (T, Hkv, D) of q's dtype; Hq is a multiple of Hkv.
        subtree_end: (T,) int32, rows of the packed tensors. None: plain causal attention, every
            pack a chain.
        cu_seqlens: (S + 1,) int32 or int64, packs that do not see each other. None: one pack. Its
            values are checked on the CPU alone.
        scale: default 1 / sqrt(D).
        return_lse: returns lse too.

    Returns:
        out (T, Hq, D) of q's dtype, and lse (T, Hq) float32; 0 and -inf for a row that sees
        nothing. Both are differentiable with respect to q, k and v.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.

    Scores and sums are float32, also those of a key's gradient over all branches that see it. Two
    runs give the same bits, with any number of threads, and a pack's do not depend on the packs
    beside it. Rows of a tree's first branch have the bits of the same rows as a chain; those of
    other branches add up the same keys in tiles that are cut elsewhere, and agree to rounding.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.tensor(_OP, name, tensor)
    _check.dtype(_OP, "q", q, _check.FLOATS)
    _check.ndim(_OP, "q", q, "(T, Hq, D)")
    tokens, heads, width = q.shape
    for name, tensor in (("k", k), ("v", v)):
        _check.dtype(_OP, name, tensor, (q.dtype,))
        _check.same_device(_OP, name, tensor, "q", q.device)
        _check.ndim(_OP, name, tensor, "(T, Hkv, D)")
        _check.shape(_OP, name, tensor, (tokens, k.shape[1], width), "(T, Hkv, D)")
    kv_heads = k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        _check.fail(_OP, "q", f"with a multiple of Hkv = {kv_heads} heads", heads)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, tokens + 1, max(1, tokens), device=q.device)
    _check.offsets(_OP, cu_seqlens, "q", q)
    cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    if subtree_end is None:
        # the end of the pack that a row lies in
        row = torch.arange(tokens, device=q.device, dtype=torch.int32)
        pack = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
        subtree_end = torch.nn.functional.pad(cu_seqlens[1:], (0, 1))[pack]
    _check.tensor(_OP, "subtree_end", subtree_end)
    _check.dtype(_OP, "subtree_end", subtree_end, (torch.int32,))
    _check.same_device(_OP, "subtree_end", subtree_end, "q", q.device)
    _check.shape(_OP, "subtree_end", subtree_end, (tokens,), "(T,)")
    if scale is None:
        scale = 1.0 / math.sqrt(max(1, width))
    if softcap is not None:
        _check.positive(_OP, "softcap", softcap)
    out, lse = SharedPrefixAttention.apply(
        *(x.contiguous() for x in (q, k, v, subtree_end)),
        cu_seqlens,
        float(scale),
        float(softcap or 0.0),
    )
    return (out, lse) if return_lse else out
