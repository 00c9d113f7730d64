"""MXFP4 checkpoints (quant_method "mxfp4"), in which the matrices of a layer's experts are stacked.

`gate_up_proj_blocks` uint8 [experts, outputs, inputs / 32, 16] holds codes of e2m1, low nibble first,
`gate_up_proj_scales` uint8 [experts, outputs, inputs / 32] the exponents of powers of two. All other layers are dense.

An expert's matrix is a layer of its own here: `experts.3.gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.loading.dense import stacked
from labkit.loading.format import Piece, Tensors
from labkit.loading.stored import Entry, Stored, is_listed, matrix, names_of
from labkit.loading.table import E2M1, TableLinear

BLOCK = 32


@dataclass(frozen=True)
class MXFP4(Stored):
    """See `labkit.loading.format.Format`."""

    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> MXFP4:
        return cls(deterministic, names_of(config, "modules_to_not_convert"))

    def declares(self, name: str) -> bool | None:
        return False if is_listed(name, self.skipped) else None

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return stacked(tensors, name, "_blocks") is not None

    def layers(self, tensors: Tensors) -> list[str]:
        found = []
        for stack in stacks(tensors):
            owner, _, part = stack.rpartition(".")
            found += [f"{owner}.{i}.{part}" for i in range(matrix(tensors, f"{stack}_blocks", 4)[0])]
        return found

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        blocks, _ = self._stack(tensors, name)
        _, outputs, runs, _ = matrix(tensors, blocks, 4)
        return outputs, runs * BLOCK

    def _stack(self, tensors: Tensors, name: str) -> tuple[str, int]:
        found = stacked(tensors, name, "_blocks")
        if found is None:
            raise ValueError(f"there are no blocks of layer {name!r}")
        return found

    def entries(self, tensors: Tensors, name: str) -> dict[str, Entry]:
        return {}  # an expert shares its tensors with the others

    def check_layer(self, tensors: Tensors, name: str) -> None:
        blocks, _ = self._stack(tensors, name)
        scales = f"{blocks.removesuffix('_blocks')}_scales"
        shape = matrix(tensors, blocks, 4)
        if shape[3] != BLOCK // 2:
            raise ValueError(f"tensor {blocks!r} has shape {shape}: a block of {BLOCK} codes has {BLOCK // 2} bytes")
        if tensors.size(scales) != shape[:3]:
            raise ValueError(f"tensor {scales!r} has shape {tensors.size(scales)}, its blocks make it {shape[:3]}")
        for each in (blocks, scales):
            if tensors.dtype_of(each) != torch.uint8:
                raise ValueError(f"tensor {each!r} is {str(tensors.dtype_of(each))[6:]}, it should be uint8")

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> TableLinear:
        blocks, i = self._stack(tensors, piece.name)
        rows, columns = piece.outputs, piece.inputs
        if columns.start % BLOCK or columns.stop % BLOCK:
            part = f"inputs {columns.start} to {columns.stop}"
            raise ValueError(f"{piece.name!r}: blocks of {BLOCK} do not divide {part}")
        mine = (slice(i, i + 1), rows, slice(columns.start // BLOCK, columns.stop // BLOCK))
        codes = tensors.raw(blocks, part=mine).reshape(rows.stop - rows.start, -1)
        scales = tensors.raw(f"{blocks.removesuffix('_blocks')}_scales", part=mine).flatten()
        table = torch.tensor(E2M1, device=tensors.device)
        return TableLinear(
            codes, columns.stop - columns.start, table, scales.view(torch.float8_e8m0fnu), BLOCK, bias, tensors.dtype,
            kind="MXFP4",
        )  # fmt: skip


def stacks(tensors: Tensors) -> list[str]:
    """The names, without their ends, of all stacks of quantized matrices."""
    return sorted(name.removesuffix("_blocks") for name in tensors.names() if name.endswith("_blocks"))
