"""Every preset against an eager formula written here from its paper, value and gradient in fp64.

Nothing is imported from the package but the public names: masks, ratios, scans and means are
spelled out with loops and autograd.
"""

import dataclasses
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import rlkern
from rlkern import PolicyObjective
from rlkern.ops.policy_loss import presets
from rlkern.testing.implementations import implementations

HORIZON = 41.0


class Case:
    """Padded float64 tensors; rollout, reference and entropy beside them; marked sequences."""

    def __init__(self, lengths, spread=0.4, seed=0, columns=None):
        random = torch.Generator().manual_seed(seed)
        rows, columns = len(lengths), columns or max(lengths) + 2

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.live = -normal(rows, columns).abs() - 0.02
        self.old = (self.live + spread * normal(rows, columns)).clamp(max=-0.001)
        self.rollout = (self.old + 0.15 * normal(rows, columns)).clamp(max=-0.001)
        self.ref = self.live + 0.3 * normal(rows, columns)
        self.entropy = 1.5 * normal(rows, columns).abs()
        self.advantages = normal(rows)
        self.marked = normal(rows).relu()
        self.mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
        # a hole, as tool output leaves one
        if rows > 1 and lengths[0] > 3:
            self.mask[0, 2] = False

    @property
    def a(self) -> Tensor:
        return self.advantages[:, None].expand_as(self.live)

    def clean(self) -> "Case":
        """0 in the masked slots: what the eager formulas are given."""
        out = object.__new__(Case)
        out.mask, out.advantages, out.marked = self.mask, self.advantages, self.marked
        for name in ("live", "old", "rollout", "ref", "entropy"):
            setattr(out, name, torch.where(self.mask, getattr(self, name), 0.0))
        return out


# --- pieces -------------------------------------------------------------------------------------


def sg(x: Tensor) -> Tensor:
    return x.detach()


def clamped(x: Tensor) -> Tensor:
    return x.clamp(-20, 20)


def rows_of(c: Case, x: Tensor, reduce) -> Tensor:
    """reduce(the counting tokens of a row), 0 for a row without, as a column."""
    out = []
    for row, keep in zip(x, c.mask):
        out.append(reduce(row[keep]) if keep.any() else row.new_zeros(()))
    return torch.stack(out)[:, None]


def row_mean(c: Case, x: Tensor) -> Tensor:
    return rows_of(c, x, torch.mean)


def row_sum(c: Case, x: Tensor) -> Tensor:
    return rows_of(c, x, torch.sum)


