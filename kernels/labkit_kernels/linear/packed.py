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
        tiles = zeros((tall, deep, DEEP // 2, WIDE, 2), weight.dtype)
        from . import library  # built on first use

        if library.pack is not None and weight.dtype == torch.bfloat16 and weight.stride(1) == 1:
            library.pack(weight, tiles)
        else:
            whole = weight.new_zeros(tall * WIDE, deep * DEEP)
            whole[:columns, :depth] = weight
            tiles.copy_(whole.view(tall, WIDE, deep, DEEP // 2, 2).permute(0, 2, 3, 1, 4))
        return cls(tiles, columns, depth)

    def unpack(self) -> Tensor:
        tall, deep = self.tiles.shape[:2]
        whole = self.tiles.permute(0, 3, 1, 2, 4).reshape(tall * WIDE, deep * DEEP)
        return whole[: self.columns, : self.depth]

    def __repr__(self) -> str:
        return f"Packed({self.depth} -> {self.columns}, {str(self.tiles.dtype)[6:]})"
