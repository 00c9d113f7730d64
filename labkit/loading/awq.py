"""AWQ checkpoints: integers of 4 bits, in one of two layouts.

"gemm": `qweight` int32 [inputs, outputs / 8] and `qzeros` int32 [groups, outputs / 8], packed along the outputs in an
order of their own, and `scales` [groups, outputs]. "gemv": `qweight` int32 [outputs, inputs / 8], `qzeros` int32
[outputs, words] and `scales` [outputs, 8 * words], packed in plain order and padded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.core.options import whole
from labkit.loading.bits import as_bytes, pack, unpack
from labkit.loading.format import Piece, Tensors
from labkit.loading.grouped import GroupedLinear
from labkit.loading.stored import FLOATS, Entry, Stored, is_listed, matrix, names_of

PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of output 8c + i among the nibbles of word c
PADDING = {128: 1, 64: 2, 32: 4}  # "gemv": by group, what the number of words of zero points is a multiple of


@dataclass(frozen=True)
class AWQ(Stored):
    """See `labkit.loading.format.Format`."""

    group: int = 128
    zero_point: bool = True
    layout: str = "gemm"
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> AWQ:
        bits = config.get("bits", config.get("w_bit", 4))
        if isinstance(bits, bool) or bits != 4:
            raise ValueError(f"AWQ weights have 4 bits, the quantization config says {bits!r}")
        layout = str(config.get("version", config.get("format", "gemm"))).lower()
        if layout not in ("gemm", "gemv"):
            raise ValueError(f"AWQ layout {layout!r} is not supported; 'gemm' and 'gemv' are")
        group = config.get("group_size", config.get("q_group_size", 128))
        if group != -1:
            whole("group_size of the quantization config", group, least=8)
        if layout == "gemv" and group not in PADDING:
            raise ValueError(f"AWQ's layout 'gemv' has groups of 32, 64 or 128, the quantization config says {group}")
        skipped = names_of(config, "modules_to_not_convert")
        return cls(deterministic, int(group), bool(config.get("zero_point", True)), layout, skipped)

    def declares(self, name: str) -> bool | None:
        return False if is_listed(name, self.skipped) else None

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        first, words = matrix(tensors, f"{name}.qweight")
        return (words * 8, first) if self.layout == "gemm" else (first, words * 8)

    def _groups(self, name: str, inputs: int) -> int:
        group = inputs if self.group == -1 else self.group
        if inputs % group:
            raise ValueError(f"{name!r}: groups of {group} do not divide {inputs} inputs")
        return inputs // group

    def entries(self, tensors: Tensors, name: str) -> dict[str, Entry]:
        outputs, inputs = self.stored_shape(tensors, name)
        groups, optional = self._groups(name, inputs), not self.zero_point
        if self.layout == "gemm":
            return {
                "qweight": Entry((inputs, outputs // 8), (torch.int32,)),
                "qzeros": Entry((groups, outputs // 8), (torch.int32,), optional),
                "scales": Entry((groups, outputs), FLOATS),
            }
        words = self._padded_words(groups)
        return {
            "qweight": Entry((outputs, inputs // 8), (torch.int32,)),
            "qzeros": Entry((outputs, words), (torch.int32,), optional),
            "scales": Entry((outputs, 8 * words), FLOATS),
        }

    def _padded_words(self, groups: int) -> int:
        return math.ceil(math.ceil(groups / 8) / PADDING[self.group]) * PADDING[self.group]

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> GroupedLinear:
        name, (_, inputs) = piece.name, piece.stored
        group = inputs // self._groups(name, inputs)
        if piece.inputs.start % group or (piece.inputs.stop - piece.inputs.start) % group:
            raise ValueError(f"{name!r}: groups of {group} do not divide inputs {piece.inputs.start} to "
                             f"{piece.inputs.stop} of {inputs}")  # fmt: skip
        mine = slice(piece.inputs.start // group, piece.inputs.stop // group)
        if not self.zero_point and tensors.has(f"{name}.qzeros"):
            tensors.skip(f"{name}.qzeros")
        read = self._read_gemm if self.layout == "gemm" else self._read_gemv
        packed, scales, zeros = read(tensors, piece, mine)
        size = piece.inputs.stop - piece.inputs.start
        return GroupedLinear(packed, 4, size, scales, zeros, None, bias, tensors.dtype)

    def _read_gemm(self, tensors: Tensors, piece: Piece, mine: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        name, (outputs, _) = piece.name, piece.stored
        values = _in_order(tensors.raw(f"{name}.qweight", part=(piece.inputs,)), outputs)[:, piece.outputs]
        scales = tensors.raw(f"{name}.scales", part=(mine, piece.outputs)).T.contiguous()
        zeros = None
        if self.zero_point:
            words = tensors.raw(f"{name}.qzeros", part=(mine,))
            zeros = _in_order(words, outputs)[:, piece.outputs].T.contiguous()
        return pack(values.T, 4), scales, zeros

    def _read_gemv(self, tensors: Tensors, piece: Piece, mine: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        name = piece.name
        words = slice(piece.inputs.start // 8, piece.inputs.stop // 8)
        packed = as_bytes(tensors.raw(f"{name}.qweight", part=(piece.outputs, words)))
        scales = tensors.raw(f"{name}.scales", part=(piece.outputs, mine)).contiguous()
        zeros = None
        if self.zero_point:
            stream = as_bytes(tensors.raw(f"{name}.qzeros", part=(piece.outputs,)))
            zeros = unpack(stream, 4, 2 * stream.shape[1])[:, mine].contiguous()
        return packed, scales, zeros


def _in_order(words: Tensor, outputs: int) -> Tensor:
    nibbles = unpack(as_bytes(words), 4, outputs).view(len(words), -1, 8)
    return nibbles[:, :, torch.tensor(PLACE, device=words.device)].view(len(words), outputs)
