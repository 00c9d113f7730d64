"""GPTQ checkpoints: integers of 2, 3, 4 or 8 bits packed along the inputs.

A layer is `qweight` int32 [inputs * bits / 32, outputs], `qzeros` int32 [groups, outputs * bits / 32], `scales`
[groups, outputs] and, with act order, `g_idx` [inputs]. Files of `checkpoint_format` "gptq" store each zero point minus
one, "gptq_v2" the zero point itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.core.options import whole
from labkit.loading.bits import as_bytes, unpack
from labkit.loading.format import Piece, Tensors
from labkit.loading.grouped import GroupedLinear
from labkit.loading.stored import Stored


@dataclass(frozen=True)
class GPTQ(Stored):
    """See `labkit.loading.format.Format`."""

    bits: int = 4
    group: int = 128  # -1: all inputs
    symmetric: bool = True
    stores_zero: bool = False  # else the zero point minus one

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> GPTQ:
        for key in ("is_marlin_format", "dynamic", "modules_in_block_to_quantize"):
            plain = key == "dynamic" and all(rule.startswith("-:") for rule in config.get(key) or ())
            if config.get(key) and not plain:  # of dense layers the tensors tell
                raise ValueError(f"GPTQ checkpoints with {key!r} in their quantization config are not supported")
        bits, group = config.get("bits"), config.get("group_size", -1)
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"GPTQ weights have 2, 3, 4 or 8 bits, the quantization config says {bits!r}")
        if group != -1:
            whole("group_size of the quantization config", group, least=8)
        written = config.get("checkpoint_format") or "gptq"
        if written not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"GPTQ's checkpoint_format is 'gptq' or 'gptq_v2', the quantization config has {written!r}"
            )
        return cls(deterministic, bits, group, bool(config.get("sym", True)), written == "gptq_v2")

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        words, outputs = tensors.size(f"{name}.qweight")
        return outputs, words * 32 // self.bits

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> GroupedLinear:
        name, (outputs, inputs) = piece.name, piece.stored
        group = inputs if self.group == -1 else self.group
        groups = -(-inputs // group)
        first, last = piece.inputs.start * self.bits, piece.inputs.stop * self.bits
        if first % 32 or last % 32:
            raise ValueError(f"{name!r}: inputs {piece.inputs.start} to {piece.inputs.stop} cut through packed words")
        part = (slice(first // 32, last // 32), piece.outputs)
        words = tensors.raw(f"{name}.qweight", inputs * self.bits // 32, outputs, part=part)
        of = self._groups_of(tensors, name, inputs, group)[piece.inputs]
        scales = tensors.raw(f"{name}.scales", groups, outputs, part=(slice(None), piece.outputs)).T
        zeros = self._zeros(tensors, name, groups, outputs, piece.outputs)
        runs = torch.arange(len(of)) // group + piece.inputs.start // group
        if piece.inputs.start % group == 0 and len(of) % group == 0 and torch.equal(of, runs):
            mine = slice(piece.inputs.start // group, piece.inputs.stop // group)
            scales, group_of = scales[:, mine], None
            zeros = None if zeros is None else zeros[:, mine].contiguous()
        else:
            group_of = of.to(tensors.device)
        packed = as_bytes(words.T)
        return GroupedLinear(packed, self.bits, len(of), scales.contiguous(), zeros, group_of, bias, tensors.dtype)

    def _groups_of(self, tensors: Tensors, name: str, inputs: int, group: int) -> Tensor:
        if not tensors.has(f"{name}.g_idx"):
            return torch.arange(inputs) // group
        given = tensors.raw(f"{name}.g_idx", inputs).long().cpu()
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < -(-inputs // group):
            raise ValueError(f"{name}.g_idx names groups {int(given.min())} to {int(given.max())}, there are "
                             f"{-(-inputs // group)}")  # fmt: skip
        return given

    def _zeros(self, tensors: Tensors, name: str, groups: int, outputs: int, part: slice) -> Tensor | None:
        if self.symmetric:
            if tensors.has(f"{name}.qzeros"):
                tensors.skip(f"{name}.qzeros")  # some writers leave other values here; symmetric means half the range
            return None
        words = tensors.raw(f"{name}.qzeros", groups, outputs * self.bits // 32)
        zeros = unpack(as_bytes(words), self.bits, outputs)[:, part]
        if not self.stores_zero:
            zeros = zeros + 1  # uint8; with 2 to 4 bits a stored 15 means 16
        return zeros.T.contiguous()
