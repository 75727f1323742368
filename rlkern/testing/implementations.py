"""The kernels of an op that can run on a device here, each as forward(...) and backward(...)."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from rlkern import _library

OPS = (
    "logprob_from_logits",
    "linear_logprob",
    "policy_loss",
    "group_advantage",
    "gae",
    "value_loss",
    "segment_reduce",
    "sparse_linear_logprob",
    "linear_distill_loss",
    "quantize_fp8",
    "quantize_nvfp4",
    "quantized_linear",
    "rms_norm",
    "write_kv",
    "merge_attention",
    "tree_attention",
    "shared_prefix_attention",
    "sample_tokens",
    "branch_select",
    "suffix_similarity",
    "smc_resample",
)


class Implementation(NamedTuple):
    name: str  # native, triton or reference
    forward: Callable
    backward: Callable | None


def implementations(op: str, device: str) -> list[Implementation]:
    """The registered kernel under its own name, and the others as their modules.

    Triton needs a CUDA device, or TRITON_INTERPRET=1 set before it is imported.
    """
    found = []
    key = "CUDA" if device.startswith("cuda") else "CPU"
    names = schema_names(op)
    if _library.OWNERS[names[0]][key].kernel == "native":
        ops = [getattr(torch.ops.rlkern, name) for name in names]
        found.append(Implementation("native", ops[0], ops[1] if len(ops) > 1 else None))
    runnable = key == "CUDA" or os.environ.get("TRITON_INTERPRET") == "1"
    modules = ["reference"]
    if runnable and importlib.util.find_spec("triton") is not None:
        modules.append("triton")
    for name in modules:
        module = importlib.import_module(f"rlkern.ops.{op}.{name}")
        found.append(Implementation(name, module.forward, getattr(module, "backward", None)))
    return found


def schema_names(op: str) -> list[str]:
    """The torch.ops names of an op: its forward first, then its backward where it has one."""
    names = [n for n in (op, f"{op}_fwd", f"{op}_bwd") if n in _library.OWNERS]
    assert names, f"no op named {op} is defined"
    return names
