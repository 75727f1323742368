"""Token log-probs and entropies straight from hidden states, without the logits."""

from collections.abc import Sequence

from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops._logprob import LogprobOutput
from rlkern.ops.linear_logprob.op import LinearLogprob

_OP = "linear_logprob"


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    outputs: Sequence[str] = ("logprob",),
    ignore_index: int = -100,
) -> LogprobOutput:
    """Log-prob of each target under softmax(hidden @ weight^T / temperature), and the entropy.

        z = hidden @ weight^T / temperature      (logit_scale and softcap first, where given)
        logprob = z[target] - logsumexp(z);  entropy = -sum_j p_j log p_j,  p = softmax(z)

    Equivalent torch program, which holds several (T, V) float32 tensors where this holds none::

        logp = (hidden.float() @ weight.float().T / temperature).log_softmax(-1)
        logprob = logp.gather(-1, targets[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)

    The matmul's float32 accumulator feeds the softmax: 16-bit inputs lose nothing to rounded
    logits, at the speed of a 16-bit matmul. The backward recomputes logits in blocks (four
    matmuls in all, three when hidden or weight needs no gradient); gradients are accumulated in
    float32 and rounded once. The gradient of the logits is rounded to the inputs' dtype between
    its matmuls.

    Args:
        hidden: (T, H) float32, bfloat16 or float16. float64 is computed by the reference.
        weight: (V, H) in the same dtype: the LM head.
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
        differentiable with respect to hidden and weight.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Two runs give the same bits, with and without gradients. On CPU a row's result does not
    depend on the other rows, nor on the number of threads.
    """
    _check.tensor(_OP, "hidden", hidden)
    _check.tensor(_OP, "weight", weight)
    _check.dtype(_OP, "hidden", hidden, _check.FLOATS)
    _check.dtype(_OP, "weight", weight, (hidden.dtype,))
    _check.ndim(_OP, "hidden", hidden, "(T, H)")
    _check.ndim(_OP, "weight", weight, "(V, H)")
    _check.shape(_OP, "weight", weight, (weight.shape[0], hidden.shape[1]), "(V, H)")
    _check.same_device(_OP, "weight", weight, "hidden", hidden.device)
    _logprob.check_rows(_OP, hidden, "hidden", targets)
    _logprob.check_outputs(_OP, outputs)
    size = _logprob.check_vocab_size(_OP, vocab_size, weight.shape[0])
    rows, scalar = _logprob.split_temperature(_OP, temperature, hidden, "hidden")
    scalars = _logprob.scalars_of(_OP, scalar, logit_scale, softcap, ignore_index)
    if size < weight.shape[0]:
        weight = weight[:size]
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    targets = targets.long().contiguous()
    stats = LinearLogprob.apply(hidden, weight, targets, rows, scalars, "entropy" in outputs)
    return _logprob.select(outputs, *stats)
