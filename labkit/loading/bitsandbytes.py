"""Checkpoints of bitsandbytes: 4-bit codes of a table (NF4, FP4), or int8 with a scale for each output.

4 bits: `weight` uint8 [outputs * inputs / 2, 1] holds the codes of the flattened weight, high nibble first,
`weight.absmax` a scale for each run of codes, `weight.quant_map` the table, and `weight.quant_state.bitsandbytes__nf4`
(or `__fp4`) JSON: shape, block size, and offset and block size of scales that are themselves quantized, to codes of
`weight.nested_quant_map` with scales `weight.nested_absmax`. 8 bits: `weight` int8, and `SCB`, 127 times the scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.core.options import whole
from labkit.loading.format import Linear, Piece, Tensors
from labkit.loading.scaled import ScaledLinear
from labkit.loading.stored import Entry, Stored, is_listed, matrix, names_of
from labkit.loading.table import TableLinear

STATE = "weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
MOST_BYTES = 4096  # of a quant_state; real ones have some 170
FLOAT, BYTE = (torch.float32,), (torch.uint8,)


@dataclass(frozen=True)
class State:
    """What a layer's quant_state says."""

    kind: str
    shape: tuple[int, int]
    block: int
    nested_block: int | None = None
    nested_offset: float = 0.0

    @property
    def num_scales(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block)

    @classmethod
    def of(cls, where: str, kind: str, given: bytes) -> State:
        try:
            fields = json.loads(given)
        except ValueError as error:
            raise ValueError(f"tensor {where!r} is not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("quant_type") != kind:
            raise ValueError(f"tensor {where!r} does not describe {kind} weights: {str(fields)[:80]}")
        shape = fields.get("shape")
        if not isinstance(shape, list) or len(shape) != 2:
            raise ValueError(f"tensor {where!r}: the shape of a linear layer is two numbers, got {str(shape)[:80]}")
        outputs, inputs = (whole(f"{where}: shape", size, least=1, most=2**40) for size in shape)
        block = whole(f"{where}: blocksize", fields.get("blocksize"), least=16, most=2**16)
        if fields.get("nested_blocksize") is None:
            return cls(kind, (outputs, inputs), block)
        nested = whole(f"{where}: nested_blocksize", fields["nested_blocksize"], least=1, most=2**16)
        offset = fields.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"tensor {where!r}: nested_offset is not a number: {offset!r}")
        return cls(kind, (outputs, inputs), block, nested, float(offset))


