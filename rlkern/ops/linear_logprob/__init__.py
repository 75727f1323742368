"""Token log-probs, entropies and their kin straight from hidden states, without the logits."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from rlkern import _check
from rlkern.ops import _logprob
from rlkern.ops._logprob import LogprobOutput, Scalars, Stats
from rlkern.ops.linear_logprob.op import LinearLogprob
from rlkern.ops.linear_logprob.vocab_parallel import VocabParallel

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
    tp_group: ProcessGroup | None = None,
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
        tp_group: the ranks among which the vocabulary is cut, as Megatron cuts it. Rank r passes
            rows [r V, (r + 1) V) of weight, bias and vocab_mask, V being the same on all ranks, and
            everything else in full: hidden, temperature, and targets, ids and vocab_size that
            count over all ranks. All ranks must call, and run the backward, alike.

    Returns:
        LogprobOutput, as `logprob_from_logits`; differentiable with respect to hidden, weight and
        bias. With tp_group every rank gets the same bits, and so should the upstream gradients
        be: the gradient of hidden is then complete on every rank, those of weight and bias are
        of the rank's own rows.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit.

    Two runs give the same bits, with and without gradients. On CPU a row's result does not
    depend on the other rows, nor on the number of threads.

    With tp_group the forward takes one all-gather of 5 + K + 2 topk numbers a row, the backward one
    all-reduce of the gradient of hidden in float32, where hidden needs one; each rank's part of
    it has been rounded to hidden's dtype once. Tokens of different ranks whose logits are equal but
    for rounding may stand in either order in the top k, and count as equal or not for is_top1.
    """
    _logprob.check_head(_OP, hidden, weight, bias)
    vocab = weight.shape[0]
    if bias is not None:
        bias = bias.contiguous()
    parallel, ranks = None, 1
    if tp_group is not None:
        if not isinstance(tp_group, ProcessGroup):
            kind = type(tp_group).__name__
            raise TypeError(f"{_OP}: expected tp_group to be a ProcessGroup, got {kind}")
        parallel, ranks = VocabParallel(tp_group, "is_top1" in outputs), tp_group.size()
    size = _logprob.check_vocab_size(_OP, vocab_size, vocab * ranks)
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
    stats = LinearLogprob.apply(hidden, weight, bias, *rows, scalars, topk, how, parallel)
    return _logprob.select(outputs, ids, topk, Stats(*stats))
