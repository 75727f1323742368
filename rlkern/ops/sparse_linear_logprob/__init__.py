"""Token log-probs under the tokens that a sampler kept, from hidden states and those rows alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops._logprob import LogprobOutput
from rlkern.ops.sparse_linear_logprob.op import SparseLinearLogprob

_OP = "sparse_linear_logprob"


def sparse_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    outputs: Sequence[str] = ("logprob",),
    ignore_index: int = -100,
    logits_rounding: str | None = None,
) -> LogprobOutput:
    """Log-prob of each target among the tokens that its row kept (top-k, top-p, min-p replay).

        K = kept_ids[kept_offsets[t] : kept_offsets[t + 1]]
        z = (hidden[t] @ weight[K]^T + bias[K]) / temperature    (logit_scale, softcap: see Args)
        logprob = z[target] - logsumexp(z);  entropy = -sum_j p_j log p_j,  p = softmax(z)
        sum_sq_prob = sum_j p_j^2;  is_top1: no kept token has a larger z than the target

    Equivalent torch program, which reads the whole head and holds (T, V) tensors::

        z = (hidden.float() @ weight.float().T + bias.float()) / temperature
        logp = z.masked_fill(~kept, -inf).log_softmax(-1)     # kept: (T, V) bool
        logprob = logp.gather(-1, targets[:, None])[:, 0]

    Only the kept rows of weight are read, and no other row of its gradient differs from 0. Inputs
    of 16 bits are multiplied exactly and summed in float32; so are gradients, rounded once.

    Args:
        hidden: (T, H) float32, bfloat16 or float16. float64 is computed by the reference.
        weight: (V, H) in the same dtype: the LM head.
        targets: (T,) int64 or int32. A row equal to ignore_index has log-prob 0; any other target
            outside [0, V) gives NaN. A target that its row did not keep has probability 0 and
            log-prob -inf. None of these has a gradient through the log-prob.
        kept_ids: (N,) int64 or int32, the kept tokens of row 0, then of row 1, ..., as vLLM emits
            sampling masks; in any order, distinct within a row (an id that stands twice counts
            twice). Ids outside [0, V) are ignored.
        kept_offsets: (T + 1,) int64 or int32, from 0 to N, not decreasing. The values are checked
            on the CPU only; elsewhere, and under torch.compile, slots outside of all rows are
            ignored.
        bias: (V,) in the same dtype, added to the products before anything else.
        temperature: a positive number, or a (T,) tensor of them; not differentiated.
        softcap: c > 0 replaces logits x by c tanh(x / c), before the temperature (Gemma 2).
        logit_scale: a positive factor on the logits, before softcap (Cohere; Granite's
            1 / logits_scaling).
        vocab_size: how many entries of the vocabulary exist; the rest is padding, which may
            hold anything, NaN included, and gets gradient 0. Kept ids among it are ignored, and
            targets are out of range.
        outputs: which of "logprob", "entropy" (nats), "logsumexp" (of z), "sum_sq_prob",
            "is_top1" to return, all under the kept set.
        ignore_index: the target that marks a row without a token.
        logits_rounding: "bf16" rounds product and bias, in one step, to bfloat16 before scale, soft
            cap and temperature, as the 16-bit head of a rollout engine does. Gradients pass
            straight through.

    Returns:
        LogprobOutput of float32 (T,) tensors, is_top1 bool; None where not asked. Log-prob, entropy
        and logsumexp are differentiable with respect to hidden, weight and bias; the gradients of
        weight and bias are dense. is_top1 is True where others tie with the target, and False where
        the row is ignored, its target was not kept or its log-prob is NaN. A row that kept nothing
        has logsumexp -inf, entropy and sum_sq_prob 0, and log-prob NaN unless it is ignored.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Two runs give the same bits, with and without gradients, and with any number of threads. A row's
    result does not depend on the other rows.
    """
    _logprob.check_head(_OP, hidden, weight, bias)
    _logprob.check_rows(_OP, hidden, "hidden", targets)
    for name, value in (("kept_ids", kept_ids), ("kept_offsets", kept_offsets)):
        _check.tensor(_OP, name, value)
        _check.dtype(_OP, name, value, _check.INTEGERS)
        _check.same_device(_OP, name, value, "hidden", hidden.device)
    _check.ndim(_OP, "kept_ids", kept_ids, "(N,)")
    _check.shape(_OP, "kept_offsets", kept_offsets, (hidden.shape[0] + 1,), "(T + 1,)")
    if kept_offsets.is_cpu and not torch.compiler.is_compiling():
        _check_bounds(kept_offsets, kept_ids.shape[0])
    _logprob.check_outputs(_OP, outputs)
    size = _logprob.check_vocab_size(_OP, vocab_size, weight.shape[0])
    rows, scalar = _logprob.split_temperature(_OP, temperature, hidden, "hidden")
    scalars = _logprob.scalars_of(_OP, scalar, logit_scale, softcap, ignore_index)
    if size < weight.shape[0]:
        weight = weight[:size]
        bias = None if bias is None else bias[:size]
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    differentiates = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    logprob, logsumexp, entropy, sum_sq_prob, is_top1 = SparseLinearLogprob.apply(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        targets.long().contiguous(),
        kept_ids.contiguous(),
        kept_offsets.long().contiguous(),
        rows,
        scalars,
        _logprob.check_rounding(_OP, logits_rounding),
        differentiates,
    )
    found = {
        "logprob": logprob,
        "logsumexp": logsumexp,
        "entropy": entropy,
        "sum_sq_prob": sum_sq_prob,
        "is_top1": is_top1,
    }
    return LogprobOutput(**{name: found[name] for name in outputs})


def _check_bounds(kept_offsets: Tensor, slots: int) -> None:
    first, last = int(kept_offsets[0]), int(kept_offsets[-1])
    if first == 0 and last == slots and bool((kept_offsets.diff() >= 0).all()):
        return
    bounds = kept_offsets.tolist()
    got = bounds if len(bounds) <= 8 else f"{str(bounds[:4])[:-1]}, ..., {bounds[-1]}]"
    _check.fail(_OP, "kept_offsets", f"to rise from 0 to N = {slots}", got)
