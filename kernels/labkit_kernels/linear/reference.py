"""Linear layers on packed weights, in plain torch: unpack, norm, multiply, add. Slow and easy to verify."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit_kernels.linear.packed import Packed
from labkit_kernels.norm.reference import rms_norm


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, by torch's own library."""
    return F.linear(x, weight, bias)


def matmul_add(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual += x @ weight.T, in place; returns the residual."""
    return residual.add_(F.linear(x, weight))


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x) @ weight.T + bias + residual, summed in float32 and rounded once."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    out = x.float() @ weight.unpack().float().T
    for part in (bias, residual):
        if part is not None:
            out = out + part.float()
    return out.to(out_dtype or x.dtype)


def linear_invariant(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias + residual, row by row: no row's result, to the bit, depends on the others."""
    if not len(x):
        return x.new_empty(0, len(weight))
    out = torch.stack([F.linear(row[None], weight, bias)[0] for row in x])
    return out if residual is None else residual + out


def linear_argmax(
    x: Tensor, weight: Packed, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Each row's largest value of `linear` and its position: all that greedy sampling needs of the LM head."""
    largest, column = linear(x, weight, bias, norm=norm, eps=eps, out_dtype=torch.float32).max(-1)
    return column, largest


def mlp(
    x: Tensor,
    up: Packed,
    down: Packed,
    *,
    gate: str = "silu",
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """down(gate(a) * b) + residual, where a and b are the halves of up(norm(x))."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    a, b = (x.float() @ up.unpack().float().T).chunk(2, -1)
    act = F.silu(a) if gate == "silu" else F.gelu(a, approximate=gate)
    out = (act * b).to(x.dtype).float() @ down.unpack().float().T
    return (out if residual is None else out + residual.float()).to(x.dtype)