def ppo(r: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def dual(loss: Tensor, a: Tensor, c: float) -> Tensor:
    return torch.where(a < 0, torch.minimum(loss, -a * c), loss)


def likelihood(c: Case, coef: float) -> Tensor:
    return -coef * c.marked[:, None] * c.live


def weighted(c: Case, w: Tensor) -> Tensor:
    return -sg(w) * c.a * c.live


def token_mean(c: Case, loss: Tensor) -> Tensor:
    return (loss * c.mask).sum() / max(int(c.mask.sum()), 1)


def sequence_mean(c: Case, loss: Tensor) -> Tensor:
    filled = c.mask.any(1)
    if not filled.any():
        return (loss * c.mask).sum()
    return row_mean(c, loss.expand_as(c.live))[filled].mean()


def sequence_sum(c: Case, loss: Tensor) -> Tensor:
    filled = max(int(c.mask.any(1).sum()), 1)
    return (loss * c.mask).sum() / filled


# --- the objectives -----------------------------------------------------------------------------


def ratio(c: Case) -> Tensor:
    return clamped(c.live - c.old).exp()


def grpo(c):
    return sequence_mean(c, ppo(ratio(c), c.a, 0.2, 0.2))


def dr_grpo(c):
    return sequence_sum(c, ppo(ratio(c), c.a, 0.2, 0.2)) / HORIZON


def dcpo(c):
    q, r = c.old.exp(), (c.live - c.old).exp()
    low = 0.5 + 0.5 * (1 - 4 * 0.16 / q).clamp(min=0).sqrt()
    high = (0.5 + 0.5 * (1 + 4 * 0.2 / q).sqrt()).clamp(max=10)
    loss = torch.maximum(-c.a * r, -c.a * torch.minimum(torch.maximum(r, low), high))
    return sequence_mean(c, dual(loss, c.a, 10.0))


def bapo(c):
    return token_mean(c, dual(ppo(ratio(c), c.a, 0.4, 0.2), c.a, 3.0))


def aspo(c):
    r, a = ratio(c), c.a
    down = r.clamp(min=0.8)
    negative = torch.where(down > 3, -a * 3 * c.live, -a * down)
    up = r.clamp(max=1.2)
    positive = torch.where(1 / sg(up) > 3, -a * 3 * c.live, -a * (up / sg(up)) / sg(up))
    return token_mean(c, torch.where(a < 0, negative, positive))


def r2vpo(c):
    r = ratio(c)
    return token_mean(c, -c.a * r + 0.04 * (r - 1) ** 2)


def correction(c: Case) -> Tensor:
    return clamped(c.old - c.rollout).exp()


def decoupled_ppo(c):
    return token_mean(c, correction(c) * ppo(ratio(c), c.a, 0.2, 0.2))


def tis(c):
    return sequence_mean(c, correction(c).clamp(max=2) * ppo(ratio(c), c.a, 0.2, 0.2))


def mis(c):
    w = clamped(row_sum(c, c.old - c.rollout)).exp()
    w = torch.where(w > 3, 0.0, w)
    return sequence_mean(c, w * ppo(ratio(c), c.a, 0.2, 0.2))


def icepop(c):
    w = correction(c)
    w = torch.where((w < 0.5) | (w > 5), 0.0, w)
    return sequence_mean(c, w * ppo(ratio(c), c.a, 0.2, 0.2))


def hispo(c):
    d = c.old - c.rollout
    keep = (d <= math.log(2)) & (d >= -math.log(2))
    mean = row_mean(c, d)
    keep = keep & (mean <= -math.log(0.99)) & (mean >= -math.log(1.01))
    r = clamped(c.live - c.rollout).exp()
    loss = dual(ppo(r, c.a, 0.2, 0.2), c.a, 3.0)
    return (loss * c.mask * keep).sum() / (c.mask.shape[0] * HORIZON)


def alp(c):
    return sequence_mean(c, ppo(clamped(c.live - c.rollout).exp(), c.a, 0.5, 3.0))


def lightning_rl(c):
    delta = c.live - c.ref
    k3 = (-delta).exp() + delta - 1
    return sequence_mean(c, ppo(ratio(c), c.a, 0.2, 0.2) + 0.01 * k3 + likelihood(c, 0.1))


def srft(c):
    return token_mean(c, ppo(ratio(c), c.a, 0.2, 0.2) + likelihood(c, 0.5))


def aepo(c):
    return sequence_mean(c, ppo(ratio(c), c.a, 0.2, 0.2) + likelihood(c, 1 / 64))


def gspo(c, low=3e-4, high=4e-4):
    s = clamped(row_mean(c, c.live - c.old)).exp()
    return sequence_mean(c, ppo(s, c.a, low, high))


def luspo(c):
    s = clamped(row_mean(c, c.live - c.old)).exp()
    loss = ppo(s, c.advantages[:, None], 2e-3, 2.5e-3)
    n = c.mask.sum(1, keepdim=True)
    return (n * loss).sum() / max(int(c.mask.any(1).sum()), 1)


def gmpo(c):
    x, sign = c.live - c.old, c.a.sign()
    y = sign * torch.minimum(sign * x, sign * x.clamp(-0.4, 0.4))
    return sequence_mean(c, -c.advantages[:, None] * row_mean(c, y).exp())


def fspo(c):
    n = c.mask.sum(1, keepdim=True).double()
    s = clamped(row_sum(c, c.live - c.old))
    bound = 0.3 * n.sqrt()
    a = c.advantages[:, None]
    clipped = torch.minimum(torch.maximum(s, -bound), bound)
    return sequence_mean(c, -torch.minimum(s.exp() * a, clipped.exp() * a))


def minpro(c):
    x, w = c.live - c.old, torch.ones_like(c.live)
    for i in range(x.shape[0]):
        least = None
        for t in range(x.shape[1]):
            if not c.mask[i, t]:
                continue
            own = sg(x[i, t])
            w[i, t] = (own if least is None else least + own).clamp(-20, 20).exp()
            least = own if least is None else torch.minimum(least, own)
    return token_mean(c, weighted(c, w.clamp(max=5)))


def pnpo(c):
    x, w = c.live - c.old, torch.ones_like(c.live)
    for i in range(x.shape[0]):
        seen = []
        for t in range(x.shape[1]):
            if c.mask[i, t]:
                seen.append(sg(x[i, t]))
                w[i, t] = (sum(seen) / len(seen)).clamp(-20, 20).exp()
    return token_mean(c, weighted(c, w.clamp(max=5)))


def a_lol(c):
    w = clamped(row_sum(c, c.live - c.old)).exp().clamp(0.1, 1.9)
    return sequence_sum(c, weighted(c, w))


def reinforce(c):
    return token_mean(c, -c.a * c.live)


def is_reinforce(c):
    return sequence_sum(c, weighted(c, clamped(c.live - c.rollout).exp().clamp(max=2)))


def cispo(c):
    return token_mean(c, weighted(c, ratio(c).clamp(max=5)))


def minirl(c):
    r, a = ratio(c), c.a
    m = ~(((a > 0) & (r > 1.27)) | ((a < 0) & (r < 0.8)))
    w = clamped(c.live - c.rollout).exp().clamp(max=5)
    return sequence_sum(c, weighted(c, m * w))


def topr(c):
    w = torch.where(c.a > 0, 1.0, ratio(c).clamp(0, 1))
    return token_mean(c, weighted(c, w))


def dppo_tv(c):
    moved = c.live.exp() - c.old.exp()
    m = torch.where(c.a > 0, moved <= 0.2, moved >= -0.2)
    return token_mean(c, weighted(c, m * ratio(c).clamp(max=20)))


def dppo_kl(c):
    p, q = c.live.exp(), c.old.exp()
    kl = q * (c.old - c.live) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    m = torch.where(c.a > 0, (kl <= 0.2) | (p <= q), (kl <= 0.2) | (p >= q))
    return token_mean(c, weighted(c, m * ratio(c).clamp(max=20)))


def ipo(c):
    m = (c.live.exp() - c.rollout.exp()).abs() <= 0.1
    return token_mean(c, weighted(c, m * clamped(c.live - c.rollout).exp()))


def prime_rl(c):
    x = c.live - c.rollout
    moved = c.live.exp() - c.rollout.exp()
    m = torch.where(c.a > 0, moved <= 0.2, moved >= -0.2)
    return token_mean(c, weighted(c, m * x.exp()) + 1e-3 * x**2)


def vespo(c):
    z = row_sum(c, clamped(c.live - c.old)).clamp(math.log(1e-8), 20)
    positive = c.advantages[:, None] >= 0
    k, rate = torch.where(positive, 2.0, 3.0), torch.where(positive, 3.0, 2.0)
    return token_mean(c, weighted(c, (rate + k * z - rate * z.exp()).exp()))


def sapo(c):
    tau = torch.where(c.a > 0, torch.tensor(1.0).double(), torch.tensor(1.05, dtype=torch.float64))
    return sequence_mean(c, -c.a * 4 / tau * torch.sigmoid(tau * (ratio(c) - 1)))


def mhpo(c):
    psi = 1.5 * torch.tanh(clamped(c.live - c.old) / 1.5)
    zeta = softplus(sg(psi)) ** 1.5 + (softplus(-sg(psi)) / 0.8) ** 2
    return sequence_mean(c, -c.a * (psi - zeta).exp())


def dro(c):
    return token_mean(c, -(c.live * c.a - 0.5 * 0.3 * (c.live - c.old) ** 2))


def luffy(c):
    p = c.live.exp()
    return token_mean(c, -c.a * p / (p + 0.1))


def rl_plus(c):
    p, q = c.live.exp(), c.old.exp()
    omega = 0.5 * (q + 1)
    return token_mean(c, -(2 * p / (q + omega)) * c.a * sg(1 - p) ** 0.5)


def rover(c):
    return token_mean(c, ((c.live - c.old) - c.a) ** 2)


def delta_hinge(c):
    x = c.live - c.old
    up = (0.2 - x).relu() * c.a.abs()
    down = (x + 0.1).relu() * c.a.abs()
    return token_mean(c, torch.where(c.a > 0, up, torch.where(c.a < 0, down, 0.0)))


def top_entropy(c):
    if not c.mask.any():
        return grpo(c)
    threshold = torch.quantile(c.entropy[c.mask], 0.8)
    gate = (c.entropy >= threshold).double()
    return sequence_mean(c, gate * ppo(ratio(c), c.a, 0.2, 0.2))


def reason_maxxer(c):
    return token_mean(c, -c.a * c.live * (c.entropy >= 0.7))


def spine(c):
    return token_mean(c, ppo(ratio(c), c.a, 0.2, 0.2) * (c.entropy >= 0.7))


def covariance(c: Case) -> Tensor:
    live = sg(c.live)
    return (c.a - c.a[c.mask].mean()) * (live - live[c.mask].mean())


def kl_cov(c):
    x = c.live - c.old
    loss = -c.a * x.exp()
    count = int(c.mask.sum())
    if count:
        scores = torch.where(c.mask, covariance(c), -torch.inf).flatten()
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.topk(max(1, int(0.1 * count))).indices] = True
        loss = torch.where(chosen.view_as(loss), loss + x.abs(), loss)
    return token_mean(c, loss)


