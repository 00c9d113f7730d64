"""Norms in plain torch, computed in float32 and rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Scale each vector of the last dimension to root mean square 1, times `weight`.

    With `residual`, x is first added to it in place; the next residual connection reads that sum. Models that scale by
    1 + w pass 1 + w as `weight`, in float32.
    """
    if residual is not None:
        residual.add_(x)
        x = residual
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Mean 0 and variance 1 over the last dimension, times `weight`, plus `bias`."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight.float()
    if bias is not None:
        wide = wide + bias.float()
    return wide.to(x.dtype)
