"""Inputs of `shared_prefix_attention`: trees, chains, several packs, odd heads and widths."""

from collections.abc import Iterator

import torch
from torch import Tensor

# A tree is (tokens of its root, its children).
CHAIN = (37, [])
GROUP = (41, [(9, []), (1, []), (30, [])])
DEEP = (5, [(20, [(3, []), (17, [(2, []), (6, [])])]), (11, [])])


def ends_of(trees: list[tuple]) -> tuple[Tensor, Tensor]:
    """subtree_end of the trees' tokens, depth first, and cu_seqlens: a tree is a pack."""
    ends: list[int] = []
    bounds = [0]

    def place(tree: tuple) -> None:
        length, children = tree
        first = len(ends)
        ends.extend([0] * length)
        for child in children:
            place(child)
        ends[first : first + length] = [len(ends)] * length

    for tree in trees:
        place(tree)
        bounds.append(len(ends))
    return torch.tensor(ends, dtype=torch.int32), torch.tensor(bounds, dtype=torch.int32)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same for a device and dtype at every call."""
    random = torch.Generator().manual_seed(0)

    def case(trees, heads, kv_heads, width, softcap=0.0, size=1.0, scale=None, ends=None):
        tree = ends_of(trees)
        tokens = len(tree[0])
        shapes = ((tokens, heads, width), *((tokens, kv_heads, width),) * 2)
        q, k, v = (torch.randn(shape, generator=random) for shape in shapes)
        tensors = [x.to(device, dtype) for x in (size * q, k, v)]
        tree = (tree[0] if ends is None else ends, tree[1])
        return (*tensors, *(x.to(device) for x in tree), scale or width**-0.5, softcap)

    yield "a group", case([GROUP], 4, 2, 64)
    yield "a chain", case([CHAIN], 2, 2, 32)
    yield "deep, and others", case([DEEP, CHAIN, (1, []), GROUP], 2, 1, 16)
    yield "odd", case([(19, [(3, []), (8, [])])], 3, 1, 33)
    yield "wide", case([(24, [(9, [])])], 2, 1, 256)
    yield "soft cap", case([(24, [(9, []), (2, [])])], 2, 1, 32, softcap=2.5)
    yield "peaked", case([(50, [(9, []), (2, [])])], 2, 2, 64, size=30.0)
    yield "scale", case([(24, [(9, []), (2, [])])], 2, 1, 32, scale=0.37)
    blind = torch.arange(1, 22, dtype=torch.int32)
    blind[3] = 0  # sees not even itself
    yield "a row without keys", case([(21, [])], 2, 1, 16, ends=blind)
    yield "no rows", case([], 2, 1, 16)
    yield "an empty pack", case([(0, []), (7, []), (0, [])], 2, 1, 16)
    yield "long", case([(140, [(40, []), (23, [])])], 2, 1, 80)
    yield "long chains", case([(150, []), (70, [])], 1, 1, 128)


def backward_inputs(args: tuple, outputs: tuple) -> tuple:
    """Arguments of backward after forward(*args) -> outputs, with gradients of random sign."""
    q, k, v, *rest = args
    out, lse = outputs
    random = torch.Generator().manual_seed(5)
    grad_out = torch.randn(out.shape, generator=random).to(out)
    # every other sample's lse has no gradient
    grad_lse = torch.randn(lse.shape, generator=random).to(lse) if q.shape[0] % 2 else None
    return grad_out, grad_lse, q, k, v, out, lse, *rest


def bytes_and_flops(
    tokens: int, pairs: int, heads: int, kv_heads: int, width: int, itemsize: int
) -> tuple[int, int]:
    """Of the forward, for `pairs` of a row and a key that it sees."""
    num_bytes = 2 * tokens * (heads + kv_heads) * width * itemsize
    return num_bytes, 4 * pairs * heads * width