EAGER = {
    "ppo": lambda c: token_mean(c, ppo(ratio(c), c.a, 0.2, 0.2)),
    "grpo": grpo,
    "dapo": lambda c: token_mean(c, ppo(ratio(c), c.a, 0.2, 0.28)),
    "dr_grpo": dr_grpo,
    "lite_ppo": lambda c: token_mean(c, ppo(ratio(c), c.a, 0.2, 0.2)),
    "w_reinforce": lambda c: token_mean(c, ppo(ratio(c), c.a, 0.2, 0.2)),
    "dcpo": dcpo,
    "bapo": bapo,
    "aspo": aspo,
    "r2vpo": r2vpo,
    "decoupled_ppo": decoupled_ppo,
    "tis": tis,
    "mis": mis,
    "icepop": icepop,
    "hispo": hispo,
    "alp": alp,
    "lightning_rl": lightning_rl,
    "srft": srft,
    "visurf": grpo,
    "aepo": aepo,
    "gspo": gspo,
    "luspo": luspo,
    "gmpo": gmpo,
    "fspo": fspo,
    "minpro": minpro,
    "pnpo": pnpo,
    "a_lol": a_lol,
    "reinforce": reinforce,
    "gpg": reinforce,
    "is_reinforce": is_reinforce,
    "cispo": cispo,
    "minirl": minirl,
    "topr": topr,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "ipo": ipo,
    "prime_rl": prime_rl,
    "vespo": vespo,
    "sapo": sapo,
    "mhpo": mhpo,
    "dro": dro,
    "luffy": luffy,
    "rl_plus": rl_plus,
    "rover": rover,
    "delta_hinge": delta_hinge,
    "top_entropy": top_entropy,
    "reason_maxxer": reason_maxxer,
    "spine": spine,
    "kl_cov": kl_cov,
}
# tests of their own: cu_segments, and a random selection
ELSEWHERE = {"rank_grpo", "clip_cov"}
OPTIONS = {
    "dr_grpo": {"loss_scale_factor": HORIZON},
    "hispo": {"loss_scale_factor": HORIZON},
    "fspo": {"fspo_c": 0.3},
    "dro": {"dro_beta": 0.3},
    "delta_hinge": {"pos_margin": 0.2, "neg_margin": 0.1},
    "reason_maxxer": {"entropy_threshold": 0.7},
    "spine": {"entropy_threshold": 0.7},
    "kl_cov": {"kl_cov_ratio": 0.1},
}


def objective(name: str, **more) -> PolicyObjective:
    return PolicyObjective.preset(name, **OPTIONS.get(name, {}), **more)


