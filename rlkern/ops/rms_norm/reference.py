"""RMSNorm and RoPE in plain torch, as transformers' modules compute them: the specification."""

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    y = x
    if weight is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        y = weight * wide.to(x.dtype)
    if cos is None or sin is None:
        return y.clone() if y is x else y
    half = cos.shape[1]
    c, s = (table[:, None].to(x.dtype) for table in (cos, sin))
    low, high, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    return torch.cat([low * c - high * s, high * c + low * s, rest], -1)
