"""One batch for every trainer, our loss and gradient on it, and how far two tensors are apart."""

from dataclasses import fields

import torch
from torch import Tensor

import rlkern
from rlkern import PolicyObjective

HORIZON = 37
# float32 sums in another order; float64 the same formula
BUDGET = {torch.float32: 2e-6, torch.float64: 1e-12}
DTYPES = [torch.float32, torch.float64]


def distance(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, over the largest element when that is above 1."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{tuple(got.shape)}, not {tuple(want.shape)}"
    return ((got - want).abs().max() / want.abs().max().clamp(min=1.0)).item()


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest element: of gradients, whose scale is arbitrary."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{tuple(got.shape)}, not {tuple(want.shape)}"
    scale = want.abs().max()
    assert scale > 0, "nothing to compare: the gradient is zero"
    return ((got - want).abs().max() / scale).item()


class Batch:
    """(B, L) log-probs of completions of the given lengths, and a prefix mask."""

    def __init__(self, lengths=(17, 5, 1, 24, 11, 8), spread=0.3, dtype=torch.float32, seed=0):
        random = torch.Generator().manual_seed(seed)
        rows, columns = len(lengths), max(lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        self.dtype = dtype
        self.old = -normal(rows, columns).abs() - 0.5
        self.logprob = self.old + spread * normal(rows, columns)
        self.ref = self.logprob + 0.4 * normal(rows, columns)
        self.entropy = normal(rows, columns).abs()
        self.advantages = normal(rows)
        self.rollout = self.old + 0.2 * normal(rows, columns)
        self.mask = torch.arange(columns) < torch.tensor(lengths)[:, None]

    def ours(self, objective: PolicyObjective, **options) -> tuple[Tensor, dict, Tensor]:
        """loss, metrics, d loss / d logprob."""
        logprob = self.logprob.clone().requires_grad_()
        out = rlkern.policy_loss(
            logprob, self.old, self.advantages, mask=self.mask, objective=objective, **options
        )
        (grad,) = torch.autograd.grad(out.loss, logprob)
        return out.loss.detach(), out.metrics, grad


def describe(objective: PolicyObjective, **options) -> str:
    """The options that are not the default, and the aggregation, as a user writes them."""
    chosen = [
        f"{f.name}={getattr(objective, f.name)!r}"
        for f in fields(PolicyObjective)
        if f.init and (f.name == "loss_agg_mode" or getattr(objective, f.name) != f.default)
    ]
    return ", ".join([*chosen, *(f"{name}={value}" for name, value in options.items())])
