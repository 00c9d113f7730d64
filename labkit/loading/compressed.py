"""Checkpoints of compressed-tensors: integers packed along the inputs ("pack-quantized"), or int8 and e4m3 weights with
scales ("int-quantized", "float-quantized", "naive-quantized"). Inputs are not quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.loading.bits import as_bytes, unpack
from labkit.loading.format import Linear, Piece, Tensors
from labkit.loading.grouped import GroupedLinear
from labkit.loading.scaled import read_scaled
from labkit.loading.stored import Stored

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
UNUSED = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "weight_shape")


@dataclass(frozen=True)
class CompressedTensors(Stored):
    """See `labkit.loading.format.Format`. What is quantized, and to how many bits, follows from the tensors."""

    block: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> CompressedTensors:
        groups = list((config.get("config_groups") or {}).values())
        for found in (config.get("format"), *(group.get("format") for group in groups)):
            if found is not None and found not in (*FORMATS, "dense"):
                raise ValueError(
                    f"compressed-tensors format {found!r} is not supported; supported are {', '.join(FORMATS)}"
                )
        if config.get("sparsity_config", {}).get("format", "dense") != "dense":
            raise ValueError(f"sparse weights ({config['sparsity_config']['format']!r}) are not supported")
        blocks = {tuple(block) for group in groups if (block := (group.get("weights") or {}).get("block_structure"))}
        if len(blocks) > 1:
            raise ValueError(f"compressed-tensors weights with several block structures: {sorted(blocks)}")
        return cls(deterministic, next(iter(blocks), None))

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return tensors.has(f"{name}.weight_packed") or tensors.has(f"{name}.weight_scale")

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        if tensors.has(f"{name}.weight_packed"):
            outputs, inputs = tensors.raw(f"{name}.weight_shape", 2).tolist()
        else:
            outputs, inputs = tensors.size(f"{name}.weight")
        return int(outputs), int(inputs)

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> Linear:
        for unused in UNUSED:
            if tensors.has(f"{piece.name}.{unused}"):
                tensors.skip(f"{piece.name}.{unused}")
        if tensors.has(f"{piece.name}.weight_packed"):
            return self._read_packed(tensors, piece, bias)
        if tensors.has(f"{piece.name}.weight_zero_point"):
            raise ValueError(f"{piece.name}.weight_zero_point: 8-bit weights with zero points are not supported")
        return read_scaled(tensors, piece, "weight_scale", self.block, bias)

    def _read_packed(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> GroupedLinear:
        name, (outputs, inputs) = piece.name, piece.stored
        rows, columns = piece.outputs, piece.inputs
        words = tensors.size(f"{name}.weight_packed")[1]
        bits = words * 32 // inputs
        if not 1 <= bits <= 8 or -(-inputs * bits // 32) != words:
            raise ValueError(f"{name}.weight_packed has {words} words for {inputs} inputs: no whole number of bits")
        if columns.start * bits % 32 or (columns.stop * bits % 32 and columns.stop != inputs):
            raise ValueError(f"{name!r}: inputs {columns.start} to {columns.stop} cut through packed words")
        part = (rows, slice(columns.start * bits // 32, -(-columns.stop * bits // 32)))
        packed = as_bytes(tensors.raw(f"{name}.weight_packed", outputs, words, part=part))
        size = columns.stop - columns.start
        packed = packed[:, : -(-size * bits // 8)].contiguous()
        scales = tensors.raw(f"{name}.weight_scale", part=(rows,))
        scales = scales.view(len(scales), -1)
        groups = scales.shape[1]
        of = torch.arange(inputs) * groups // inputs
        if inputs % groups:
            raise ValueError(f"{name}.weight_scale has {groups} groups, which do not divide {inputs} inputs")
        if tensors.has(f"{name}.weight_g_idx"):
            of = tensors.raw(f"{name}.weight_g_idx", inputs).long().cpu()
        zeros = None
        if tensors.has(f"{name}.weight_zero_point"):
            stream = tensors.raw(f"{name}.weight_zero_point", -(-outputs * bits // 32), groups)
            zeros = unpack(as_bytes(stream.T), bits, outputs)[:, rows].T.contiguous()
        of, group = of[columns], inputs // groups
        if columns.start % group == 0 and size % group == 0 and torch.equal(of, torch.arange(inputs)[columns] // group):
            mine = slice(columns.start // group, columns.stop // group)
            scales, zeros = scales[:, mine].contiguous(), None if zeros is None else zeros[:, mine].contiguous()
            return GroupedLinear(packed, bits, size, scales, zeros, None, bias, tensors.dtype)
        return GroupedLinear(packed, bits, size, scales, zeros, of.to(tensors.device), bias, tensors.dtype)
