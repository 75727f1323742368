"""Token log-probs, entropies and logsumexps of logits, each logit read once."""

from collections.abc import Sequence

from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops._logprob import LogprobOutput
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
    outputs: Sequence[str] = ("logprob",),
    ignore_index: int = -100,
) -> LogprobOutput:
    """Log-prob of each target under softmax(logits / temperature), and the row's entropy.

        z = logits / temperature      (logit_scale and softcap first, where given)
        logprob = z[target] - logsumexp(z);  entropy = -sum_j p_j log p_j,  p = softmax(z)

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
        outputs: which of "logprob", "entropy" (nats), "logsumexp" (of z) to return.
        ignore_index: the target that marks a row without a token.

    Returns:
        LogprobOutput of float32 (T,) tensors, None where not asked. All three are
        differentiable with respect to logits; the gradient is one (T, V) tensor in their dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Two runs give the same bits, and a row's result does not depend on the other rows.
    """
    _check.tensor(_OP, "logits", logits)
    _check.dtype(_OP, "logits", logits, _check.FLOATS)
    _check.ndim(_OP, "logits", logits, "(T, V)")
    _logprob.check_rows(_OP, logits, "logits", targets)
    _logprob.check_outputs(_OP, outputs)
    size = _logprob.check_vocab_size(_OP, vocab_size, logits.shape[1])
    rows, scalar = _logprob.split_temperature(_OP, temperature, logits, "logits")
    scalars = _logprob.scalars_of(_OP, scalar, logit_scale, softcap, ignore_index)
    if size < logits.shape[1]:
        logits = logits[:, :size]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    targets = targets.long().contiguous()
    stats = LogprobFromLogits.apply(logits, targets, rows, scalars, "entropy" in outputs)
    return _logprob.select(outputs, *stats)
