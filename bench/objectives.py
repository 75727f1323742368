"""The gradient of every preset against the ratio, drawn from the op: docs/images/objectives.svg.

    python -m bench.objectives

One token a sequence, so that every ratio level is the token's own ratio; old_logprob = log 0.3,
which objectives of the probability see; the rollout's log-prob is the old one.
"""

import math
import sys

import torch
from torch import Tensor

import rlkern
from bench.harness import ROOT
from rlkern.ops.policy_loss import presets

IMAGE = ROOT / "docs/images/objectives.svg"
OLD_PROB = 0.3
COLUMNS = 7
# options without a default, and others that a lone token needs
OPTIONS = {
    "loss_scale_factor": 1.0,
    "fspo_c": 0.3,
    "dro_beta": 0.5,
    "pos_margin": 0.5,
    "neg_margin": 0.5,
    "entropy_threshold": 0.0,
}


def coefficients(name: str, ratios: Tensor, advantage: float) -> Tensor:
    """-d loss / d logprob of a token with that ratio: what its log-prob is pushed by."""
    chosen = {option: OPTIONS[option] for option in presets.PRESETS[name].required}
    objective = rlkern.PolicyObjective.preset(name, **chosen)
    old = torch.full_like(ratios, math.log(OLD_PROB))
    live = (old + ratios.log()).requires_grad_()
    each = torch.arange(len(ratios) + 1)
    loss = rlkern.policy_loss(
        live,
        old,
        torch.full_like(ratios, advantage),
        cu_seqlens=each,
        objective=objective,
        rollout_logprob=old,
        entropy=torch.zeros_like(ratios),
        cu_segments=each if objective.importance_sampling_level == "segment" else None,
        # the sum over tokens
        normalizer=1.0,
    ).loss
    return -torch.autograd.grad(loss, live)[0]


def draw() -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "rlkern"
    names = list(presets.PRESETS)
    rows = -(-len(names) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(2.1 * COLUMNS, 1.7 * rows), sharex=True)
    ratios = torch.linspace(0.02, 3.2, 800, dtype=torch.float64)
    for axis, name in zip(axes.flat, names):
        for advantage, colour in ((1.0, "tab:blue"), (-1.0, "tab:red")):
            axis.plot(ratios, coefficients(name, ratios, advantage), color=colour, lw=1.2)
        axis.axvline(1, color="0.7", lw=0.6)
        axis.axhline(0, color="0.7", lw=0.6)
        axis.set_title(name, fontsize=8, pad=2)
        axis.tick_params(labelsize=6, length=2)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.supxlabel("ratio", fontsize=9)
    figure.supylabel("push on logprob: blue A = 1, red A = -1", fontsize=9)
    figure.tight_layout()
    figure.savefig(IMAGE, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(draw())