def ours(c: Case, chosen: PolicyObjective, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    live = c.live.to(dtype).requires_grad_()
    out = rlkern.policy_loss(
        live,
        c.old.to(dtype),
        c.advantages.to(dtype),
        mask=c.mask,
        objective=chosen,
        ref_logprob=c.ref.to(dtype),
        rollout_logprob=c.rollout.to(dtype),
        entropy=c.entropy.to(dtype),
        nll_weight=c.marked.to(dtype),
    )
    return out.loss.detach(), torch.autograd.grad(out.loss, live)[0]


def eager(c: Case, name: str) -> tuple[Tensor, Tensor]:
    c = c.clean()
    c.live.requires_grad_()
    loss = EAGER[name](c) + 0 * c.live.sum()
    (grad,) = torch.autograd.grad(loss, c.live)
    return loss.detach(), torch.where(c.mask, grad, 0.0)


CASES = {
    "random": Case([7, 0, 12, 3, 1, 20]),
    "wide": Case([9, 4, 17], spread=1.5, seed=1),
    "near": Case([30, 11], spread=0.02, seed=2),
    "single tokens": Case([1, 1, 1, 1], seed=3),
    "empty": Case([0, 0], columns=3),
    "one empty": Case([0, 6, 4], seed=4),
}


def test_every_preset_has_a_formula():
    assert set(EAGER) | ELSEWHERE == set(presets.PRESETS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EAGER)
def test_equals_the_eager_formula(name, case):
    want, want_grad = eager(CASES[case], name)
    loss, grad = ours(CASES[case], objective(name))
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", EAGER)
def test_the_kernel_equals_the_eager_formula(name):
    """float32, C++."""
    case = CASES["random"]
    want, want_grad = eager(case, name)
    loss, grad = ours(case, objective(name), torch.float32)
    scale = want_grad.abs().max().item()
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("name", EAGER)
def test_masked_slots_advantages_of_zero_and_log_ratios_of_30(name):
    case = Case([6, 5, 8, 2], seed=5)
    case.advantages[2] = 0.0
    for row, shift in ((0, 30.0), (1, -30.0), (2, 30.0), (3, -30.0)):
        case.old[row, 1] = case.live[row, 1] - shift
        case.rollout[row, 0] = case.old[row, 0] - shift
    # probabilities above 1 mean nothing to those that read them
    if name in ("dppo_kl", "dcpo", "rl_plus", "ipo", "prime_rl", "dppo_tv"):
        case.old.clamp_(max=-1e-3), case.rollout.clamp_(max=-1e-3)
    want, want_grad = eager(case, name)
    for value in (case.live, case.old, case.rollout, case.ref, case.entropy):
        value[~case.mask] = float("nan")
    loss, grad = ours(case, objective(name))
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-12)
    assert (grad[~case.mask] == 0).all()
    regular = ("r2vpo", "dro", "rover", "prime_rl", "kl_cov", "lightning_rl", "srft", "aepo")
    if name not in regular:
        assert (grad[2] == 0).all(), "A = 0"
    if name in ("r2vpo", "dro", "rover"):
        return  # squares of the ratio lose the digits of everything else in float32
    single, single_grad = ours(case, objective(name), torch.float32)
    torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-5)
    scale = want_grad.abs().max().item()
    torch.testing.assert_close(single_grad.double(), want_grad, rtol=1e-4, atol=1e-5 * scale)


def test_rank_grpo():
    """The ratio of an item; an advantage for every token."""
    c = Case([9, 14], columns=14)
    live = c.live[c.mask].requires_grad_()
    old, n = c.old[c.mask], int(c.mask.sum())
    cu_segments = torch.tensor([0, 2, 5, 8, 8, 15, n])
    a = torch.randn(n, dtype=torch.float64)
    s = torch.cat(
        [
            (live[i:j] - old[i:j]).mean().exp().expand(j - i)
            for i, j in pairwise(cu_segments.tolist())
            if j > i
        ]
    )
    # an advantage per item, as ranks have
    for i, j in pairwise(cu_segments.tolist()):
        a[i:j] = a[i] if j > i else 0
    first = int(c.mask[0].sum())
    loss = ppo(s, a, 0.2, 0.2)
    want = (loss[:first].mean() + loss[first:].mean()) / 2
    out = rlkern.policy_loss(
        live,
        old,
        a,
        cu_seqlens=torch.tensor([0, first, n]),
        cu_segments=cu_segments,
        objective="rank_grpo",
    )
    torch.testing.assert_close(out.loss, want)
    got = torch.autograd.grad(out.loss, live)[0]
    wanted = torch.autograd.grad(want, live)[0]
    # an item that lies in both sequences has two weights: a token moves it by its own
    inside = torch.ones(n, dtype=torch.bool)
    inside[8:15] = False
    torch.testing.assert_close(got[inside], wanted[inside])


def test_clip_cov():
    """Every token but some of the candidates has PPO's loss; the others have none."""
    c = Case([60, 80, 75], spread=0.1, seed=7)
    options = {"clip_cov_lb": 0.2, "clip_cov_ub": 3.0, "clip_cov_ratio": 0.1}
    chosen = PolicyObjective.preset("clip_cov", **options)
    _, grad = ours(c, chosen)
    _, plain = ours(c, PolicyObjective.preset("ppo", log_ratio_clamp=None))
    cov = covariance(c)
    candidates = c.mask & (cov > 0.2) & (cov < 3.0) & (plain != 0)
    dropped = (plain != 0) & (grad == 0)
    assert int(dropped.sum()) == min(int(0.1 * int(c.mask.sum())), int(candidates.sum())) > 0
    assert (dropped <= candidates).all()
    torch.testing.assert_close(grad[~dropped], plain[~dropped])
    _, again = ours(c, chosen)
    assert not torch.equal(again == 0, grad == 0), "drawn at random"


# --- on-policy, and the tables of the specification ---------------------------------------------

# -gradient / A of a token up to its weight, where the policy has not moved
ON_POLICY = dict.fromkeys(EAGER, 1.0) | {"mhpo": math.exp(-(math.log(2) ** 1.5))}
ON_POLICY["mhpo"] *= math.exp(-((math.log(2) / 0.8) ** 2))


