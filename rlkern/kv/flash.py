"""Training attention along packed trees by flash-attn, where that package is installed.

What a row sees is its own node, causally, and every node above it, whole. So attention over a tree
is one causal call over all nodes, and for each depth of the tree one call without a mask, of the
rows below the nodes of that depth to those nodes: disjoint ranges of rows, and the sequences of a
packed call. The parts are merged by their logsumexps; in the backward every call gets the merged
output and logsumexp, which makes its weights those of the whole row, and the gradients add up.

A group of answers to one prompt is two calls. Keys that are shared are read once for all branches.
`shared_prefix_attention` does the same in one kernel, for every dtype and device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkern import _check
from rlkern._peers import Peer
from rlkern.kv.hf import Attend
from rlkern.ops.merge_attention import merge_attention

_OP = "kv.flash"
FLASH = Peer("flash-attn", ">=2.7,<2.9")
_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_HOW = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap")


class Pass(NamedTuple):
    """A packed call: sequence i of the queries sees sequence i of the keys."""

    queries: Tensor | None  # int64, rows of the pack; None: all
    keys: Tensor | None
    sequences: dict[str, Any]
    causal: bool


def along_tree(subtree_end: Tensor, cu_seqlens: Tensor | None = None) -> Attend:
    """As `kv.hf.along_tree`, for 16-bit queries on CUDA.

    Args:
        subtree_end, cu_seqlens: of `kv.TreePack`. Their values are read once, here.

    Raises:
        RuntimeError: flash-attn is missing, or wants other arguments than those that are known.
    """
    module = "flash_attn.flash_attn_interface._flash_attn_varlen"
    forward = FLASH.find(_OP, f"{module}_forward", ("q", "k", "v", *_SEQUENCES, *_HOW))
    tensors = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
    more = ("alibi_slopes", "deterministic")
    backward = FLASH.find(_OP, f"{module}_backward", (*tensors, *_SEQUENCES, *_HOW, *more))
    passes = passes_of(subtree_end, cu_seqlens)

    def attend(layer, query, key, value, scale, softcap):
        if query.shape[-1] % 8:
            _check.fail(_OP, "query", "with heads of a multiple of 8 elements", query.shape[-1])
        args = (query.contiguous(), key.contiguous(), value.contiguous())
        return FlashTree.apply(*args, passes, forward, backward, scale, softcap or 0.0)

    return attend


def passes_of(subtree_end: Tensor, cu_seqlens: Tensor | None = None) -> list[Pass]:
    """The calls of a pack: over its nodes, and from below the nodes of each depth to them."""
    device, tokens = subtree_end.device, len(subtree_end)
    end = subtree_end.tolist()
    bounds = {0} if cu_seqlens is None else set(cu_seqlens.tolist())
    # a chain of single children is as good as one node
    begins = [i for i in range(tokens) if i in bounds or end[i] != end[i - 1]]
    nodes = list(zip(begins, [*begins, tokens][1:], strict=True))
    depths: list[list[tuple[int, int, int]]] = []  # (begin, end, end of the subtree)
    above: list[int] = []  # the ends of the subtrees around a node
    for begin, last in nodes:
        while above and above[-1] <= begin:
            above.pop()
        if end[begin] > last:
            if len(depths) == len(above):
                depths.append([])
            depths[len(above)].append((begin, last, end[begin]))
        above.append(end[begin])

    def sequences(queries: list[int], keys: list[int]) -> dict[str, Any]:
        offsets = (torch.tensor([0, *x], device=device).cumsum(0).int() for x in (queries, keys))
        longest = (max(x, default=0) for x in (queries, keys))
        return dict(zip(_SEQUENCES, (*offsets, *longest), strict=True))

    def rows(spans: list[tuple[int, int]]) -> Tensor:
        return torch.cat([torch.arange(*span, device=device) for span in spans])

    own = [last - begin for begin, last in nodes]
    passes = [Pass(None, None, sequences(own, own), True)]
    for inner in depths:
        lengths = [subtree - last for _, last, subtree in inner], [b - a for a, b, _ in inner]
        queries = rows([(last, subtree) for _, last, subtree in inner])
        keys = rows([(begin, last) for begin, last, _ in inner])
        passes.append(Pass(queries, keys, sequences(*lengths), False))
    return passes


class FlashTree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, passes, forward, backward, scale, softcap):
        tokens, heads, _ = q.shape
        outs = q.new_empty(len(passes), *q.shape)
        lse = q.new_full((len(passes), tokens, heads), -torch.inf, dtype=torch.float32)
        for i, one in enumerate(passes):
            part = forward(*_rows(one, q, k, v), **one.sequences, **_how(one, scale, softcap))
            at = slice(None) if one.queries is None else one.queries
            outs[i, at], lse[i, at] = part[0], part[1].transpose(0, 1)
        out, total = merge_attention(outs, lse)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.call = passes, backward, scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, total = ctx.saved_tensors
        passes, run, scale, softcap = ctx.call
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
        for one in passes:
            args = _rows(one, q, k, v)
            parts = [torch.empty_like(x) for x in args]
            at = slice(None) if one.queries is None else one.queries
            run(
                grad[at].contiguous(),
                *args,
                out[at],
                total[at].transpose(0, 1).contiguous(),
                *parts,
                **one.sequences,
                **_how(one, scale, softcap),
                alibi_slopes=None,
                deterministic=True,
            )
            for whole, part, where in zip(grads, parts, (at, *(_keys(one),) * 2), strict=True):
                whole[where] += part  # no row occurs twice in a pass
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), *(None,) * 5


def _keys(one: Pass) -> Any:
    return slice(None) if one.keys is None else one.keys


def _rows(one: Pass, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if one.queries is None:
        return q, k, v
    return q[one.queries], k[one.keys], v[one.keys]


def _how(one: Pass, scale: float, softcap: float) -> dict[str, Any]:
    return dict(zip(_HOW, (0.0, scale, one.causal, -1, -1, softcap), strict=True))
