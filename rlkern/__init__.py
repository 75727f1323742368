"""rlkern: fused kernels for RL post-training of language models."""

from rlkern.ops._logprob import LogprobOutput
from rlkern.ops.group_advantage import group_advantage
from rlkern.ops.linear_distill_loss import LinearDistillLossOutput, linear_distill_loss
from rlkern.ops.linear_logprob import linear_logprob
from rlkern.ops.linear_policy_loss import LinearPolicyLossOutput, linear_policy_loss
from rlkern.ops.logprob_from_logits import logprob_from_logits
from rlkern.ops.policy_loss import PolicyLossOutput, PolicyObjective, policy_loss
from rlkern.ops.segment_reduce import segment_reduce
from rlkern.ops.sparse_linear_logprob import sparse_linear_logprob

__version__ = "0.1.0"

__all__ = [
    "LinearDistillLossOutput",
    "LinearPolicyLossOutput",
    "LogprobOutput",
    "PolicyLossOutput",
    "PolicyObjective",
    "group_advantage",
    "linear_distill_loss",
    "linear_logprob",
    "linear_policy_loss",
    "logprob_from_logits",
    "policy_loss",
    "segment_reduce",
    "sparse_linear_logprob",
]
