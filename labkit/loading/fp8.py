"""FP8 checkpoints (quant_method "fp8"): e4m3 weights with `weight_scale_inv` for each block, or `weight_scale` for the
whole layer or each output. In spite of its name the first one multiplies. Inputs are not quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from labkit.loading.format import Piece, Tensors
from labkit.loading.scaled import ScaledLinear, read_scaled
from labkit.loading.stored import Stored


@dataclass(frozen=True)
class FP8(Stored):
    """See `labkit.loading.format.Format`."""

    block: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> FP8:
        block = config.get("weight_block_size")
        if block is not None and (len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block)):
            raise ValueError(f"weight_block_size of the quantization config is two numbers, got {block!r}")
        return cls(deterministic, None if block is None else (block[0], block[1]))

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return tensors.has(f"{name}.weight_scale_inv") or tensors.has(f"{name}.weight_scale")

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        outputs, inputs = tensors.size(f"{name}.weight")
        return outputs, inputs

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> ScaledLinear:
        for unused in ("input_scale", "activation_scale"):
            if tensors.has(f"{piece.name}.{unused}"):
                tensors.skip(f"{piece.name}.{unused}")
        by_block = tensors.has(f"{piece.name}.weight_scale_inv")
        scale = "weight_scale_inv" if by_block else "weight_scale"
        return read_scaled(tensors, piece, scale, self.block if by_block else None, bias)