@pytest.mark.parametrize(
    "name",
    sorted(
        set(EAGER)
        - {"luffy", "rl_plus", "rover", "delta_hinge", "top_entropy", "reason_maxxer", "spine"}
    ),
)
def test_on_policy_the_gradient_is_minus_the_advantage(name):
    c = Case([5, 9], seed=8)
    c.old, c.rollout, c.ref = c.live.clone(), c.live.clone(), c.live.clone()
    c.marked.zero_()
    _, grad = ours(c, objective(name))
    n = c.mask.sum(1, keepdim=True)
    mode = objective(name).loss_agg_mode
    weight = {
        "token-mean": 1 / n.sum(),
        "seq-mean-token-mean": 1 / (2 * n),
        "seq-mean-token-sum": torch.tensor(0.5),
        "seq-mean-token-sum-norm": torch.tensor(0.5 / HORIZON),
    }[mode]
    # FSPO's ratio is a product: each of the n tokens moves the loss that all n carry
    factor = ON_POLICY[name] * (n if name == "fspo" else 1)
    torch.testing.assert_close(grad, torch.where(c.mask, -c.a * weight * factor, 0.0))


def test_mhpo_can_be_minus_the_advantage():
    c = Case([5, 9], seed=8)
    c.old = c.live.clone()
    _, grad = ours(c, objective("mhpo", mhpo_normalize=True))
    want = torch.where(c.mask, -c.a / (2 * c.mask.sum(1, keepdim=True)), 0.0)
    torch.testing.assert_close(grad, want)


RATIOS = (0.05, 0.5, 0.8, 1, 1.25, 2, 5, 20)
TABLES = {
    "mhpo": (
        1.0,
        (0.000208, 0.054418, 0.179021, 0.265062, 0.342756, 0.390651, 0.190816, 0.033300),
    ),
    "sapo": (1.0, (0.040222, 0.470007, 0.792053, 1, 1.230670, 1.572895, 0.353254, 4.5e-7)),
    "sapo, A < 0": (
        -1.0,
        (0.039368, 0.467070, 0.791244, 1, 1.228712, 1.536220, 0.291115, 1.7e-7),
    ),
}


# value / -A at the same ratios
VALUES = {
    "mhpo": (0.002925, 0.066889, 0.183012, 0.265062, 0.350397, 0.480178, 0.508850, 0.468757),
    "sapo": (1.115539, 1.510163, 1.800664, 2, 2.248706, 2.924234, 3.928055, 4),
}
WEIGHTS = (0.1, 0.5, 1, 2, 4)
VESPO = {
    1.0: (0.148797, 1.120422, 1, 0.199148, 0.001975),
    -1.0: (0.006050, 0.339785, 1, 1.082682, 0.158640),
}
OLD_PROBS = (0.9, 0.64, 0.5, 0.1, 0.01, 1e-4)
# the paper's epsilons, and those of its scripts
DCPO = {
    (0.16, 0.20): (
        (0.768742, 0.5, 0.5, 0.5, 0.5, 0.5),
        (1.187184, 1.25, 1.306226, 2, 5, 10),
    ),
    (0.20, 0.28): (
        (0.666667, 0.5, 0.5, 0.5, 0.5, 0.5),
        (1.249074, 1.329156, 1.4, 2.246425, 5.815073, 10),
    ),
}
every_kernel = pytest.mark.parametrize(
    "kernel", [k.name for k in implementations("policy_loss", "cpu")]
)


def kernel_run(kernel, chosen, live, old, a, cu_seqlens=None, mask=None, rollout=None):
    """Loss and gradient of one kernel, the sum over tokens in float32."""
    (found,) = [k for k in implementations("policy_loss", "cpu") if k.name == kernel]
    tensors = (live, old, a, cu_seqlens, mask, rollout, *(None,) * 4)
    out = found.forward(*tensors, list(chosen.kinds), list(chosen.numbers), True, False)
    return out[0], out[2]


@every_kernel
@pytest.mark.parametrize("name", TABLES)
def test_gradient_tables(name, kernel):
    a, want = TABLES[name]
    chosen = objective(name.split(",")[0], loss_agg_mode="token-sum")
    x = torch.tensor(RATIOS).log()
    old = torch.full_like(x, -8.0)
    _, grad = kernel_run(kernel, chosen, x - 8, old, torch.full_like(x, a))
    torch.testing.assert_close(-grad * a, torch.tensor(want), rtol=0, atol=2e-6)


@every_kernel
@pytest.mark.parametrize("bound", [0.4, 1.5, 2.0, 2.01, 7.0])
def test_mhpo_of_any_bound(kernel, bound):
    """The hazard's softplus has one formula up to c = 2 and another above."""
    x = torch.linspace(-20.5, 20.5, 656)[None]
    chosen = objective("mhpo", mhpo_c=bound)
    live, old, one = x - 30, torch.full_like(x, -30.0), torch.ones(1)
    loss, grad = kernel_run(kernel, chosen, live, old, one)
    want = kernel_run("reference", chosen, live.double(), old.double(), one.double())
    torch.testing.assert_close(loss.double(), want[0].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), want[1].double(), rtol=1e-4, atol=1e-9)


@every_kernel
@pytest.mark.parametrize("name", VALUES)
def test_value_tables(name, kernel):
    chosen = objective(name, loss_agg_mode="token-sum")
    x, one = torch.tensor(RATIOS).log(), torch.ones(1)
    values = [-kernel_run(kernel, chosen, y[None] - 8, -8 * one, one)[0] for y in x]
    torch.testing.assert_close(torch.stack(values), torch.tensor(VALUES[name]), rtol=0, atol=3e-6)


@every_kernel
@pytest.mark.parametrize("a", VESPO)
def test_vespo_table(a, kernel):
    """One token a sequence: the product is its own ratio."""
    chosen = objective("vespo", loss_agg_mode="token-sum")
    x = torch.tensor(WEIGHTS).log()
    tensors = (x - 8, torch.full_like(x, -8.0), torch.full_like(x, a), torch.arange(len(x) + 1))
    _, grad = kernel_run(kernel, chosen, *tensors)
    torch.testing.assert_close(-grad * a, torch.tensor(VESPO[a]), rtol=0, atol=2e-6)


