"""Liger's fused GRPO loss: hidden states in, against linear_logprob and policy_loss together."""

import pytest
import torch
from peers.compare import HORIZON, Batch, describe, distance, relative

pytest.importorskip("liger_kernel")
pytest.importorskip("triton")

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

import rlkern
from rlkern import PolicyObjective

HIDDEN, VOCAB, TEMPERATURE = 48, 501, 0.9
# log-probs of two kernels differ by 1e-6, and the ratio multiplies that
BUDGET = 1e-5

ALWAYS = {"log_ratio_clamp": None, "kl_input_clamp_value": None}
PER_SEQUENCE = {"loss_agg_mode": "seq-mean-token-mean", "count_empty": True}
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}
NORMED = {
    "loss_agg_mode": "seq-mean-token-sum-norm",
    "loss_scale_factor": HORIZON,
    "count_empty": True,
}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03}
# name -> Liger's options, ours
LOSSES = {
    "grpo": ({"loss_type": "grpo", **CLIP}, PER_SEQUENCE | CLIP),
    "bnpo": ({"loss_type": "bnpo", **CLIP}, CLIP),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "max_completion_length": HORIZON, **CLIP},
        NORMED | CLIP,
    ),
    "dapo": ({"loss_type": "dapo", **CLIP}, CLIP),
    # as in TRL, its epsilon_high is a ratio
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {
            "surrogate": "detached",
            "epsilon_low": None,
            "epsilon_high": None,
            "cispo_max_ratio": 1.3,
        },
    ),
    "gspo": ({"loss_type": "grpo", **SEQUENCE}, PER_SEQUENCE | SEQUENCE),
    "grpo, delta": (
        {"loss_type": "grpo", "delta": 1.5, **CLIP},
        PER_SEQUENCE | CLIP | {"delta": 1.5},
    ),
    "dapo, beta": ({"loss_type": "dapo", "beta": 0.04, **CLIP}, CLIP | {"kl_coef": 0.04}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_states_to_loss(name, parity):
    options, mine = LOSSES[name]
    batch = Batch((17, 5, 0, 24, 11, 8))
    rows, columns = batch.mask.shape
    hidden = torch.randn(rows, columns, HIDDEN)
    weight = torch.randn(VOCAB, HIDDEN) * 2 / HIDDEN**0.5
    targets = torch.randint(VOCAB, (rows, columns))

    def leaves():
        return [x.clone().requires_grad_() for x in (hidden, weight)]

    h, w = leaves()
    logprob = rlkern.linear_logprob(
        h.flatten(0, 1), w, targets.flatten(), temperature=TEMPERATURE
    ).logprob.view(rows, columns)
    # old and reference policies a little off the one at hand
    old = logprob.detach() + batch.old - batch.logprob
    ref = logprob.detach() + batch.ref - batch.logprob
    ours = PolicyObjective(**(ALWAYS | mine))
    loss = rlkern.policy_loss(
        logprob, old, batch.advantages, mask=batch.mask, objective=ours, ref_logprob=ref
    ).loss
    grads = torch.autograd.grad(loss, (h, w))

    h, w = leaves()
    fused = LigerFusedLinearGRPOLoss(
        compiled=False,
        # without it its reference is the policy itself, and beta has no effect
        use_ref_model="beta" in options,
        temperature=TEMPERATURE,
        **({"beta": 0.0} | options),
    )
    want, _ = fused(
        h,
        w,
        targets,
        batch.mask.float(),
        batch.advantages,
        ref_per_token_logps=ref,
        old_per_token_logps=old,
    )
    parity(
        "policy loss",
        f"Liger fused {name}",
        f"float32, hidden states in, temperature {TEMPERATURE}",
        rlkern="linear_logprob, " + describe(ours),
        value=distance(loss, want),
        gradient=max(relative(a, b) for a, b in zip(grads, torch.autograd.grad(want, (h, w)))),
        budget=BUDGET,
    )
