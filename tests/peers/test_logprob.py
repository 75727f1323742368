"""linear_logprob and logprob_from_logits against every installed implementation of the same."""

import pytest
import torch
from peers.compare import distance, relative
from torch import Tensor

import rlkern
from bench.oracles import Peer, linear_peers, logits_peers
from rlkern.integrations.trl import LogprobHead

TOKENS, HIDDEN, VOCAB = 160, 96, 5003
TEMPERATURE = 0.7
BOTH = ("logprob", "entropy")
# Over the largest element. Ours is held to float64; verl and Liger take the entropy as
# logsumexp - sum p z, a difference of large numbers.
FLOAT32_ERROR, FLOAT32_BUDGET = 5e-6, 2e-5
# of gradients of 16-bit inputs, over the largest element
BFLOAT16_GRADIENTS = 0.05
SHAPE = f"T={TOKENS}, H={HIDDEN}, V={VOCAB}"


def hidden_states(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A policy in training; every fourth row has one token far above the rest."""
    hidden = torch.randn(TOKENS, HIDDEN)
    weight = torch.randn(VOCAB, HIDDEN) * 3 / HIDDEN**0.5
    targets = torch.randperm(VOCAB)[:TOKENS]
    weight[targets[::4]] += 20 * hidden[::4] / hidden[::4].square().sum(1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), targets


def upstream(entropy: bool) -> list[Tensor]:
    """Of random sign, and exact in bfloat16: outputs in 16 bits take 16-bit gradients."""
    return [torch.randn(TOKENS).bfloat16().float() for _ in range(1 + entropy)]


def run(call, tensors: tuple, extra: tuple, grads: list[Tensor]) -> tuple[list, tuple]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = [x for x in call(*leaves, *extra) if x is not None]
    grads = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)]
    return outputs, torch.autograd.grad(outputs, leaves, grads)


def from_logits(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = z.log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


class Linear:
    """Ours, float64 truth and inputs for the peers that take hidden states."""

    extra_names = f"temperature={TEMPERATURE}"

    def __init__(self, dtype: torch.dtype, entropy: bool):
        *self.tensors, targets = hidden_states(dtype)
        self.extra = (targets, TEMPERATURE)
        self.outputs = BOTH if entropy else BOTH[:1]

    def ours(self, hidden, weight, targets, temperature):
        out = rlkern.linear_logprob(
            hidden, weight, targets, temperature=temperature, outputs=self.outputs
        )
        return out.logprob, out.entropy

    def truth(self, hidden, weight, targets, temperature):
        return from_logits(hidden @ weight.T / temperature, targets)[: len(self.outputs)]

    def largest_logit(self) -> float:
        hidden, weight = (x.double() for x in self.tensors)
        return (hidden @ weight.T / TEMPERATURE).abs().max().item()


class Logits(Linear):
    extra_names = ""

    def __init__(self, dtype: torch.dtype, entropy: bool):
        hidden, weight, targets = hidden_states(torch.float32)
        self.tensors = [(hidden @ weight.T).to(dtype)]
        self.extra = (targets,)
        self.outputs = BOTH if entropy else BOTH[:1]

    def ours(self, logits, targets):
        out = rlkern.logprob_from_logits(logits, targets, outputs=self.outputs)
        return out.logprob, out.entropy

    def truth(self, logits, targets):
        return from_logits(logits, targets)[: len(self.outputs)]

    def largest_logit(self) -> float:
        return self.tensors[0].abs().max().item()


PEERS = {name: (Linear, peer) for name, peer in linear_peers().items()}
PEERS |= {name: (Logits, peer) for name, peer in logits_peers().items()}


def compare(kind: type[Linear], peer: Peer, dtype: torch.dtype) -> tuple:
    """The problem, and (outputs, gradients) of ours, of the peer, and in float64."""
    entropy = peer.package != "torch"
    problem, grads = kind(dtype, entropy), upstream(entropy)
    tensors, extra = problem.tensors, problem.extra
    ours = run(problem.ours, tensors, extra, grads)
    theirs = run(peer.call, tensors, extra, grads)
    double = [x.double() for x in tensors]
    return problem, ours, theirs, run(problem.truth, double, extra, grads)


def called(problem: Linear) -> str:
    names = [f"outputs={problem.outputs}"] + [problem.extra_names] * bool(problem.extra_names)
    return ", ".join(names)


@pytest.mark.parametrize("name", PEERS)
def test_float32_values_and_gradients_are_the_peers(name, parity):
    kind, peer = PEERS[name]
    problem, ours, theirs, truth = compare(kind, peer, torch.float32)
    for got, want in zip((*ours[0], *ours[1]), (*truth[0], *truth[1]), strict=True):
        assert distance(got, want) <= FLOAT32_ERROR
    parity(
        "log-probs",
        name,
        f"float32, {SHAPE}",
        rlkern=called(problem),
        value=max(distance(a, b) for a, b in zip(ours[0], theirs[0])),
        gradient=max(relative(a, b) for a, b in zip(ours[1], theirs[1])),
        budget=FLOAT32_BUDGET,
    )


TRLS = {
    "biased": {"bias": True},
    "soft-capped and scaled": {"softcap": 8.0, "logit_scale": 0.5},
    "biased, soft-capped and scaled": {"bias": True, "softcap": 8.0, "logit_scale": 0.5},
}


@pytest.mark.parametrize("case", TRLS)
def test_bias_softcap_and_logit_scale_are_trls(case, parity):
    """The other peers have none of them."""
    pytest.importorskip("trl")
    from trl.kernels import ChunkedLogProbFunction

    options = TRLS[case] | {"temperature": TEMPERATURE}
    *tensors, targets = hidden_states(torch.float32)
    if options.pop("bias", False):
        tensors.append(torch.randn(VOCAB))
    names = ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")
    rest = (targets, TEMPERATURE, 1024, options.get("softcap"), options.get("logit_scale", 1.0))
    constants = []

    def through(function):
        def call(hidden, weight, bias=None):
            values = function.apply(hidden, weight, bias, *rest, names)
            constants.append(values[2:])
            return values[:2]

        return call

    grads = upstream(entropy=True)
    heads = (LogprobHead, ChunkedLogProbFunction)
    got, want = (run(through(head), tensors, (), grads) for head in heads)
    (sum_sq, _, is_top1), (their_sum_sq, no_mean, their_top1) = constants
    assert no_mean is None
    assert 0 < is_top1.sum() < TOKENS
    assert torch.equal(is_top1, their_top1)
    pairs = [*zip(got[0], want[0]), (sum_sq, their_sum_sq)]
    parity(
        "log-probs",
        "TRL ChunkedLogProbFunction",
        f"float32, {case}, {SHAPE}; log_sum_sq_probs and is_top1 too",
        rlkern=", ".join(
            ["bias=bias"] * len(tensors[2:]) + [f"{k}={v}" for k, v in options.items()]
        ),
        value=max(distance(a, b) for a, b in pairs),
        gradient=max(relative(a, b) for a, b in zip(got[1], want[1])),
        budget=FLOAT32_BUDGET,
    )


@pytest.mark.parametrize("name", PEERS)
def test_bfloat16_is_closer_to_float64_than_the_peer(name, parity):
    """Peers round logits or outputs to bfloat16 on the way; the gap is theirs, and bounded."""
    kind, peer = PEERS[name]
    problem, ours, theirs, truth = compare(kind, peer, torch.bfloat16)
    for what, a, b, want in zip(problem.outputs, ours[0], theirs[0], truth[0]):
        mine, other = ((x.double() - want).abs() for x in (a, b))
        assert mine.mean() < other.mean(), f"{what}: mean error {mine.mean()}, {other.mean()}"
        assert mine.max() < other.max(), f"{what}: largest error {mine.max()}, {other.max()}"
    errors = []
    for a, b, want in zip(ours[1], theirs[1], truth[1]):
        mine, other = ((x.double() - want).square().mean().sqrt() for x in (a, b))
        assert mine <= other, f"gradient: RMS error {mine}, theirs {other}"
        errors.append((mine / other).item())
    value = max((a.double() - b.double()).abs().max().item() for a, b in zip(ours[0], theirs[0]))
    parity(
        "log-probs",
        name,
        f"bfloat16, {SHAPE}",
        rlkern=called(problem),
        value=value,
        gradient=max(relative(a, b) for a, b in zip(ours[1], theirs[1])),
        # two roundings of the largest logit: after the matmul and after the temperature
        budget=torch.finfo(torch.bfloat16).eps * problem.largest_logit(),
        gradient_budget=BFLOAT16_GRADIENTS,
        note=f"closer to float64 than the peer; RMS gradient error {max(errors):.2f} of its",
    )