@dataclass(frozen=True)
class BitsAndBytes(Stored):
    """See `labkit.loading.format.Format`. What is quantized, and to how many bits, follows from the tensors."""

    UNUSED: ClassVar[tuple[str, ...]] = ("weight_format",)

    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> BitsAndBytes:
        if not (config.get("load_in_4bit") or config.get("load_in_8bit")):
            raise ValueError("the config declares bitsandbytes weights with neither load_in_4bit nor load_in_8bit")
        kind = config.get("bnb_4bit_quant_type", "nf4")
        if config.get("load_in_4bit") and kind not in KINDS:
            raise ValueError(f"bnb_4bit_quant_type of the quantization config is nf4 or fp4, got {kind!r}")
        return cls(deterministic, names_of(config, "llm_int8_skip_modules"))

    def describe(self) -> str:
        return "bitsandbytes"

    def declares(self, name: str) -> bool | None:
        return False if is_listed(name, self.skipped) else None

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return any(tensors.has(f"{name}.{suffix}") for suffix in ("SCB", "weight.absmax", *(STATE + k for k in KINDS)))

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        if tensors.has(f"{name}.SCB"):
            outputs, inputs = matrix(tensors, f"{name}.weight")
            return outputs, inputs
        return self._state(tensors, name).shape

    def _state(self, tensors: Tensors, name: str) -> State:
        kind = "fp4" if tensors.has(f"{name}.{STATE}fp4") else "nf4"
        where = f"{name}.{STATE}{kind}"
        (size,) = matrix(tensors, where, 1)
        if size > MOST_BYTES or tensors.dtype_of(where) != torch.uint8:
            dtype = str(tensors.dtype_of(where))[6:]
            raise ValueError(
                f"tensor {where!r} has {size} elements of {dtype}; it should be JSON in at most {MOST_BYTES} bytes"
            )
        return State.of(where, kind, bytes(tensors.raw(where).tolist()))

    def entries(self, tensors: Tensors, name: str) -> dict[str, Entry]:
        outputs, inputs = self.stored_shape(tensors, name)
        if tensors.has(f"{name}.SCB"):
            return {"weight": Entry((outputs, inputs), (torch.int8,)), "SCB": Entry((outputs,), FLOAT)}
        state = self._state(tensors, name)
        entries = {
            f"{STATE}{state.kind}": Entry(tensors.size(f"{name}.{STATE}{state.kind}"), BYTE),
            "weight": Entry((-(-outputs * inputs // 2), 1), BYTE),
            "weight.quant_map": Entry((16,), FLOAT),
            "weight.absmax": Entry((state.num_scales,), FLOAT if state.nested_block is None else BYTE),
        }
        if state.nested_block is not None:
            entries["weight.nested_quant_map"] = Entry((256,), FLOAT)
            entries["weight.nested_absmax"] = Entry((-(-state.num_scales // state.nested_block),), FLOAT)
        return entries

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> Linear:
        if tensors.has(f"{piece.name}.SCB"):
            return self._read_int8(tensors, piece, bias)
        name, (_, inputs), state = piece.name, piece.stored, self._state(tensors, piece.name)
        rows, columns = piece.outputs, piece.inputs
        if inputs % 2 or columns.start % 2 or columns.stop % 2:
            raise ValueError(f"{name!r}: inputs {columns.start} to {columns.stop} of {inputs} cut through bytes")
        flat = slice(rows.start * inputs // 2, rows.stop * inputs // 2)
        codes = tensors.raw(f"{name}.weight", part=(flat,)).view(-1, inputs // 2)
        codes = codes[:, columns.start // 2 : columns.stop // 2]
        packed = codes << 4 | codes >> 4  # low nibble first
        first = (rows.start * inputs + columns.start) // state.block
        last = -(-((rows.stop - 1) * inputs + columns.stop) // state.block)
        at = rows.start * inputs + columns.start - first * state.block
        return TableLinear(
            packed, columns.stop - columns.start, tensors.raw(f"{name}.weight.quant_map"),
            self._scales(tensors, name, state)[first:last].clone(), state.block, bias, tensors.dtype,
            kind=state.kind.upper(), row=inputs, at=at,
        )  # fmt: skip

    def _scales(self, tensors: Tensors, name: str, state: State) -> Tensor:
        """float32 [runs]; scales that are quantized are kept dequantised, 0.37 bits a weight more."""
        scales = tensors.raw(f"{name}.weight.absmax")
        if state.nested_block is None:
            return scales
        table = tensors.raw(f"{name}.weight.nested_quant_map")
        largest = tensors.raw(f"{name}.weight.nested_absmax")
        of = torch.arange(len(scales), device=scales.device) // state.nested_block
        return table[scales.int()] * largest[of] + state.nested_offset

    def _read_int8(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> ScaledLinear:
        values = tensors.raw(f"{piece.name}.weight", part=(piece.outputs, piece.inputs))
        scales = tensors.raw(f"{piece.name}.SCB", part=(piece.outputs,))[:, None] / 127
        if tensors.has(f"{piece.name}.weight_format"):
            form = tensors.raw(f"{piece.name}.weight_format")
            if form.numel() != 1 or int(form) != 0:
                raise ValueError(f"tensor '{piece.name}.weight_format' is {form.tolist()}: only rows (0) can be read")
        layer = ScaledLinear(values, scales, (1, piece.stored[1]), (0, piece.inputs.start), bias, tensors.dtype)
        layer.inputs = "token"
        return layer
