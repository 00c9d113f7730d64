"""AWQ checkpoints in the "gemm" layout: integers of 4 bits, packed along the outputs in an order of their own.

A layer is `qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups, outputs / 8] and `scales` [groups, outputs].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.core.options import whole
from labkit.loading.bits import as_bytes, pack, unpack
from labkit.loading.format import Piece, Tensors
from labkit.loading.grouped import GroupedLinear
from labkit.loading.stored import Stored

PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of output 8c + i among the nibbles of word c


@dataclass(frozen=True)
class AWQ(Stored):
    """See `labkit.loading.format.Format`."""

    group: int = 128
    zero_point: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> AWQ:
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise ValueError(f"AWQ weights have 4 bits, the quantization config says {bits!r}")
        layout = str(config.get("version", config.get("format", "gemm"))).lower()
        if layout != "gemm":
            raise ValueError(f"AWQ layout {layout!r} is not supported; 'gemm' is")
        group = config.get("group_size", config.get("q_group_size", 128))
        if group != -1:
            whole("group_size of the quantization config", group, least=8)
        return cls(deterministic, group, bool(config.get("zero_point", True)))

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        inputs, words = tensors.size(f"{name}.qweight")
        return words * 8, inputs

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> GroupedLinear:
        name, (outputs, inputs) = piece.name, piece.stored
        group = inputs if self.group == -1 else self.group
        if inputs % group or piece.inputs.start % group or (piece.inputs.stop - piece.inputs.start) % group:
            raise ValueError(f"{name!r}: groups of {group} do not divide inputs {piece.inputs.start} to "
                             f"{piece.inputs.stop} of {inputs}")  # fmt: skip
        words = tensors.raw(f"{name}.qweight", inputs, outputs // 8, part=(piece.inputs,))
        values = self._unpack(words, outputs)[:, piece.outputs]
        mine = slice(piece.inputs.start // group, piece.inputs.stop // group)
        scales = tensors.raw(f"{name}.scales", inputs // group, outputs, part=(mine, piece.outputs)).T.contiguous()
        zeros = None
        if self.zero_point:
            words = tensors.raw(f"{name}.qzeros", inputs // group, outputs // 8, part=(mine,))
            zeros = self._unpack(words, outputs)[:, piece.outputs].T.contiguous()
        elif tensors.has(f"{name}.qzeros"):
            tensors.skip(f"{name}.qzeros")
        packed = pack(values.T, 4)
        return GroupedLinear(packed, 4, values.shape[0], scales, zeros, None, bias, tensors.dtype)

    @staticmethod
    def _unpack(words: Tensor, outputs: int) -> Tensor:
        nibbles = unpack(as_bytes(words), 4, outputs).view(len(words), -1, 8)
        return nibbles[:, :, torch.tensor(PLACE, device=words.device)].view(len(words), outputs)
