"""rlkern: fused kernels for RL post-training of language models."""

from rlkern.ops._logprob import LogprobOutput
from rlkern.ops.logprob_from_logits import logprob_from_logits

__version__ = "0.1.0"

__all__ = [
    "LogprobOutput",
    "logprob_from_logits",
]
