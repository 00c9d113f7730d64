"""A weight stored in the order in which the CPU's matrix units read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit_kernels.pages import zeros

WIDE, DEEP = 16, 32  # columns and depths of a tile


@dataclass(frozen=True)
class Packed:
    """A weight [columns, depth] stored as tiles [columns / 16, depth / 32, 16 pairs of depths, 16 columns, 2], padded
    with zeros. AMX and AVX-512 BF16 read this order."""

    tiles: Tensor
    columns: int
    depth: int

    @classmethod
    def pack(cls, weight: Tensor) -> Packed:
        columns, depth = weight.shape
        tall, deep = -(-columns // (2 * WIDE)) * 2, -(-depth // DEEP)
        found = cls(zeros((tall, deep, DEEP // 2, WIDE, 2), weight.dtype), columns, depth)
        found.put(0, weight)
        return found

    def put(self, at: int, weight: Tensor) -> None:
        """Store other weights for the columns from `at` on."""
        from . import library  # built on first use

        end, dtype = at + len(weight), self.tiles.dtype
        is_plain = weight.dtype == dtype == torch.bfloat16 and weight.stride(1) == 1
        if library.pack is not None and is_plain and at % WIDE == 0 and (end % WIDE == 0 or end == self.columns):
            library.pack(weight, self.tiles[at // WIDE : -(-end // WIDE)])
            return
        deep, column = self.tiles.shape[1], torch.arange(at, end)
        rows = weight.new_zeros(len(weight), deep * DEEP, dtype=dtype)
        rows[:, : self.depth] = weight
        by_column = self.tiles.permute(0, 3, 1, 2, 4)  # [tiles, 16 columns, tiles, 16 pairs, 2]
        by_column[column // WIDE, column % WIDE] = rows.view(-1, deep, DEEP // 2, 2)

    def unpack(self) -> Tensor:
        tall, deep = self.tiles.shape[:2]
        whole = self.tiles.permute(0, 3, 1, 2, 4).reshape(tall * WIDE, deep * DEEP)
        return whole[: self.columns, : self.depth]

    def __repr__(self) -> str:
        return f"Packed({self.depth} -> {self.columns}, {str(self.tiles.dtype)[6:]})"
