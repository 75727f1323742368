"""Edit distance, suffix match and ROUGE-L by plain dynamic programmes: the specification.

a and b are the last `length` tokens of their rows.
    edit: D[i, j] = min(D[i-1, j] + 1, D[i, j-1] + 1, D[i-1, j-1] + [a_i != b_j]) / max(|a|, |b|)
    suffix: the longest suffix of a that stands anywhere in b, or the other way round, / max(...)
    rouge: 2 LCS / (|a| + |b|)
Two empty rows are equal.
"""

import torch
from torch import Tensor

MODES = ("edit", "suffix", "rouge")


def forward(
    tokens_a: Tensor, tokens_b: Tensor, lengths_a: Tensor, lengths_b: Tensor, mode: int
) -> Tensor:
    width = tokens_a.shape[1]
    n, m = (lengths.clamp(0, width) for lengths in (lengths_a, lengths_b))
    # a row's tokens at its end: those that do not count come first
    slot = torch.arange(width, device=tokens_a.device)
    live_a, live_b = (slot >= width - length[:, None] for length in (n, m))
    equal = tokens_a[:, :, None] == tokens_b[:, None, :]
    equal = equal & live_a[:, :, None] & live_b[:, None, :]
    name = MODES[mode]
    if name == "rouge":
        count, total = 2 * _subsequence(equal), n + m
    else:
        total = torch.maximum(n, m)
        if name == "edit":
            count = _edit(equal, live_a, live_b)
        else:
            count = torch.maximum(_suffix(equal), _suffix(equal.mT))
    empty = 0.0 if name == "edit" else 1.0
    ratio = count.float() / total.clamp(min=1).float()
    return torch.where(n + m == 0, empty, ratio)


def _edit(equal: Tensor, live_a: Tensor, live_b: Tensor) -> Tensor:
    pairs, rows, columns = equal.shape
    # a token that does not count costs nothing to delete, and nothing to pass by
    above = [torch.zeros(pairs, dtype=torch.int64, device=equal.device)]
    for j in range(columns):
        above.append(above[-1] + live_b[:, j])
    for i in range(rows):
        row = [above[0] + live_a[:, i]]
        for j in range(columns):
            replaced = above[j] + (~equal[:, i, j]).long()
            best = torch.minimum(above[j + 1] + 1, torch.minimum(row[-1] + 1, replaced))
            best = torch.where(live_b[:, j], best, row[-1])
            row.append(torch.where(live_a[:, i], best, above[j + 1]))
        above = row
    return above[-1]


def _subsequence(equal: Tensor) -> Tensor:
    pairs, rows, columns = equal.shape
    above = [torch.zeros(pairs, dtype=torch.int64, device=equal.device)] * (columns + 1)
    for i in range(rows):
        row = [above[0]]
        for j in range(columns):
            longest = torch.maximum(above[j + 1], row[-1])
            row.append(torch.where(equal[:, i, j], above[j] + 1, longest))
        above = row
    return above[-1]


def _suffix(equal: Tensor) -> Tensor:
    """Of a's tokens; equal is (N, a, b)."""
    pairs, rows, columns = equal.shape
    # live[:, j]: the suffix so far ends where b's token j is compared next
    live = torch.ones((pairs, columns), dtype=torch.bool, device=equal.device)
    count = torch.zeros(pairs, dtype=torch.int64, device=equal.device)
    for i in reversed(range(rows)):
        live = live & equal[:, i]
        count = count + live.any(-1)
        live = torch.nn.functional.pad(live[:, 1:], (0, 1))
    return count
