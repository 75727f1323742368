"""A decoder layer of Llama's kind, as mathematics and as an op of the decoder's own.

The ops are private: their arguments are fields of `decoder.Layer` and of a TreePlan, and are not
checked here. C++ owns them on the CPU; elsewhere the decoder calls what they consist of.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkern import _library
from rlkern.ops import rms_norm, tree_attention, write_kv  # noqa: F401  define what is called below

Map = Callable[..., Tensor]
# a norm's weight, and epsilon
Norm = tuple[Tensor | None, float]


def compute(
    x: Tensor,
    norm: Map,
    norms: tuple[Norm, Norm, Norm, Norm],
    linears: tuple[Map, ...],
    width: int,
    cos: Tensor,
    sin: Tensor,
    attend: Map,
) -> Tensor:
    """Norm, attention, norm, gated MLP, with a residual around each half.

    norms: before attention, before the MLP, of queries, of keys. linears: q, k, v, o, gate, up,
    down. attend: from queries, keys and values (T, heads, width) to (T, heads, width).
    """
    q, k, v, o, gate, up, down = linears
    heads = (len(x), -1, width)
    h = norm(x, *norms[0], None, None)
    queries = norm(q(h).view(heads), *norms[2], cos, sin)
    keys = norm(k(h).view(heads), *norms[3], cos, sin)
    x = x + o(attend(queries, keys, v(h).view(heads)).flatten(1))
    h = norm(x, *norms[1], None, None)
    return x + down(F.silu(gate(h)).mul_(up(h)))


_WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")


def forward(x, norm_1, norm_2, q_norm, k_norm, eps, *rest):
    """`decoder_layer` in torch; rest: weights, biases, rotation, cache, plan, scale."""
    weights, biases, (cos, sin, write_slots, k_cache, v_cache) = rest[:7], rest[7:14], rest[14:19]
    *plan, scale = rest[19:]

    def attend(query, key, value):
        torch.ops.rlkern.write_kv(key, value, write_slots, k_cache, v_cache, None, None)
        return torch.ops.rlkern.tree_attention(query, k_cache, v_cache, *plan, scale, 0.0)[0]

    return compute(
        x,
        torch.ops.rlkern.rms_norm,
        tuple((weight, eps) for weight in (norm_1, norm_2, q_norm, k_norm)),
        tuple(partial(F.linear, weight=w, bias=b) for w, b in zip(weights, biases, strict=True)),
        k_cache.shape[-1],
        cos,
        sin,
        attend,
    )


_library.define(
    "decoder_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
)
_library.fill("decoder_linear", F.linear)
_library.define(
    "decoder_layer(Tensor x, Tensor norm_1, Tensor norm_2, Tensor? q_norm, Tensor? k_norm, "
    f"float eps, {', '.join(f'Tensor {name}' for name in _WEIGHTS)}, "
    f"{', '.join(f'Tensor? {name}_bias' for name in _WEIGHTS)}, Tensor cos, Tensor sin, "
    "Tensor write_slots, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rows, Tensor items, "
    "Tensor slots, Tensor trees, Tensor parts, Tensor part_offsets, int chunk, int max_rows, "
    "float scale) -> Tensor",
    lambda x, *rest: x.new_empty(x.shape),
)
_library.fill("decoder_layer", forward)
NATIVE = _library.OWNERS["decoder_layer"]["CPU"].kernel == "native"
