"""linear_logprob behind the hook of TRL's fused LM head."""

import rlkern

# TRL's names of what is not None
OURS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_sq_prob",
    "is_top1": "is_top1",
}


class LinearLogprobHead:
    """In place of trl.kernels.ChunkedLogProbFunction: hidden states to statistics of their tokens.

    A target that ties with a token before it is a top one here, and is not for TRL.
    """

    calls = 0

    @classmethod
    def apply(
        cls,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        cls.calls += 1
        if "mean_logits" in outputs:
            raise NotImplementedError("mean_logits")
        out = rlkern.linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=[ours for trls, ours in OURS.items() if trls in ("log_probs", *outputs)],
        )
        sum_sq = out.sum_sq_prob
        return out.logprob, out.entropy, None if sum_sq is None else sum_sq.log(), None, out.is_top1
