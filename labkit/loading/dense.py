"""A linear layer of plain weights. Other formats have a class of their own with the same call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Linear:
    """x @ weight.T + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias  # [out, in], [out]

    def __repr__(self) -> str:
        out, inner = self.weight.shape
        return f"Linear({inner} -> {out}{', bias' if self.bias is not None else ''}, {str(self.weight.dtype)[6:]})"

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]
