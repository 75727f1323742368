"""linear_distill_loss against TRL's, Liger's and verl's distillation losses."""

import types

import pytest
import torch
from peers.compare import distance, relative
from torch import Tensor

import rlkern

TOKENS, HIDDEN, THEIRS, VOCAB, TOPK = 90, 48, 32, 3001, 20
TEMPERATURE = 0.8
SHAPE = f"float32, T={TOKENS}, H={HIDDEN}, V={VOCAB}"
# Float32 sums of thousands of terms, in another order. Of gradients, over the largest element:
# logits of 20 carry errors of 1e-6, and so do the probabilities of both.
BUDGET, GRADIENT_BUDGET = 2e-5, 6e-5
# names of the divergence, and what peers call beta or alpha
KINDS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}


class Models:
    def __init__(self):
        self.student = (torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN) * 3 / HIDDEN**0.5)
        self.bias = torch.randn(VOCAB)
        self.teacher = (torch.randn(TOKENS, THEIRS), torch.randn(VOCAB, THEIRS) * 3 / THEIRS**0.5)
        self.teacher_bias = torch.randn(VOCAB)
        self.upstream = torch.randn(TOKENS)

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (*self.student, self.bias)]

    def log_probs(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (hidden @ weight.T + bias).log_softmax(-1)


def compare(parity, peer: str, case: str, how: str, ours, theirs, models):
    """ours and theirs: from leaves to a divergence per token, or to their mean."""
    a, b = models.leaves(), models.leaves()
    got, want = ours(*a), theirs(*b)
    upstream = models.upstream if want.ndim else torch.ones(())
    pairs = zip(torch.autograd.grad(got, a, upstream), torch.autograd.grad(want, b, upstream))
    parity(
        "distillation",
        peer,
        case,
        rlkern=f"linear_distill_loss({how})",
        value=distance(got, want),
        gradient=max(relative(x, y) for x, y in pairs),
        budget=BUDGET,
        gradient_budget=GRADIENT_BUDGET,
    )


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("caps", [(None, None), (8.0, 5.0)])
def test_trl_chunked_divergence(divergence, caps, parity):
    kernels = pytest.importorskip("trl.kernels.chunked_divergence")
    models, beta = Models(), KINDS[divergence]
    scales = (1.25, 0.5)

    def theirs(hidden, weight, bias):
        student = (hidden, weight, bias, *models.teacher, models.teacher_bias)
        rest = (beta, TEMPERATURE, scales[0], caps[0], scales[1], caps[1])
        return kernels.ChunkedDivergenceFunction.apply(*student, *rest)[0]

    def ours(hidden, weight, bias):
        return rlkern.linear_distill_loss(
            hidden,
            weight,
            *models.teacher,
            divergence=divergence,
            beta=beta or 0.5,
            bias=bias,
            teacher_bias=models.teacher_bias,
            temperature=TEMPERATURE,
            logit_scale=scales[0],
            teacher_logit_scale=scales[1],
            softcap=caps[0],
            teacher_softcap=caps[1],
        ).divergence

    case = f"{SHAPE}, beta {beta}, soft caps {caps}"
    compare(parity, "TRL ChunkedDivergenceFunction", case, divergence, ours, theirs, models)


@pytest.mark.parametrize("divergence", KINDS)
def test_liger_fused_jsd(divergence, parity):
    loss = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    models, beta = Models(), KINDS[divergence]
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[::5] = -100

    def theirs(hidden, weight, bias):
        how = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False}
        fused = loss(beta=beta, temperature=TEMPERATURE, **how)
        return fused(hidden, weight, *models.teacher, labels, bias, models.teacher_bias)

    def ours(hidden, weight, bias):
        out = rlkern.linear_distill_loss(
            hidden,
            weight,
            *models.teacher,
            divergence=divergence,
            beta=beta or 0.5,
            bias=bias,
            teacher_bias=models.teacher_bias,
            temperature=TEMPERATURE,
        )
        return out.divergence[labels != -100].mean()

    case = f"{SHAPE}, beta {beta}, mean of the tokens that count"
    compare(parity, "LigerFusedLinearJSDLoss", case, divergence, ours, theirs, models)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_trl_sdpo_top_k(divergence, tail, parity):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    models, beta = Models(), KINDS[divergence]
    log_t = models.log_probs(*models.teacher, models.teacher_bias)

    def theirs(hidden, weight, bias):
        return losses.compute_topk_self_distillation_loss(
            hidden @ weight.T + bias,
            log_t,
            distillation_topk=TOPK,
            distillation_alpha=beta,
            distillation_add_tail=tail == "bucket",
        )

    def ours(hidden, weight, bias):
        # SDPO's tokens are the student's top ones
        with torch.no_grad():
            ids = models.log_probs(hidden, weight, bias).topk(TOPK).indices
        return rlkern.linear_distill_loss(
            hidden,
            weight,
            divergence=divergence,
            beta=beta or 0.5,
            teacher_topk_ids=ids,
            teacher_topk_logprobs=log_t.gather(1, ids),
            tail=tail,
            bias=bias,
        ).divergence

    case = f"{SHAPE}, K={TOPK}, alpha {beta}, add_tail {tail == 'bucket'}"
    how = f'{divergence}, tail="{tail}"'
    compare(parity, "TRL SDPO top-k", case, how, ours, theirs, models)


def test_verl_forward_kl_top_k(parity):
    losses = pytest.importorskip("verl.trainer.distillation.fsdp.losses")
    models = Models()
    log_t, ids = models.log_probs(*models.teacher, models.teacher_bias).topk(TOPK)
    options = types.SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False)

    def theirs(hidden, weight, bias):
        out = losses.compute_forward_kl_topk(
            (hidden @ weight.T + bias)[None],
            torch.nested.nested_tensor([log_t], layout=torch.jagged),
            torch.nested.nested_tensor([ids], layout=torch.jagged),
            types.SimpleNamespace(distillation_loss=options),
            "thd",
        )
        return out["distillation_losses"][0]

    def ours(hidden, weight, bias):
        return rlkern.linear_distill_loss(
            hidden,
            weight,
            divergence="forward_kl",
            teacher_topk_ids=ids,
            teacher_topk_logprobs=log_t,
            tail="drop",
            bias=bias,
        ).divergence

    how = 'forward_kl, tail="drop"'
    compare(parity, "verl forward_kl_topk", f"{SHAPE}, K={TOPK}", how, ours, theirs, models)
