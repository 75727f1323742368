"""Stand-ins for packages that are not installed here: their recorded signatures, nothing else.

What a stub records was read in the package's source at the version that the page in
docs/integrations names.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor


def install(monkeypatch, path: str, **held) -> ModuleType:
    """A module of that dotted path, and its parents."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            module = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            if end > 1:
                monkeypatch.setattr(
                    sys.modules[".".join(parts[: end - 1])], parts[end - 1], module, raising=False
                )
    for name, value in held.items():
        setattr(sys.modules[path], name, value)
    return sys.modules[path]


LENGTHS = (7, 3, 1, 9, 5)


class Batch:
    """(B, L) float64 log-probs; masks with a hole in the first row."""

    def __init__(self, seed: int = 0, empty: bool = False):
        random = torch.Generator().manual_seed(seed)
        lengths = (*LENGTHS[:-1], 0) if empty else LENGTHS
        rows, columns = len(lengths), max(lengths)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.lengths = list(lengths)
        self.old = -normal(rows, columns).abs() - 0.5
        self.logprob = (self.old + 0.3 * normal(rows, columns)).clamp(max=-0.01)
        self.rollout = self.old + 0.2 * normal(rows, columns)
        self.ref = self.logprob + 0.2 * normal(rows, columns)
        self.advantages = normal(rows)[:, None].expand(rows, columns).contiguous()
        self.mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
        self.mask[0, 2] = False

    def leaf(self) -> Tensor:
        return self.logprob.clone().requires_grad_()


def clipped(logprob, old, advantages, low=0.2, high=0.2, c=None, level=None, mask=None) -> Tensor:
    """-min(r A, clip(r) A) of tokens, with the dual clip; level "sequence": the mean log-ratio."""
    x = logprob - old
    if level == "sequence":
        x = (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        x = x.expand_as(logprob)
    r = x.exp()
    loss = -torch.minimum(r * advantages, r.clamp(1 - low, 1 + high) * advantages)
    if c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -c * advantages), loss)
    return loss


def assert_same(got: Tensor, want: Tensor, leaf: Tensor, tolerance: float = 1e-9) -> None:
    """Values and gradients; the graph of `want` ends in the same leaf."""
    assert abs(got.item() - want.item()) <= tolerance * max(1, abs(want.item()))
    mine, theirs = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (got, want))
    assert theirs.abs().max() > 0
    assert (mine - theirs).abs().max() <= tolerance
