"""RMSNorm of tokens, or of heads with RoPE after it, for decoding."""

import torch
from torch import Tensor

from rlkern import _check
from rlkern.ops.rms_norm import op as _op  # noqa: F401
from rlkern.ops.rms_norm import reference

_OP = "rms_norm"


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """RMSNorm (arXiv 1910.07467) and rotation (RoPE, arXiv 2104.09864, in halves) in one pass.

        y = weight (x / sqrt(mean x^2 + eps)),      the mean over the last dimension
        out[i]         = y[i] cos[i] - y[i + R / 2] sin[i]              for i < R / 2
        out[i + R / 2] = y[i + R / 2] cos[i] + y[i] sin[i]

    The mean is taken in float32. What follows is rounded to the dtype of x after every product, as
    the modules of transformers for Llama and Qwen do, so that a 16-bit sampler differs from such a
    trainer in the order of the mean's additions alone.

    Args:
        x: (T, D), or (T, H, D) for the heads of T tokens; float32, bfloat16, float16 or float64.
        weight: (D,) of the dtype of x; None: y = x.
        eps: >= 0, as the model has it.
        cos, sin: (T, R / 2) float32, both or none, for x of (T, H, D); R <= D, elements from R on
            are not turned. Rounded to the dtype of x.

    Returns:
        of the shape and dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that does not fit.

    No gradient goes through it.
    """
    _check.tensor(_OP, "x", x)
    _check.dtype(_OP, "x", x, _check.FLOATS)
    if x.ndim not in (2, 3):
        _check.fail(_OP, "x", "of shape (T, D) or (T, H, D)", tuple(x.shape))
    width = x.shape[-1]
    if weight is not None:
        _check.tensor(_OP, "weight", weight)
        _check.dtype(_OP, "weight", weight, (x.dtype,))
        _check.shape(_OP, "weight", weight, (width,), "(D,)")
        _check.same_device(_OP, "weight", weight, "x", x.device)
    if not eps >= 0:
        _check.fail(_OP, "eps", ">= 0", eps)
    if (cos is None) != (sin is None):
        _check.fail(_OP, "cos and sin", "to be given together", "one of them")
    if cos is not None and sin is not None:
        if x.ndim != 3:
            _check.fail(_OP, "x", "of shape (T, H, D) with cos and sin", tuple(x.shape))
        for name, table in (("cos", cos), ("sin", sin)):
            _check.tensor(_OP, name, table)
            _check.dtype(_OP, name, table, (torch.float32,))
            _check.ndim(_OP, name, table, "(T, R/2)")
            _check.shape(_OP, name, table, (x.shape[0], cos.shape[1]), "(T, R/2)")
            _check.same_device(_OP, name, table, "x", x.device)
        if 2 * cos.shape[1] > width:
            _check.fail(_OP, "cos", f"of at most D / 2 = {width // 2} columns", cos.shape[1])
        cos, sin = cos.contiguous(), sin.contiguous()
    # float64 is for checking formulas: the reference alone computes in it
    run = reference.forward if x.dtype == torch.float64 else torch.ops.rlkern.rms_norm
    weight = None if weight is None else weight.detach().contiguous()
    return run(x.detach().contiguous(), weight, float(eps), cos, sin)
