"""Weights of 4 or 8 bits in the order in which the CPU's integer units read them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from labkit_kernels.pages import zeros

WIDE = 16  # columns of a tile
LINEAR = tuple(range(-8, 8))  # what the 4 bits 0 to 15 stand for, unless a table says otherwise


@dataclass(frozen=True)
class Integers:
    """A weight [columns, depth] of integers v in groups along the depth: `scale * v + offset`, with a scale (and an
    offset, if there are any) for each column and group.

    8 bits are the integers -128 to 127, 4 bits are places in `table`, 16 integers of at most 127. `order[k]` is the
    input that place k is multiplied by, where inputs are sorted by group.
    """

    values: Tensor  # uint8 [tiles, bytes]
    scales: Tensor  # float16 or float32 [tiles, groups, 16]
    offsets: Tensor | None  # as scales
    columns: int
    depth: int
    group: int
    bits: int
    table: tuple[int, ...] = LINEAR
    order: Tensor | None = None  # int32 [depth]

    @staticmethod
    def why_not(depth: int, group: int) -> str | None:
        """Why a weight of this depth cannot be packed in groups of this size, or None."""
        if group % 16 and group < depth:
            return f"groups of {group} inputs are no multiple of 16"
        return None

    @classmethod
    def pack(
        cls, values: Tensor, scales: Tensor, offsets: Tensor | None = None, *, group: int, bits: int,
        table: tuple[int, ...] = LINEAR, order: Tensor | None = None,
    ) -> Integers:  # fmt: skip
        """`values` [columns, depth]: int8 for 8 bits, uint8 below 16 for 4. `scales` and `offsets` [columns, groups];
        `group` inputs have one, the last group may be shorter."""
        columns, depth = values.shape
        if (reason := cls.why_not(depth, group)) is not None:
            raise ValueError(reason)
        if bits not in (4, 8):
            raise ValueError(f"weights are packed with 4 or 8 bits, not {bits}")
        groups = -(-depth // group)
        if scales.shape != (columns, groups):
            raise ValueError(f"a weight {columns} x {depth} in groups of {group} has {columns} x {groups} scales, "
                             f"got {' x '.join(map(str, scales.shape))}")  # fmt: skip
        if group >= depth:
            group = -(-depth // 64) * 64  # one group: as long as the widest instruction likes
        tiles = -(-columns // (2 * WIDE)) * 2
        tiled = zeros((tiles, groups * group * WIDE * bits // 8), torch.uint8)
        rest = 0 if bits == 8 else min(range(16), key=lambda i: abs(table[i]))
        _pack(values.contiguous(), tiled, groups * group, bits, rest)
        scales, offsets = _narrow(scales, offsets)
        if order is not None:
            order = order.to(torch.int32).contiguous()
        return cls(
            tiled, _tiles(scales, tiles), None if offsets is None else _tiles(offsets, tiles), columns, depth, group,
            bits, tuple(table), order,
        )  # fmt: skip

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    def unpack(self) -> Tensor:
        """The weight [columns, depth] in float32, inputs in their own order."""
        return self.rows(slice(0, self.columns))

    def gather(self, columns: Tensor) -> Tensor:
        """These columns of the weight [n], bfloat16 [n, depth]."""
        from . import library

        if library.library is not None and self.order is None:
            out = torch.empty(len(columns), self.depth, dtype=torch.bfloat16)
            library.gather(self.described, columns.long().contiguous(), out)
            return out
        rows = [self.rows(slice(column, column + 1)) for column in columns.tolist()]
        return torch.cat([torch.empty(0, self.depth), *rows]).bfloat16()

    def rows(self, columns: slice) -> Tensor:
        """Some columns of the weight, float32 [columns, depth]."""
        tiles = slice(columns.start // WIDE, -(-min(columns.stop, self.columns) // WIDE))
        values = self.values[tiles]
        if self.bits == 4:
            halves = torch.stack((values & 15, values >> 4), 1).view(len(values), 2, -1, 4 * WIDE)
            values = torch.tensor(self.table, dtype=torch.float32)[halves.transpose(1, 2).long()]
        else:
            values = values.view(torch.int8).float()
        values = values.reshape(len(values), -1, WIDE, 4).transpose(1, 2).reshape(len(values) * WIDE, self.groups, -1)
        weight = values * _columns(self.scales[tiles])
        if self.offsets is not None:
            weight = weight + _columns(self.offsets[tiles])
        weight = weight.view(len(weight), -1)[:, : self.depth]
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order.long(), weight)
        begin = columns.start - tiles.start * WIDE
        return weight[begin : begin + min(columns.stop, self.columns) - columns.start]

    @property
    def nbytes(self) -> int:
        kept = (self.values, self.scales, self.offsets, self.order)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    @cached_property
    def described(self) -> ctypes.Structure:
        """What the C++ code is told."""
        from . import library

        values, scales, offsets, order = (
            None if tensor is None else tensor.data_ptr()
            for tensor in (self.values, self.scales, self.offsets, self.order)
        )
        half, table = self.scales.dtype == torch.float16, (ctypes.c_int8 * 16)(*self.table)
        return library.Weight(
            values, scales, offsets, order, self.columns, self.depth, self.groups, self.group, self.bits, half, table
        )

    def __repr__(self) -> str:
        groups = "one group" if self.groups == 1 else f"groups of {self.group}"
        table = "" if self.table == LINEAR or self.bits == 8 else ", by a table"
        order = "" if self.order is None else ", inputs sorted by group"
        return f"Integers({self.depth} -> {self.columns}, {self.bits} bits{table}, {groups}{order})"


def _pack(values: Tensor, tiled: Tensor, deep: int, bits: int, rest: int) -> None:
    from . import library  # built on first use

    if library.library is not None:
        library.pack(values, tiled, deep, bits, rest)
        return
    columns, depth = values.shape
    whole = torch.full((len(tiled) * WIDE, deep), rest, dtype=torch.uint8)
    whole[:columns, :depth] = values.view(torch.uint8)
    units = whole.view(len(tiled), WIDE, -1, 4).transpose(1, 2).reshape(len(tiled), -1, 4 * WIDE)
    if bits == 4:
        units = units[:, 0::2] | units[:, 1::2] << 4
    tiled.copy_(units.reshape(len(tiled), -1))


def _narrow(scales: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As float16 where that keeps eleven bits of every number, else as float32."""
    given = [scales.float()] if offsets is None else [scales.float(), offsets.float()]
    sizes = torch.cat([tensor.abs().flatten() for tensor in given])
    sizes = sizes[sizes > 0]
    normal = not len(sizes) or (float(sizes.min()) >= 2**-14 and float(sizes.max()) <= 65504)
    kept = [tensor.half() if normal else tensor for tensor in given]
    return kept[0], kept[1] if offsets is not None else None


def _tiles(scales: Tensor, tiles: int) -> Tensor:
    """[columns, groups] -> [tiles, groups, 16]."""
    columns, groups = scales.shape
    out = zeros((tiles, groups, WIDE), scales.dtype)
    padded = torch.zeros(tiles * WIDE, groups, dtype=scales.dtype)
    padded[:columns] = scales
    return out.copy_(padded.view(tiles, WIDE, groups).transpose(1, 2))


def _columns(scales: Tensor) -> Tensor:
    """[tiles, groups, 16] -> [columns, groups, 1] in float32."""
    return scales.float().transpose(1, 2).reshape(-1, scales.shape[1], 1)
