"""Products of quantized weights in plain torch, on the dequantised weight in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .weights import BLOCK, Grouped, Scaled

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def linear_grouped(x: Tensor, weight: Grouped, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual; inputs stay in their dtype (W4A16, W8A16)."""
    return _end(x.float() @ weight.dense().T, x.dtype, bias, residual)


def linear_scaled(
    x: Tensor,
    weight: Scaled,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """norm(x) W^T + bias + residual; inputs are rounded to the weight's dtype, with a scale for each row, or for each
    row and 128 depths if the weight's scales are for blocks (W8A8)."""
    group = BLOCK if weight.blocks else 0
    values, scales = quantize_rows(x, weight.values.dtype, group, norm=norm, eps=eps)
    spread = scales.repeat_interleave(BLOCK, 1)[:, : values.shape[1]] if group else scales
    return _end((values.float() * spread) @ weight.dense().T, x.dtype, bias, residual)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, group: int = 0, *, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(values [rows, size] of int8 or float8_e4m3fn, scales float32 [rows, groups]): each row, or each `group` of it,
    is divided by its largest absolute value and rounded. With `norm`, the RMS norm of x is quantized."""
    wide = x.float()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.float()
        wide = wide.to(x.dtype).float()  # what a norm of its own would hand over
    rows, size = wide.shape
    width = group or size
    padded = torch.nn.functional.pad(wide, (0, -size % width)).view(rows, -1, width)
    most = padded.abs().amax(-1).clamp(min=1e-12)
    largest = torch.full_like(most, LARGEST[dtype])  # a number / a tensor would round twice
    scaled = padded * (largest / most)[:, :, None]
    scaled = scaled.view(rows, -1)[:, :size].clamp(-LARGEST[dtype], LARGEST[dtype])
    values = scaled.round() if dtype == torch.int8 else scaled
    return values.to(dtype).contiguous(), most / largest


def _end(product: Tensor, dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        product = product + bias.float()
    if residual is not None:
        product = product + residual.float()
    return product.to(dtype)