@every_kernel
def test_vespo_clamps_the_terms_and_the_sum(kernel):
    chosen = objective("vespo", loss_agg_mode="token-sum")
    x = torch.tensor([30.0, -19.5])
    old = torch.full((2,), -40.0)
    _, grad = kernel_run(kernel, chosen, old + x, old, torch.ones(1), torch.tensor([0, 2]))
    phi = math.exp(3 + 2 * 0.5 - 3 * math.exp(0.5))
    torch.testing.assert_close(grad, torch.full((2,), -phi))


@every_kernel
@pytest.mark.parametrize("epsilons", DCPO)
def test_dcpo_table(epsilons, kernel):
    """Far past a bound the loss is that of the bound; q = 0 has the widest."""
    low, high = DCPO[epsilons]
    chosen = objective(
        "dcpo", epsilon_low=epsilons[0], epsilon_high=epsilons[1], loss_agg_mode="token-sum"
    )
    old = torch.tensor([*map(math.log, OLD_PROBS), -200.0])
    for a, shift, want in ((1.0, 5.0, (*high, 10)), (-1.0, -5.0, (*low, 0.5))):
        for q, bound in zip(old, want):
            q = q[None]
            loss, grad = kernel_run(kernel, chosen, q + shift, q, torch.full((1,), a))
            # at q = 4 epsilon_low the root of a rounding: 1e-8 is 1e-4
            assert -a * loss.item() == pytest.approx(bound, abs=1e-4 if a < 0 else 2e-6)
            assert grad == 0
            _, grad = kernel_run(kernel, chosen, q + 0.01, q, torch.full((1,), a))
            assert -a * grad.item() == pytest.approx(math.exp(0.01), abs=2e-5)


# --- edges of the definition, and what others have got wrong ------------------------------------


@every_kernel
@pytest.mark.parametrize("sign", [1, -1])
def test_at_the_clamp_of_the_log_ratio_the_gradient_is_kept(sign, kernel):
    """Strictly beyond it is 0, as with torch's clamp."""
    chosen = PolicyObjective(
        epsilon_low=None, epsilon_high=None, log_ratio_clamp=1.0, loss_agg_mode="token-sum"
    )
    x = sign * torch.tensor([1.0, 1.0 + 2.0**-20, 0.5])
    old = torch.full_like(x, -4.0)
    _, grad = kernel_run(kernel, chosen, old + x, old, torch.ones(3))
    want = torch.tensor([-math.exp(sign), 0.0, -math.exp(sign / 2)])
    torch.testing.assert_close(grad, want)


