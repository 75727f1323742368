"""Token log-probs, entropies and their kin straight from hidden states, without the logits."""

from collections.abc import Sequence

from torch import Tensor

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops._logprob import LogprobOutput, Scalars, Stats
from rlkern.ops.linear_logprob.op import LinearLogprob

_OP = "linear_logprob"


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
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
    batch_invariant: bool = False,
    chunk_size: int | None = None,
) -> LogprobOutput:
    """Log-prob of each target under softmax((hidden @ weight^T + bias) / temperature), and more.

    What comes after the logits, and every argument that is not listed here, is as in
    `logprob_from_logits`: outputs, ids, topk, vocab_mask, vocab_size, softcap, logit_scale,
    temperature, ignore_index.

    Equivalent torch program, which holds several (T, V) float32 tensors where this holds none::

        logp = ((hidden.float() @ weight.float().T + bias) / temperature).log_softmax(-1)
        logprob = logp.gather(-1, targets[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)

    The matmul's float32 accumulator feeds the softmax: 16-bit inputs lose nothing to rounded
    logits, at the speed of a 16-bit matmul. The backward recomputes logits in blocks (four
    matmuls in all, three when hidden or weight needs no gradient); gradients are accumulated in
    float32 and rounded once. The gradient of the logits is rounded to the inputs' dtype between
    its matmuls. Rows whose upstream gradients are all 0 drop out of the backward (on CPU).

    Args:
        hidden: (T, H) float32, bfloat16 or float16. float64 is computed by the reference.
        weight: (V, H) in the same dtype: the LM head.
        bias: (V,) in the same dtype.
        logits_rounding: "bf16" rounds the float32 logits, bias included, to bfloat16 before scale,
            soft cap and temperature: the boundary of a rollout engine with a 16-bit head. The
            gradient passes straight through.
        batch_invariant: a row's results have the same bits whatever rows share the call. On CPU
            they always have; on CUDA this takes matmuls of a fixed order.
        chunk_size: how many entries of the vocabulary have their logits in memory at a time, on
            CUDA, in steps of 4096; None leaves it to the kernel. Fewer than 4096 asks for none at
            all in the forward, which ids, topk and batch_invariant do not allow.

    Returns:
        LogprobOutput, as `logprob_from_logits`; differentiable with respect to hidden, weight and
        bias.

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
    vocab = weight.shape[0]
    _check.shape(_OP, "weight", weight, (vocab, hidden.shape[1]), "(V, H)")
    _check.same_device(_OP, "weight", weight, "hidden", hidden.device)
    if bias is not None:
        _check.tensor(_OP, "bias", bias)
        _check.dtype(_OP, "bias", bias, (hidden.dtype,))
        _check.shape(_OP, "bias", bias, (vocab,), "(V,)")
        _check.same_device(_OP, "bias", bias, "hidden", hidden.device)
        bias = bias.contiguous()
    size = _logprob.check_vocab_size(_OP, vocab_size, vocab)
    temperatures, scalar = _logprob.split_temperature(_OP, temperature, hidden, "hidden")
    rows = _logprob.rows_of(_OP, hidden, "hidden", targets, ids, vocab_mask, vocab, temperatures)
    topk = _logprob.check_topk(_OP, topk, size)
    _logprob.check_outputs(_OP, outputs, others=topk > 0 or ids is not None)
    scalars = Scalars(
        *_logprob.scalars_of(_OP, scalar, logit_scale, softcap, ignore_index),
        size,
        _logprob.check_rounding(_OP, logits_rounding),
    )
    if chunk_size is not None:
        _check.positive(_OP, "chunk_size", chunk_size)
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    how = (batch_invariant, int(chunk_size or 0))
    stats = LinearLogprob.apply(hidden, weight, bias, *rows, scalars, topk, how)
    return _logprob.select(outputs, ids, topk, Stats(*stats))
