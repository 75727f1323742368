"""rlkern: fused kernels for RL post-training of language models."""

from rlkern import kv
from rlkern.ops._dequantize import dequantize
from rlkern.ops._logprob import LogprobOutput
from rlkern.ops._quantized import QuantizedTensor
from rlkern.ops.branch_select import BranchOutput, branch_select
from rlkern.ops.gae import GaeOutput, gae
from rlkern.ops.group_advantage import group_advantage
from rlkern.ops.linear_distill_loss import LinearDistillLossOutput, linear_distill_loss
from rlkern.ops.linear_logprob import linear_logprob
from rlkern.ops.linear_policy_loss import LinearPolicyLossOutput, linear_policy_loss
from rlkern.ops.logprob_from_logits import logprob_from_logits
from rlkern.ops.merge_attention import merge_attention
from rlkern.ops.policy_loss import PolicyLossOutput, PolicyObjective, policy_loss
from rlkern.ops.policy_loss.groups import balanced_clip, group_policy_loss, self_reward_loss
from rlkern.ops.quantize_fp8 import quantize_fp8
from rlkern.ops.quantize_nvfp4 import quantize_nvfp4
from rlkern.ops.quantized_linear import quantized_linear
from rlkern.ops.rms_norm import rms_norm
from rlkern.ops.sample_tokens import SampleOutput, sample_tokens
from rlkern.ops.segment_reduce import segment_reduce
from rlkern.ops.shared_prefix_attention import shared_prefix_attention
from rlkern.ops.smc_resample import ResampleOutput, smc_resample
from rlkern.ops.sparse_linear_logprob import sparse_linear_logprob
from rlkern.ops.suffix_similarity import suffix_similarity
from rlkern.ops.tree_attention import TreePlan, tree_attention
from rlkern.ops.value_loss import ValueLossOutput, value_loss
from rlkern.ops.write_kv import write_kv

__version__ = "0.1.0"

__all__ = [
    "BranchOutput",
    "GaeOutput",
    "LinearDistillLossOutput",
    "LinearPolicyLossOutput",
    "LogprobOutput",
    "PolicyLossOutput",
    "PolicyObjective",
    "QuantizedTensor",
    "ResampleOutput",
    "SampleOutput",
    "TreePlan",
    "ValueLossOutput",
    "balanced_clip",
    "branch_select",
    "dequantize",
    "gae",
    "group_advantage",
    "group_policy_loss",
    "kv",
    "linear_distill_loss",
    "linear_logprob",
    "linear_policy_loss",
    "logprob_from_logits",
    "merge_attention",
    "policy_loss",
    "quantize_fp8",
    "quantize_nvfp4",
    "quantized_linear",
    "rms_norm",
    "sample_tokens",
    "segment_reduce",
    "self_reward_loss",
    "shared_prefix_attention",
    "smc_resample",
    "sparse_linear_logprob",
    "suffix_similarity",
    "tree_attention",
    "value_loss",
    "write_kv",
]