@every_kernel
def test_dppo_kl_at_a_probability_of_one(kernel):
    """log((1 - q + 1e-8) / (1 - p + 1e-8)) is finite; masked by the direction of A."""
    chosen = PolicyObjective.preset("dppo_kl", loss_agg_mode="token-sum")
    live = torch.zeros(3)
    old = torch.tensor([math.log(0.5), math.log(0.5), 0.0])
    _, grad = kernel_run(kernel, chosen, live, old, torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(grad, torch.tensor([0.0, 2.0, -1.0]))


@every_kernel
def test_a_weight_that_overflows(kernel):
    """Masked it is 0, not inf times 0; truncated it is the bound."""
    old = torch.tensor([-1.0, -1.0])
    rollout = old - torch.tensor([200.0, 0.1])
    for name, want in (("icepop", 0.0), ("tis", 2.0)):
        chosen = objective(name, log_ratio_clamp=None, loss_agg_mode="token-sum")
        loss, grad = kernel_run(
            kernel, chosen, old, old, torch.ones(2), torch.tensor([0, 2]), rollout=rollout
        )
        want = torch.tensor([-want, -math.exp(0.1)])
        torch.testing.assert_close(grad, want)
        torch.testing.assert_close(loss, want.sum())


def test_padding_is_no_part_of_luspo_with_token_weights():
    """TRL takes a mean over the padded matrix there."""
    case = Case([6, 0, 9], seed=9)
    chosen = PolicyObjective.preset("luspo", rollout_is="token", rollout_is_threshold=1.1)
    c = case.clean()
    s = clamped(row_mean(c, c.live - c.old)).exp()
    each = correction(c).clamp(max=1.1) * ppo(s, c.advantages[:, None], 2e-3, 2.5e-3)
    want = (each * c.mask).sum() / 2
    for columns in (9, 30):
        wide = object.__new__(Case)
        wide.advantages, wide.marked = case.advantages, case.marked
        grow = columns - case.live.shape[1]
        wide.mask = torch.nn.functional.pad(case.mask, (0, grow))
        for name in ("live", "old", "rollout", "ref", "entropy"):
            kept = torch.where(case.mask, getattr(case, name), torch.nan)
            setattr(wide, name, torch.nn.functional.pad(kept, (0, grow), value=math.inf))
        torch.testing.assert_close(ours(wide, chosen)[0], want)


def test_masked_weights_leave_vespos_product_alone():
    """In TRL a weight of 0 enters the product of its sequence, whose phi is then nearly 0."""
    case = Case([7, 5, 12], spread=0.1, seed=4)
    case.rollout[:, 1] = case.old[:, 1] - 2
    chosen = PolicyObjective.preset(
        "vespo", rollout_is="token", rollout_is_mode="mask", rollout_is_threshold=2.0
    )
    c = case.clean()
    c.live.requires_grad_()
    w = correction(c)
    w = torch.where(w > 2, 0.0, w)
    z = row_sum(c, c.live - c.old)
    k, rate = torch.where(c.a >= 0, 2.0, 3.0), torch.where(c.a >= 0, 3.0, 2.0)
    want = token_mean(c, w * weighted(c, (rate + k * z - rate * z.exp()).exp()))
    loss, grad = ours(case, chosen)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, c.live)[0])
    assert (grad[:, 1] == 0).all()
    assert (grad[:, 0] != 0).all()


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("name", ["ppo", "grpo", "sapo", "cispo"])
def test_weights_over_their_mean(name, level, mode):
    """rollout_is_batch_normalize; the mean counts the tokens that rollout_rs rejects."""
    case = Case([7, 0, 12, 3, 1, 20], seed=6)
    case.rollout += 0.05
    case.live[~case.mask] = case.old[~case.mask] = case.rollout[~case.mask] = float("nan")
    options = {"rollout_is": level, "rollout_is_mode": mode, "rollout_is_threshold": 1.2}
    options |= {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.8_1.4"}
    c = case.clean()
    d = c.old - c.rollout
    if level != "token":
        d = (row_sum if level == "sequence" else row_mean)(c, d)
    w = clamped(d).exp()
    w = w.clamp(max=1.2) if mode == "truncate" else torch.where(w > 1.2, 0.0, w)
    counts = c.mask if level == "token" else c.mask.any(1, keepdim=True)
    mean = w[counts].mean()
    assert abs(mean - 1) > 0.01
    plain, plain_grad = ours(case, PolicyObjective.preset(name, **options))
    loss, grad = ours(
        case, PolicyObjective.preset(name, **options, rollout_is_batch_normalize=True)
    )
    torch.testing.assert_close(loss, plain / mean)
    torch.testing.assert_close(grad, plain_grad / mean)
    single = ours(
        case,
        PolicyObjective.preset(name, **options, rollout_is_batch_normalize=True),
        torch.float32,
    )
    torch.testing.assert_close(single[1].double(), grad, rtol=1e-4, atol=1e-6)


def test_spines_band_is_of_the_selected_tokens():
    """Entropies below the threshold are far below the band, and have no gradient from it."""
    case = Case([9, 0, 14], seed=10)
    options = {"entropy_threshold": 0.7, "entropy_low": 0.9, "entropy_high": 1.6}
    options |= {"entropy_low_coef": 0.3, "entropy_high_coef": 0.2, "entropy_coef": 0.01}
    chosen = PolicyObjective.preset("spine", **options)
    c = case.clean()
    h = c.entropy.clone().requires_grad_()
    band = 0.3 * (0.9 - h).relu() + 0.2 * (h - 1.6).relu()
    fork = h.detach() >= 0.7
    assert (~fork & c.mask).any()
    want = token_mean(c, fork * (ppo(ratio(c), c.a, 0.2, 0.2) + band) - 0.01 * h)
    (want_grad,) = torch.autograd.grad(want, h)
    for dtype in (torch.float64, torch.float32):
        tensors = [x.to(dtype) for x in (case.live, case.old, case.advantages)]
        entropy = case.entropy.to(dtype).requires_grad_()
        out = rlkern.policy_loss(*tensors, mask=case.mask, objective=chosen, entropy=entropy)
        (grad,) = torch.autograd.grad(out.loss, entropy)
        torch.testing.assert_close(out.loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-7)


def test_likelihood_of_marked_tokens():
    """By sequence or token, bool or not; divided by its mean it is a mean over those marked."""
    case = Case([7, 0, 12, 3, 1, 20], seed=11)
    marked = torch.tensor([True, True, False, False, True, False])
    spread = (marked[:, None] & case.mask).to(torch.float64)
    share = spread.sum() / case.mask.sum()
    chosen = PolicyObjective.preset("dapo", nll_coef=0.1)

    def run(objective, weight, **more):
        live = case.live.clone().requires_grad_()
        out = rlkern.policy_loss(
            live,
            case.old,
            case.advantages,
            mask=case.mask,
            objective=objective,
            nll_weight=weight,
            **more,
        )
        return out.loss.detach(), torch.autograd.grad(out.loss, live)[0]

    plain, plain_grad = run("dapo", None)
    apart, apart_grad = run(chosen, spread / share)
    nll = -case.live[spread.bool()].mean()
    torch.testing.assert_close(apart, plain + 0.1 * nll)
    torch.testing.assert_close(apart_grad, plain_grad - 0.1 * spread / spread.sum())
    want = run(chosen, spread)
    for weight in (marked, marked.double(), spread.bool()):
        got = run(chosen, weight)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])
    # rejected tokens have none
    rejecting = PolicyObjective.preset(
        "dapo", nll_coef=0.1, rollout_rs="token_k1", rollout_rs_threshold="0.9_1.1"
    )
    _, grad = run(rejecting, torch.ones(6), rollout_logprob=case.rollout)
    rejected = (case.rollout - case.old).exp().sub(1).abs() > 0.12
    assert (grad[rejected & case.mask] == 0).all()
    assert (rejected & case.mask).any()


