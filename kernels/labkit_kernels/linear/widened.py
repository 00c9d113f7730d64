"""Products in float32 of weights in 16 bits, as a variant for CPUs that have no products of 16 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.linear import matmul, matmul_add

FEW = 4  # rows up to which reading half the bytes is worth more
KINDS = (torch.bfloat16, torch.float16)


def matmul_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Emulated products of many rows reach 1 GFLOP/s on such a CPU, 80 times less than in float32, so converting the
    weights each time costs little beside them."""
    if x.numel() < FEW * x.shape[-1]:
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def matmul_add_float32(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return residual.add_(matmul_float32(x, weight))


if not native.multiplies_16_bits():
    matmul.variant("float32", device="cpu", dtypes=KINDS, picked=True)(matmul_float32)
    matmul_add.variant("float32", device="cpu", dtypes=KINDS, picked=True)(matmul_add_float32)
