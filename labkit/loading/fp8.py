"""FP8 checkpoints (quant_method "fp8" and "fbgemm_fp8"): e4m3 weights with `weight_scale_inv` for each block, or
`weight_scale` for the whole layer or each output. In spite of its name the first one multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.core.options import whole
from labkit.loading.format import Piece, Tensors
from labkit.loading.scaled import ScaledLinear, read_scaled, scale_block
from labkit.loading.stored import FLOATS, Entry, Stored, is_listed, matrix, names_of

SCALES = (*FLOATS, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class FP8(Stored):
    """See `labkit.loading.format.Format`."""

    UNUSED: ClassVar[tuple[str, ...]] = ("input_scale_ub", "k_scale", "v_scale", "output_scale", "kv_scale")

    block: tuple[int, int] | None = None
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> FP8:
        block = config.get("weight_block_size")
        if block is not None:
            if not isinstance(block, (list, tuple)) or len(block) != 2:
                raise ValueError(f"weight_block_size of the quantization config is two numbers, got {block!r}")
            block = tuple(whole("weight_block_size of the quantization config", size, least=1) for size in block)
        return cls(deterministic, block, names_of(config, "modules_to_not_convert", "ignored_layers"))

    def declares(self, name: str) -> bool | None:
        return False if is_listed(name, self.skipped) else None

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return tensors.has(f"{name}.weight_scale_inv") or tensors.has(f"{name}.weight_scale")

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        outputs, inputs = matrix(tensors, f"{name}.weight")
        return outputs, inputs

    def _scale(self, tensors: Tensors, name: str) -> tuple[str, tuple[int, int] | None]:
        """The suffix of the layer's scales, and what shares one of them."""
        if not tensors.has(f"{name}.weight_scale_inv"):
            return "weight_scale", None
        if self.block is None:
            raise ValueError(f"{name}.weight_scale_inv goes by blocks, and the config has no weight_block_size")
        return "weight_scale_inv", self.block

    def entries(self, tensors: Tensors, name: str) -> dict[str, Entry]:
        stored, (scale, block) = self.stored_shape(tensors, name), self._scale(tensors, name)
        shape = tensors.size(f"{name}.{scale}")
        scale_block(f"{name}.{scale}", shape, stored, block)
        entries = {"weight": Entry(stored, (torch.float8_e4m3fn,)), scale: Entry(shape, SCALES)}
        for suffix in ("input_scale", "activation_scale"):
            if tensors.has(f"{name}.{suffix}"):
                entries[suffix] = one_number(tensors, f"{name}.{suffix}")
        return entries

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> ScaledLinear:
        name, (scale, block) = piece.name, self._scale(tensors, piece.name)
        layer = read_scaled(tensors, piece, scale, block, bias)
        layer.inputs = "group" if block is not None else "token"
        for suffix in ("input_scale", "activation_scale"):
            if tensors.has(f"{name}.{suffix}"):
                layer.inputs = "tensor"
                layer.input_scale = tensors.raw(f"{name}.{suffix}").float().reshape(())
        return layer


def one_number(tensors: Tensors, name: str) -> Entry:
    shape = tensors.size(name)
    if shape not in ((), (1,), (1, 1)):
        raise ValueError(f"tensor {name!r} has shape {shape}, it should be one number")
    return Entry(shape, FLOATS)
