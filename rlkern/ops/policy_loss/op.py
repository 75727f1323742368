"""Schema, fake, autograd and owners of `policy_loss`."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkern import _library
from rlkern.ops.policy_loss import reference

METRICS = (
    "num_tokens",
    "pg_clipfrac",
    "pg_clipfrac_lower",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "ppo_kl",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "kl",
    "entropy",
    "rollout_is_mean",
    "rollout_is_eff_sample_size",
    "rollout_rs_masked_fraction",
    "ratio_variance",
)


def _fake(logprob, *rest):
    want_grad, want_entropy_grad = rest[-2:]
    loss = logprob.new_empty((), dtype=torch.float32)
    metrics = logprob.new_empty((len(METRICS),), dtype=torch.float32)
    grad = logprob.new_empty(logprob.shape if want_grad else (0,), dtype=torch.float32)
    grad_entropy = logprob.new_empty(
        logprob.shape if want_entropy_grad else (0,), dtype=torch.float32
    )
    return loss, metrics, grad, grad_entropy


_library.define(
    "policy_loss_fwd(Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor? cu_seqlens, "
    "Tensor? mask, Tensor? rollout_logprob, Tensor? ref_logprob, Tensor? entropy, "
    "Tensor? nll_weight, Tensor? cu_segments, int[] kinds, float[] numbers, bool want_grad, "
    "bool want_entropy_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_library.fill("policy_loss_fwd", reference.forward, "rlkern.ops.policy_loss.triton:forward")


_run = torch.ops.rlkern.policy_loss_fwd.default


class Metrics(Mapping[str, Tensor]):
    """Scalars by name, views of the one tensor that the op returns, made where they are read."""

    def __init__(self, places: dict[str, int], values: Tensor):
        self._places, self._values = places, values

    def __getitem__(self, name: str) -> Tensor:
        return self._values[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return repr(dict(self))


def _places(ref: bool, entropy: bool, rollout: bool, quadratic: bool) -> dict[str, int]:
    given = {"kl": ref, "entropy": entropy, "ratio_variance": quadratic}
    given |= {name: rollout for name in METRICS if "rollout" in name}
    return {name: i for i, name in enumerate(METRICS) if given.get(name, True)}


PLACES = {have: _places(*have) for have in itertools.product((False, True), repeat=4)}
"""By whether a call has ref, entropy, rollout and the quadratic surrogate: its metrics' places."""


class PolicyLoss(torch.autograd.Function):
    """(loss, metrics); the forward pass has the gradient already, up to the upstream scalar."""

    @staticmethod
    def forward(ctx, logprob: Tensor, entropy: Tensor | None, rest: tuple):
        # rest in one piece: autograd looks at each argument of its own
        # float64 is for checking formulas: the reference alone computes in it
        run = reference.forward if logprob.dtype == torch.float64 else _run
        *before, nll_weight, cu_segments, kinds, numbers = rest
        tensors = (logprob, *before, entropy, nll_weight, cu_segments)
        loss, metrics, *grads = run(*tensors, kinds, numbers, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss, _):
        # what once_differentiable adds takes as long as all else here
        return (_once if torch.is_grad_enabled() else _scaled)(ctx, grad_loss)


def _scaled(ctx, grad_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_loss is None:
        return None, None, None
    grad, grad_entropy = ctx.saved_tensors
    wanted, entropy_wanted, _ = ctx.needs_input_grad
    # loss.backward() passes 1: no pass over the tokens. Looking would stall a GPU.
    plain = type(grad_loss) is Tensor and grad_loss.is_cpu and not torch.compiler.is_compiling()
    if not plain or grad_loss.item() != 1.0:
        grad = grad * grad_loss if wanted else None
        grad_entropy = grad_entropy * grad_loss if entropy_wanted else None
    return grad if wanted else None, grad_entropy if entropy_wanted else None, None


_once = once_differentiable(_scaled)
