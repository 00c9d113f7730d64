"""Integer linear layers in plain torch: quantize the rows, then multiply what they and the weight stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit_kernels.integer.packed import Integers


def quantized(x: Tensor, weight: Integers) -> Tensor:
    """Rows as the integer product sees them: rounded to -127 .. 127 times a scale for each of the weight's groups."""
    x = x.float()
    if weight.order is not None:
        x = x[:, weight.order.long()]
    x = F.pad(x, (0, weight.groups * weight.group - x.shape[1])).view(len(x), weight.groups, -1)
    most = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, 127.0 / most, torch.zeros_like(most))
    x = ((x * inverse).round() * (most * (1.0 / 127.0))).view(len(x), -1)[:, : weight.depth]
    if weight.order is not None:
        x = torch.empty_like(x).index_copy_(1, weight.order.long(), x)
    return x


def integer_linear(
    x: Tensor,
    weight: Integers,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x), quantized, @ weight.T + bias + residual, rounded once."""
    out = quantized(_normed(x, norm, eps), weight) @ weight.unpack().T
    for part in (bias, residual):
        if part is not None:
            out = out + part.float()
    return out.to(out_dtype or x.dtype)


def integer_argmax(
    x: Tensor, weight: Integers, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Each row's largest value of `integer_linear` and its position."""
    largest, column = integer_linear(x, weight, bias, norm=norm, eps=eps, out_dtype=torch.float32).max(-1)
    return column, largest


def integer_mlp(
    x: Tensor,
    up: Integers,
    down: Integers,
    *,
    gate: str = "silu",
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """down(gate(a) * b) + residual, where a and b are the halves of up(norm(x))."""
    a, b = integer_linear(x, up, norm=norm, eps=eps, out_dtype=torch.float32).chunk(2, -1)
    act = F.silu(a) if gate == "silu" else F.gelu(a, approximate=gate)
    return integer_linear((act * b).to(x.dtype), down, residual=residual)


def _normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    x = x.float()
    if norm is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()
