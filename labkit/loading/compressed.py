"""Checkpoints of compressed-tensors: integers packed along the inputs ("pack-quantized"), int8 and e4m3 weights with
scales ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"), and packed e2m1 codes
("mxfp4-pack-quantized", "nvfp4-pack-quantized")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.loading.bits import as_bytes, unpack
from labkit.loading.format import Linear, Piece, Tensors
from labkit.loading.fp8 import one_number
from labkit.loading.grouped import GroupedLinear
from labkit.loading.scaled import read_scaled, scale_block
from labkit.loading.schemes import Scheme, Schemes
from labkit.loading.stored import FLOATS, INDICES, Entry, Stored, matrix
from labkit.loading.table import E2M1, TableLinear

INTEGERS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
CODES = {"mxfp4-pack-quantized": 32, "nvfp4-pack-quantized": 16}  # and the weights that share a scale
FORMATS = (*INTEGERS, *CODES, "mixed-precision")
BYTES = (torch.int8, torch.float8_e4m3fn)
SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)  # the last two: exponents of powers of two
NO_SCHEMES = Schemes()


@dataclass(frozen=True)
class CompressedTensors(Stored):
    """See `labkit.loading.format.Format`. How a layer is stored follows from its tensors, and must agree with the
    config's scheme of it, where the config has one."""

    UNUSED: ClassVar[tuple[str, ...]] = (
        "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale", "weight_shape",
    )  # fmt: skip

    block: tuple[int, int] | None = None
    schemes: Schemes = NO_SCHEMES

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> CompressedTensors:
        schemes = Schemes.of(config)
        groups = (config.get("config_groups") or {}).values()
        for found in (config.get("format"), *(group.get("format") for group in groups)):
            if found is not None and found not in (*FORMATS, "dense"):
                raise ValueError(
                    f"compressed-tensors format {found!r} is not supported; supported are {', '.join(FORMATS)}"
                )
        sparse = config.get("sparsity_config") or {}
        if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
            raise ValueError(f"sparse weights ({str(sparse)[:80]}) are not supported")
        blocks = {scheme.block for _, scheme in schemes.targets if scheme is not None and scheme.block}
        if len(blocks) > 1:
            raise ValueError(f"compressed-tensors weights with several block structures: {sorted(blocks)}")
        return cls(deterministic, next(iter(blocks), None), schemes)

    def describe(self) -> str:
        return "compressed-tensors"

    def needs_layers(self) -> bool:
        return self.schemes.has_weights

    def declares(self, name: str) -> bool | None:
        if self.schemes.is_ignored(name):
            return False
        return self.schemes.of_layer(name) is not None if self.schemes.targets else None

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return tensors.has(f"{name}.weight_packed") or tensors.has(f"{name}.weight_scale")

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        if not tensors.has(f"{name}.weight_packed"):
            outputs, inputs = matrix(tensors, f"{name}.weight")
        elif not tensors.has(f"{name}.weight_shape"):
            outputs, words = matrix(tensors, f"{name}.weight_packed")
            inputs = 2 * words
        else:
            if matrix(tensors, f"{name}.weight_shape", 1) != (2,):
                raise ValueError(f"tensor '{name}.weight_shape' should hold two numbers")
            outputs, inputs = (int(size) for size in tensors.raw(f"{name}.weight_shape").tolist())
            if min(outputs, inputs) < 1:
                raise ValueError(f"tensor '{name}.weight_shape' says {outputs} x {inputs}")
        return outputs, inputs

    def _codes(self, tensors: Tensors, name: str) -> int | None:
        """The weights that share a scale, of a layer of packed e2m1 codes; those have no `weight_shape`."""
        if tensors.has(f"{name}.weight_shape") or not tensors.has(f"{name}.weight_packed"):
            return None
        return CODES["nvfp4-pack-quantized" if tensors.has(f"{name}.weight_global_scale") else "mxfp4-pack-quantized"]

    def entries(self, tensors: Tensors, name: str) -> dict[str, Entry]:
        stored, scheme = self.stored_shape(tensors, name), self.schemes.of_layer(name)
        if (block := self._codes(tensors, name)) is not None:
            entries, bits = _code_entries(tensors, name, stored, block), 4
        elif tensors.has(f"{name}.weight_packed"):
            entries, bits = _packed_entries(tensors, name, stored)
        else:
            entries, bits = self._byte_entries(tensors, name, stored), 8
        if scheme is not None and scheme.bits != bits:
            raise ValueError(f"layer {name!r} has {bits} bits, the quantization config says {scheme.bits}")
        if scheme is not None and scheme.group is not None:
            if stored[1] % scheme.group:
                raise ValueError(f"{name!r}: groups of {scheme.group} do not divide {stored[1]} inputs")
            given = tensors.size(f"{name}.weight_scale")
            if given != (stored[0], stored[1] // scheme.group):
                raise ValueError(f"tensor '{name}.weight_scale' has shape {given}, groups of {scheme.group} make it "
                                 f"{(stored[0], stored[1] // scheme.group)}")  # fmt: skip
        if tensors.has(f"{name}.input_scale"):
            entries["input_scale"] = one_number(tensors, f"{name}.input_scale")
        elif scheme is not None and scheme.static and scheme.inputs == "tensor" and scheme.bits == 8:
            raise ValueError(f"layer {name!r} lacks 'input_scale', and the config says that it is not dynamic")
        return entries

    def _byte_entries(self, tensors: Tensors, name: str, stored: tuple[int, int]) -> dict[str, Entry]:
        scale = tensors.size(f"{name}.weight_scale")
        zeros = tensors.has(f"{name}.weight_zero_point")
        scale_block(f"{name}.weight_scale", scale, stored, self.block)
        if zeros and self.block is not None and len(scale) == 2:
            raise ValueError(f"{name}.weight_zero_point: zero points for blocks of weights are not supported")
        return {
            "weight": Entry(stored, (torch.int8,) if zeros else BYTES),
            "weight_scale": Entry(scale, SCALES),
            "weight_zero_point": Entry(scale, (torch.int8,), optional=True),
        }

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> Linear:
        name, scheme = piece.name, self.schemes.of_layer(piece.name)
        given = tensors.raw(f"{name}.input_scale").float().reshape(()) if tensors.has(f"{name}.input_scale") else None
        if (block := self._codes(tensors, name)) is not None:
            return _read_codes(tensors, piece, block, bias)
        if tensors.has(f"{name}.weight_packed"):
            return _read_packed(tensors, piece, bias)
        if tensors.has(f"{name}.weight_zero_point"):
            return _read_with_zeros(tensors, piece, bias)
        layer = read_scaled(tensors, piece, "weight_scale", self.block, bias)
        layer.inputs = _inputs(scheme, given)
        layer.input_scale = given if layer.inputs == "tensor" else None
        return layer


def _inputs(scheme: Scheme | None, scale: Tensor | None) -> str | None:
    if scheme is not None:
        return scheme.inputs
    return None if scale is None else "tensor"


def _packed_entries(tensors: Tensors, name: str, stored: tuple[int, int]) -> tuple[dict[str, Entry], int]:
    outputs, inputs = stored
    words = matrix(tensors, f"{name}.weight_packed")[1]
    bits = words * 32 // inputs
    if not 1 <= bits <= 8 or -(-inputs * bits // 32) != words:
        raise ValueError(f"{name}.weight_packed has {words} words for {inputs} inputs: no whole number of bits")
    scale = tensors.size(f"{name}.weight_scale")
    groups = scale[1] if len(scale) == 2 else 1
    if not groups or inputs % groups:
        raise ValueError(f"{name}.weight_scale has {groups} groups, which do not divide {inputs} inputs")
    return {
        "weight_packed": Entry((outputs, words), (torch.int32,)),
        "weight_shape": Entry((2,), INDICES),
        "weight_scale": Entry((outputs, groups), FLOATS),
        "weight_zero_point": Entry((-(-outputs * bits // 32), groups), (torch.int32,), optional=True),
        "weight_g_idx": Entry((inputs,), INDICES, optional=True),
    }, bits


def _read_packed(tensors: Tensors, piece: Piece, bias: Tensor | None) -> GroupedLinear:
    name, (outputs, inputs) = piece.name, piece.stored
    rows, columns = piece.outputs, piece.inputs
    words = tensors.size(f"{name}.weight_packed")[1]
    bits = words * 32 // inputs
    if columns.start * bits % 32 or (columns.stop * bits % 32 and columns.stop != inputs):
        raise ValueError(f"{name!r}: inputs {columns.start} to {columns.stop} cut through packed words")
    groups = tensors.size(f"{name}.weight_scale")[1]
    of = torch.arange(inputs) * groups // inputs
    if tensors.has(f"{name}.weight_g_idx"):
        of = tensors.raw(f"{name}.weight_g_idx", inputs).long().cpu()
        if not 0 <= int(of.min()) <= int(of.max()) < groups:
            raise ValueError(f"{name}.weight_g_idx names groups {int(of.min())} to {int(of.max())}, there are {groups}")
    part = (rows, slice(columns.start * bits // 32, -(-columns.stop * bits // 32)))
    packed = as_bytes(tensors.raw(f"{name}.weight_packed", outputs, words, part=part))
    size = columns.stop - columns.start
    packed = packed[:, : -(-size * bits // 8)].contiguous()
    scales = tensors.raw(f"{name}.weight_scale", part=(rows,))
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


def _read_with_zeros(tensors: Tensors, piece: Piece, bias: Tensor | None) -> GroupedLinear:
    """int8 weights with zero points, as unsigned numbers: both are 128 more."""
    name, (outputs, inputs), columns = piece.name, piece.stored, piece.inputs
    values = tensors.raw(f"{name}.weight", outputs, inputs, part=(piece.outputs, columns))
    scales, zeros = (tensors.raw(f"{name}.{suffix}") for suffix in ("weight_scale", "weight_zero_point"))
    if scales.numel() == 1:
        scales, zeros = scales.reshape(1, 1).expand(outputs, 1), zeros.reshape(1, 1).expand(outputs, 1)
    scales, zeros = scales.reshape(outputs, -1)[piece.outputs], zeros.reshape(outputs, -1)[piece.outputs]
    group, size = inputs // scales.shape[1], columns.stop - columns.start
    first, last = columns.start // group, -(-columns.stop // group)
    scales, zeros, group_of = scales[:, first:last], zeros[:, first:last], None
    if last - first > 1 and (columns.start % group or size % group):
        group_of = (torch.arange(columns.start, columns.stop) // group - first).to(tensors.device)
    packed, unsigned = _unsigned(values), _unsigned(zeros)
    return GroupedLinear(packed, 8, size, scales.contiguous(), unsigned, group_of, bias, tensors.dtype)


def _unsigned(values: Tensor) -> Tensor:
    return (values.short() + 128).to(torch.uint8)


def _code_entries(tensors: Tensors, name: str, stored: tuple[int, int], block: int) -> dict[str, Entry]:
    outputs, inputs = stored
    if inputs % block:
        raise ValueError(f"{name!r}: blocks of {block} do not divide {inputs} inputs")
    has_global = tensors.has(f"{name}.weight_global_scale")
    dtypes = (torch.float8_e4m3fn,) if has_global else (torch.uint8, torch.float8_e8m0fnu)
    entries = {
        "weight_packed": Entry((outputs, inputs // 2), (torch.uint8,)),
        "weight_scale": Entry((outputs, inputs // block), dtypes),
    }
    if has_global:
        entries["weight_global_scale"] = one_number(tensors, f"{name}.weight_global_scale")
    return entries


def _read_codes(tensors: Tensors, piece: Piece, block: int, bias: Tensor | None) -> TableLinear:
    name, rows, columns = piece.name, piece.outputs, piece.inputs
    if columns.start % block or columns.stop % block:
        raise ValueError(f"{name!r}: blocks of {block} do not divide inputs {columns.start} to {columns.stop}")
    codes = tensors.raw(f"{name}.weight_packed", part=(rows, slice(columns.start // 2, columns.stop // 2)))
    scales = tensors.raw(f"{name}.weight_scale", part=(rows, slice(columns.start // block, columns.stop // block)))
    kind, divisor = "MXFP4", 1.0
    if tensors.has(f"{name}.weight_global_scale"):
        kind, divisor = "NVFP4", float(tensors.raw(f"{name}.weight_global_scale"))
    elif scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    table = torch.tensor(E2M1, device=tensors.device)
    return TableLinear(
        codes.contiguous(), columns.stop - columns.start, table, scales.flatten(), block, bias, tensors.dtype,
        kind=kind, divisor=divisor,
    )  # fmt: skip