@every_kernel
@pytest.mark.parametrize(
    ("level", "mask", "want"),
    [
        ("prefix_min", [1, 1, 1, 1, 1, 1], (1.1, 0.99, 1.17, 0.8, 0.8, 1.0)),
        ("prefix_min", [1, 1, 0, 1, 1, 1], (1.1, 0.99, 0.0, 0.8, 0.8, 1.0)),
        # without the first two the third is the first
        ("prefix_min", [0, 0, 1, 1, 1, 1], (0.0, 0.0, 1.28, 0.8, 0.8, 1.0)),
        # "cap at one": before the second token 1, not 1.1
        ("prefix_min_capped", [1, 1, 1, 1, 1, 1], (1.1, 0.90, 1.17, 0.8, 0.8, 1.0)),
        ("prefix_min_capped", [1, 0, 1, 1, 1, 1], (1.1, 0.0, 1.28, 0.8, 0.8, 1.0)),
    ],
)
def test_minpro_table(kernel, level, mask, want):
    """The product of the least ratio before a token and its own, clipped to [0.8, 1.28]."""
    rho = torch.tensor([1.10, 0.90, 1.30, 0.50, 1.05, 2.0])
    chosen = PolicyObjective.preset(
        "minpro",
        epsilon_low=0.2,
        epsilon_high=0.28,
        cispo_max_ratio=None,
        loss_agg_mode="token-sum",
        importance_sampling_level=level,
    )
    live, old = rho.log()[None] - 3, torch.full((1, 6), -3.0)
    keep = torch.tensor([mask]).bool()
    live = torch.where(keep, live, torch.nan)
    _, grad = kernel_run(kernel, chosen, live, old, torch.ones(1), mask=keep)
    torch.testing.assert_close(-grad[0], torch.tensor(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", ["prefix_min", "prefix_min_capped"])
@pytest.mark.parametrize("drift", [0.0, -0.001])
def test_minpro_over_128k_tokens(level, drift):
    """The scan crosses chunks and threads; a new sequence begins anew."""
    generator = torch.Generator().manual_seed(0)
    lengths = [131072, 5, 4096, 40000]
    n = sum(lengths)
    live = -torch.rand(n, generator=generator)
    # each sequence begins above a ratio of 1; with a drift its minimum keeps falling
    x = 0.3 * torch.randn(n, generator=generator) + drift * (torch.arange(n) % 4096)
    x[torch.tensor([0, *lengths]).cumsum(0)[:-1]] = 0.5
    old = live - x
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    threads = torch.get_num_threads()
    grads = []
    for count in (1, 3):
        torch.set_num_threads(count)
        leaf = live.clone().requires_grad_()
        out = rlkern.policy_loss(
            leaf,
            old,
            torch.ones(4),
            cu_seqlens=cu_seqlens,
            objective=PolicyObjective.preset(
                "minpro", loss_agg_mode="token-sum", importance_sampling_level=level
            ),
        )
        grads.append(torch.autograd.grad(out.loss, leaf)[0])
    torch.set_num_threads(threads)
    assert torch.equal(*grads)
    for i, j in pairwise(cu_seqlens.tolist()):
        own = (live - old)[i:j]
        least = own.cummin(0).values
        if level == "prefix_min_capped":
            least = least.clamp(max=0)
        want = torch.cat([own[:1], own[1:] + least[:-1]]).clamp(-20, 20).exp().clamp(max=5)
        torch.testing.assert_close(-grads[0][i:j], want, rtol=1e-5, atol=1e-7)


# --- names --------------------------------------------------------------------------------------


def test_names_of_verl_and_trl():
    preset = PolicyObjective.preset
    assert preset("vanilla", clip_ratio=0.1) == preset("ppo", epsilon_low=0.1, epsilon_high=0.1)
    assert preset("grpo", epsilon=0.1, epsilon_high=0.3) == preset(
        "grpo", epsilon_low=0.1, epsilon_high=0.3
    )
    assert preset("geo_mean") == preset("gmpo")
    assert preset("bnpo", kl_loss_coef=0.1, kl_loss_type="low_var_kl") == preset("ppo", kl_coef=0.1)
    assert preset("dr_grpo", max_completion_length=9).loss_scale_factor == 9
    assert preset("sapo", sapo_temperature_pos=2.0).numbers[:2] == (2.0, 1.05)
    assert preset("ppo", importance_sampling_level="geometric").importance_sampling_level == (
        "sequence"
    )
    trl = preset(
        "grpo",
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_max=3.0,
    )
    assert trl == preset("mis")
    verl = preset("grpo", rollout_is="token", rollout_is_threshold="0.5_5.0")
    assert verl == preset("icepop")
    with pytest.raises(ValueError, match="two names of one number"):
        preset("ppo", clip_ratio=0.1, epsilon_low=0.2)


def test_the_table_has_every_preset():
    text = (Path(__file__).parents[2] / "docs/objectives.md").read_text()
    missing = [n for n in (*presets.PRESETS, *presets.NAMES) if f"`{n}`" not in text]
    assert not missing


METHODS = """
GRPO, DAPO, Dr.GRPO, Lite PPO, MinPRO, MHPO, GSPO, GSPO-token, GMPO, LUSPO, Rank-GRPO, CISPO, SAPO,
DPPO, VESPO, TOPR, ASPO, FSPO, DRO, DCPO, BAPO, R²VPO, AReaL, MiniRL, IcePop, HisPO, TIS, MIS, ALP,
REAL, PACS, NSR, PSR, W-REINFORCE, ROVER, A-LoL, RL-PLUS, SRFT, ViSurf, AMPO, Guide, GHPO, SEELE,
LaSeR, LightningRL, AEPO, SPINE, ReasonMaxxer, CURE, SDPO, RLTF-SD, KEPO, HybridFlow, VL-DAC, ArCHer
"""


def test_every_method_is_somewhere():
    """The rows name presets and functions that there are."""
    text = (Path(__file__).parents[2] / "docs/objectives.md").read_text()
    table = text.split("## Where a method is")[1]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    named = " ".join(method for method, _ in rows)
    for method in METHODS.replace("\n", " ").split(","):
        assert re.search(rf"(?<![\w-]){re.escape(method.strip())}(?![\w-])", named), method
    fields = {f.name for f in dataclasses.fields(PolicyObjective)}
    metrics = {"ratio_variance", "logprob", "old_logprob"}
    known = {*presets.PRESETS, *presets.NAMES, *rlkern.__all__, *fields, *metrics}
    for _, here in rows:
        names = [re.match(r"\w+", code).group() for code in re.findall(r"`([^`]+)`", here)]
        assert set(names) <= known, here
        assert names or "not a loss" in here


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_explains_itself(name):
    text = PolicyObjective.explain(name)
    assert text.endswith((".", ".)"))
    required = presets.PRESETS[name].required
    assert all(option in text for option in required)
    if required:
        with pytest.raises(ValueError, match=required[0]):
            PolicyObjective.preset(name)
