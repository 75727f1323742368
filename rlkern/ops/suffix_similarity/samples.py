"""Inputs of `suffix_similarity`: related, unrelated, repeating, short and empty rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkern.ops.suffix_similarity.reference import MODES


def related(pairs: int, width: int, vocab: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows, and the same with some tokens changed and some rows turned."""
    a = torch.randint(vocab, (pairs, width), generator=random)
    changed = torch.rand((pairs, width), generator=random) < 0.2
    b = torch.where(changed, torch.randint(vocab, (pairs, width), generator=random), a)
    turned = torch.arange(pairs) % 3 == 0
    return a, torch.where(turned[:, None], b.roll(2, 1), b)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name, arguments of forward) pairs, the same at every call; tokens are int64 for any dtype"""
    random = torch.Generator().manual_seed(0)
    for mode, name in enumerate(MODES):
        for what, pairs, width, vocab in (
            ("related", 18, 20, 1000),
            ("a whole word", 3, 64, 40),
            ("63 tokens", 5, 63, 5),
            ("repeating", 10, 31, 2),
            ("one token", 9, 1, 2),
            ("no pairs", 0, 20, 9),
            ("no tokens", 3, 0, 9),
        ):
            a, b = related(pairs, width, vocab, random)
            lengths = [torch.full((pairs,), width) for _ in range(2)]
            args = (a, b, *lengths)
            yield f"{name}, {what}", (*(t.to(device) for t in args), mode)
        a, b = related(16, 50, 3, random)
        lengths = [torch.randint(51, (16,), generator=random) for _ in range(2)]
        lengths[0][:3] = 0
        lengths[1][1:4] = 0
        args = (a - (1 << 40), b - (1 << 40), *lengths)
        yield f"{name}, of any length", (*(t.to(device) for t in args), mode)


def bytes_and_flops(pairs: int, width: int) -> tuple[int, int]:
    """Tokens and lengths in, a float out; about fifteen operations a token."""
    return pairs * (2 * width * 8 + 16 + 4), 15 * pairs * width
