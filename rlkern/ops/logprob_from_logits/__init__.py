"""Token log-probs, entropies and their kin of logits, each logit read once."""

from collections.abc import Sequence

from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops._logprob import LogprobOutput, Scalars, Stats
from rlkern.ops.logprob_from_logits.op import LogprobFromLogits

_OP = "logprob_from_logits"


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    vocab_mask: Tensor | None = None,
    ids: Tensor | None = None,
    topk: int = 0,
    outputs: Sequence[str] = ("logprob",),
    ignore_index: int = -100,
    logits_rounding: str | None = None,
    inplace_backward: bool = False,
) -> LogprobOutput:
    """Log-prob of each target under softmax(logits / temperature), and more of the same pass.

        z = logits / temperature      (logit_scale and softcap first, where given)
        logprob = z[target] - logsumexp(z);  entropy = -sum_j p_j log p_j,  p = softmax(z)
        sum_sq_prob = sum_j p_j^2;  is_top1 = z[target] >= max_j z_j
        id_logprob[k] = z[ids[k]] - logsumexp(z)

    Equivalent torch program, which holds several (T, V) float32 tensors where this holds none::

        logp = (logits.float() / temperature).log_softmax(-1)
        logprob = logp.gather(-1, targets[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)

    Args:
        logits: (T, V) float32, bfloat16 or float16, any strides; -inf marks a masked token.
            float64 is computed by the reference, in float64.
        targets: (T,) int64 or int32. A row equal to ignore_index has log-prob 0 and no gradient
            through it; any other target outside the vocabulary gives NaN.
        temperature: a positive number, or a (T,) tensor of them; not differentiated.
        softcap: c > 0 replaces logits x by c tanh(x / c), before the temperature (Gemma 2).
        logit_scale: a positive factor on the logits, before softcap (Cohere; Granite's
            1 / logits_scaling).
        vocab_size: how many entries of the vocabulary exist; the rest is padding, which may
            hold anything, NaN included, and gets gradient 0.
        vocab_mask: (V,) bool; a token that is False has probability 0 in every row.
        ids: (T, K) int64 or int32, further tokens of each row whose log-probs are wanted. An id
            equal to ignore_index gives 0; any other one outside the vocabulary gives NaN.
        topk: how many of each row's most probable tokens to return, at most vocab_size.
        outputs: which of "logprob", "entropy" (nats), "logsumexp" (of z), "sum_sq_prob" and
            "is_top1" to return. May be empty where ids or topk is given.
        ignore_index: the target that marks a row without a token.
        logits_rounding: "bf16" rounds the logits to bfloat16 before anything else, as a rollout
            engine with a 16-bit head does; the gradient passes straight through.
        inplace_backward: write the gradient over `logits`, which saves a (T, V) tensor. They
            are lost, and nothing else may need them.

    Returns:
        LogprobOutput: float32 (T,) tensors ("is_top1" is bool: no token is more probable than the
        target), None where not asked; with topk the (T, topk) log-probs and ids, largest first,
        equal ones by id (on CUDA in any order), (-inf, -1) where a row has too few tokens; with
        ids their (T, K) log-probs. All are differentiable with respect to logits but sum_sq_prob,
        is_top1 and topk_ids; the gradient is one (T, V) tensor in their dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Two runs give the same bits, and a row's result does not depend on the other rows.
    """
    _check.tensor(_OP, "logits", logits)
    _check.dtype(_OP, "logits", logits, _check.FLOATS)
    _check.ndim(_OP, "logits", logits, "(T, V)")
    size = _logprob.check_vocab_size(_OP, vocab_size, logits.shape[1])
    temperatures, scalar = _logprob.split_temperature(_OP, temperature, logits, "logits")
    rows = _logprob.rows_of(
        _OP, logits, "logits", targets, ids, vocab_mask, logits.shape[1], temperatures
    )
    topk = _logprob.check_topk(_OP, topk, size)
    _logprob.check_outputs(_OP, outputs, others=topk > 0 or ids is not None)
    scalars = Scalars(
        *_logprob.scalars_of(_OP, scalar, logit_scale, softcap, ignore_index),
        size,
        _logprob.check_rounding(_OP, logits_rounding),
    )
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    stats = LogprobFromLogits.apply(logits, *rows, scalars, topk, inplace_backward)
    return _logprob.select(outputs, ids, topk, Stats(*stats))
