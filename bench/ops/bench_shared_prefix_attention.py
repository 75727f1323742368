"""shared_prefix_attention on groups, against the bare matmuls, the unshared copies and torch's own.

`limit` is the matmuls of the pairs that are seen, and nothing else: two a pair forward, five more
backward; a causal square counts half. `chains` is our kernel on unshared copies, `eager` torch's
scaled_dot_product_attention on them, and `flex` FlexAttention, compiled, on the packed tree (on
CPUs it has no backward).
"""

from typing import NamedTuple

import pytest
import torch
from torch.nn.attention import flex_attention

import rlkern
from bench import harness
from bench.harness import Case, Problem

OP = "shared_prefix_attention"


class Group(NamedTuple):
    samples: int
    prompt: int
    own: int
    kv_heads: int
    group_size: int = 4  # query heads a head of keys
    width: int = 128


GROUPS = {
    "smoke": Group(2, 20, 5, 1, 2, 16),
    "8x-1k-256": Group(8, 1024, 256, 2),
    "8x-128-512": Group(8, 128, 512, 2),
    "1x-2k": Group(1, 1024, 1024, 2),
    "8x-8k-1k": Group(8, 8192, 1024, 8),
}
PASSES = ("forward", "forward+backward")
CASES = [
    Case("smoke"),
    *(Case(shape, "bfloat16", p) for shape in list(GROUPS)[1:4] for p in PASSES),
    Case("8x-1k-256", "float32", "forward+backward"),
    *(Case("8x-8k-1k", "bfloat16", p, "cuda") for p in PASSES),
]
VARIANTS = [harness.LIMIT, "rlkern", "chains", "eager", "flex"]


def problem(case: Case, device: str) -> Problem:
    g = GROUPS[case.shape]
    dtype, backward = getattr(torch, case.dtype), case.passes != "forward"
    heads, length = g.kv_heads * g.group_size, g.prompt + g.own
    tokens = g.prompt + g.samples * g.own
    own = torch.arange(g.samples).repeat_interleave(g.own)
    ends = torch.cat([torch.full((g.prompt,), tokens), g.prompt + (own + 1) * g.own])
    ends = ends.to(device, torch.int32)
    bounds = torch.arange(0, g.samples * length + 1, length, device=device)

    def tensors(*shape):
        """q, k, v and a gradient of the output; `shape` names where the heads go."""
        sizes = [[n if s == "heads" else s for s in shape] for n in (heads, *[g.kv_heads] * 2)]
        made = [torch.randn(*size, g.width, device=device).to(dtype) for size in (*sizes, sizes[0])]
        return [x.requires_grad_(backward) for x in made[:3]], made[3]

    def run(function, inputs, upstream):
        def call():
            out = function(*inputs)
            if backward:
                torch.autograd.grad(out, inputs, upstream)

        return call

    def tree(q, k, v):
        return rlkern.shared_prefix_attention(q, k, v, ends)

    def chains(q, k, v):
        return rlkern.shared_prefix_attention(q, k, v, cu_seqlens=bounds)

    def eager(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    def seen(_batch, _head, row, key):
        return (key <= row) & (row < ends[key])

    flex = torch.compile(flex_attention.flex_attention, dynamic=False)
    blocks = flex_attention.create_block_mask(seen, None, None, tokens, tokens, device=device)

    def flexible(q, k, v):
        return flex(q, k, v, block_mask=blocks, enable_gqa=True)

    # [problems, rows, keys] of the prompt, of responses over it, and of responses alone
    products = []
    for problems, rows, keys in (
        (heads, g.prompt, -(-g.prompt // 2)),
        (g.kv_heads, g.group_size * g.samples * g.own, g.prompt),
        (heads * g.samples, g.own, -(-g.own // 2)),
    ):
        sizes = ((rows, g.width), (keys, g.width), (rows, keys))
        products.append([torch.randn(problems, *s, device=device).to(dtype) for s in sizes])

    def matmuls():
        for queries, keys, weights in products:
            torch.bmm(queries, keys.mT)
            torch.bmm(weights, keys)
            if backward:
                for _ in range(2):  # the scores again, and the weights' gradients
                    torch.bmm(queries, keys.mT)
                    torch.bmm(weights.mT, queries)  # of keys and of values
                torch.bmm(weights, keys)

    variants = {
        harness.LIMIT: matmuls,
        "rlkern": run(tree, *tensors(tokens, "heads")),
        "chains": run(chains, *tensors(g.samples * length, "heads")),
        "eager": run(eager, *tensors(g.samples, "heads", length)),
    }
    if case.shape != "smoke" and not (backward and device == "cpu"):
        variants["flex"] = run(flexible, *tensors(1, "heads", tokens))
    return Problem(variants, "matmul", g._asdict())


@pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS), ids=str)
def test_speed(race, case, variant):
    race(OP, problem, case, variant)
