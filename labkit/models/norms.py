"""A layer's norm: it knows its weights and its op, and nothing of what it normalizes."""

from __future__ import annotations

from torch import Tensor

from labkit.loading.weights import Weights
from labkit.models.ops import Ops
from labkit.models.shape import Shape


class Norm:
    """RMS norm, or layer norm where there is a bias."""

    def __init__(self, weights: Weights, name: str, shape: Shape, ops: Ops) -> None:
        self.weight = weights.get(f"{name}.weight")
        if shape.norm_offset:
            self.weight = self.weight.float() + shape.norm_offset
        self.bias = weights.get(f"{name}.bias") if weights.has(f"{name}.bias") else None
        self.eps, self.ops = shape.eps, ops

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return self.ops.layer_norm(x, self.weight, self.bias, self.eps)
        return self.ops.rms_norm(x, self.weight, self.eps)

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]
