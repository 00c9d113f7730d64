"""Quantized weights stored in the order in which the GPU kernels read them.

`Grouped` is for products that dequantise in the kernel (W4A16, W8A16). Its unit is a tile of 128 columns by 128 depths
(64 for 8 bits): one 32-bit word holds 8 (4) depths of a column, a column has 16 words, and a tile is one run of 8 KB.

* A program reads whole tiles: every thread's load is 16 bytes wide, and a warp's loads are consecutive.
* Word i holds depths 32 j + 2 i (low half) and 32 j + 2 i + 1 (high half) at bit 4 j (8 j). So one shift and one mask
  give two neighbouring depths in one register, which is how tensor cores take pairs of 16-bit operands.

Bytes a weight: 0.5 (or 1), and with bfloat16 scales 2 / group (128: 0.016, 32: 0.063), one more / group with zero
points. `Scaled` is for products of 8-bit operands (W8A8), which tensor cores read as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int4", "int8", "float8"]
BLOCK, WORDS = 128, 16  # columns and words of a tile
PLANES: dict[str, int] = {"int4": 4, "int8": 2, "float8": 2}  # depths in half a word: as many dots of depth 32 a tile
MOST_ROW_TILES = 4  # whose sums may be split between programs
AT_ONCE = 1024  # columns packed at a time, so that temporaries stay small


def tile_depth(kind: Kind) -> int:
    """Depths of a tile."""
    return 32 * PLANES[kind]


def counters(columns: int, device: torch.device) -> Tensor:
    """One for each tile of the result that programs may share. They are zero between calls."""
    return torch.zeros(MOST_ROW_TILES * -(-columns // 64), dtype=torch.int32, device=device)


@cache
def _layout(*parts: Hashable) -> object:
    """One object for equal parts: a launch compares it faster than it hashes nested shapes."""
    return object()


@dataclass(frozen=True)
class Grouped:
    """A weight [columns, depth] of 4- or 8-bit numbers with a scale for each column and group of depths.

    weight = scale * (value - zero) + offset. `int4` values are 0..15 and `int8` 0..255, with zero 8 (128) where there
    are no `zeros`; `float8` values are e4m3. A call uses `arrived`, so one weight serves one stream at a time.
    """

    words: Tensor  # int32 [blocks of columns, tiles, 128 columns, 16]
    scales: Tensor  # [groups, columns padded to 128]
    zeros: Tensor | None  # uint8, as scales
    offsets: Tensor | None  # as scales
    arrived: Tensor
    kind: Kind
    group: int
    depth: int
    columns: int

    @staticmethod
    def pack(
        values: Tensor, scales: Tensor, zeros: Tensor | None = None, offsets: Tensor | None = None, *, kind: Kind
    ) -> Grouped:
        """`values` [columns, depth]: uint8, or float8_e4m3fn; `scales`, `zeros`, `offsets` [columns, groups]."""
        columns, depth = values.shape
        group = group_size(depth, scales.shape[1])
        if kind == "float8" and zeros is not None:
            raise ValueError("float8 weights have no zero points: pass zeros=None")
        bytes_ = values.view(torch.uint8) if kind == "float8" else values
        centre = {"int4": 8, "int8": 128, "float8": 0}[kind]
        deep, blocks = tile_depth(kind), -(-columns // BLOCK)
        tiles = -(-depth // deep)
        words = torch.empty(blocks, tiles, BLOCK, WORDS, dtype=torch.int32, device=values.device)
        for first in range(0, blocks, AT_ONCE // BLOCK):
            some = bytes_[first * BLOCK : first * BLOCK + AT_ONCE]
            count = -(-len(some) // BLOCK)
            padded = torch.full((count * BLOCK, tiles * deep), centre, dtype=torch.uint8, device=values.device)
            padded[: len(some), :depth] = some
            words[first : first + count] = _words(padded, kind).view(count, BLOCK, tiles, WORDS).transpose(1, 2)
        kept = [None if x is None else _by_group(x, blocks * BLOCK) for x in (scales, zeros, offsets)]
        assert kept[0] is not None
        return Grouped(words, kept[0], kept[1], kept[2], counters(columns, values.device), kind, group, depth, columns)

    @staticmethod
    def join(parts: Sequence[Grouped]) -> Grouped | None:
        """Weights of the same inputs side by side, for one launch; None where they are not alike, or a part that is not
        the last ends inside a block."""
        first = parts[0]
        for part in parts:
            alike = (part.kind, part.group, part.depth, part.scales.dtype) == (
                first.kind, first.group, first.depth, first.scales.dtype,
            )  # fmt: skip
            same = (part.zeros is None, part.offsets is None) == (first.zeros is None, first.offsets is None)
            if not (alike and same and (part is parts[-1] or part.columns % BLOCK == 0)):
                return None
        columns = sum(part.columns for part in parts)
        scales, zeros, offsets = (
            None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("scales", "zeros", "offsets")
        )
        assert scales is not None
        words, arrived = torch.cat([part.words for part in parts]), counters(columns, first.words.device)
        return Grouped(words, scales, zeros, offsets, arrived, first.kind, first.group, first.depth, columns)

    def values(self) -> Tensor:
        """The numbers without scale [columns, depth], uint8 or float8_e4m3fn."""
        blocks, tiles, _, _ = self.words.shape
        words = self.words.transpose(1, 2).reshape(blocks * BLOCK, tiles, WORDS)
        found = _bytes(words, self.kind)[: self.columns, : self.depth].contiguous()
        return found.view(torch.float8_e4m3fn) if self.kind == "float8" else found

    def dense(self) -> Tensor:
        """The weight [columns, depth] in float32."""
        groups = len(self.scales)
        wide = self.values().float().view(self.columns, groups, -1)
        zero = {"int4": 8.0, "int8": 128.0, "float8": 0.0}[self.kind]

        def of_columns(x: Tensor) -> Tensor:
            return x[:, : self.columns].T.float()[:, :, None]

        out = of_columns(self.scales) * (wide - (zero if self.zeros is None else of_columns(self.zeros)))
        if self.offsets is not None:
            out = out + of_columns(self.offsets)
        return out.reshape(self.columns, self.depth)

    @cached_property
    def layout(self) -> object:
        """What decides how a product with it is launched, but for the inputs."""
        kinds = [x is not None and x.dtype for x in (self.zeros, self.offsets)]
        shapes = self.words.shape, self.scales.shape, self.scales.dtype
        return _layout(self.kind, self.group, self.depth, self.columns, *shapes, *kinds)

    def tensors(self) -> list[Tensor]:
        kept = (self.words, self.scales, self.zeros, self.offsets, self.arrived)
        return [tensor for tensor in kept if tensor is not None]


@dataclass(frozen=True)
class Scaled:
    """A weight [columns, depth] of int8 or float8_e4m3fn, with a scale for each column, or for each block of 128 x 128.

    A call uses `arrived`, so one weight serves one stream at a time."""

    values: Tensor  # [columns, depth]
    scales: Tensor  # float32 [columns], or [blocks of columns, blocks of depths]
    arrived: Tensor

    @staticmethod
    def of(values: Tensor, scales: Tensor) -> Scaled:
        columns, depth = values.shape
        if values.dtype not in (torch.int8, torch.float8_e4m3fn):
            raise ValueError(f"values are {str(values.dtype)[6:]}: only int8 and float8_e4m3fn can be multiplied")
        shapes = [(columns,), (-(-columns // BLOCK), -(-depth // BLOCK))]
        if tuple(scales.shape) not in shapes:
            raise ValueError(f"scales have shape {tuple(scales.shape)}: a weight of {columns} x {depth} has {shapes}")
        if values.dtype == torch.int8 and scales.dim() == 2:
            raise ValueError("int8 weights have a scale for each column, not for each block")
        return Scaled(values.contiguous(), scales.float().contiguous(), counters(columns, values.device))

    @staticmethod
    def join(parts: Sequence[Scaled]) -> Scaled | None:
        """Weights of the same inputs side by side, for one launch; None where they are not alike."""
        first = parts[0]
        for part in parts:
            alike = part.blocks == first.blocks and part.values.dtype == first.values.dtype
            if not (alike and (part is parts[-1] or not part.blocks or len(part.values) % BLOCK == 0)):
                return None
        return Scaled.of(torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))

    @property
    def blocks(self) -> bool:
        """Is there a scale for each block of 128 x 128?"""
        return self.scales.dim() == 2

    @cached_property
    def layout(self) -> object:
        """What decides how a product with it is launched, but for the inputs."""
        return _layout(self.values.dtype, self.values.shape, self.scales.shape)

    def dense(self) -> Tensor:
        """The weight [columns, depth] in float32."""
        if not self.blocks:
            return self.values.float() * self.scales[:, None]
        columns, depth = self.values.shape
        spread = self.scales.repeat_interleave(BLOCK, 0)[:columns].repeat_interleave(BLOCK, 1)[:, :depth]
        return self.values.float() * spread

    def tensors(self) -> list[Tensor]:
        return [self.values, self.scales, self.arrived]


def group_size(depth: int, groups: int) -> int:
    """Depths with one scale. A multiple of 32, because a dot is that deep; any size if there is one group."""
    if groups < 1 or depth % groups or (groups > 1 and depth // groups % 32):
        raise ValueError(f"{depth} inputs in {groups} groups: groups are equal and a multiple of 32, or there is one")
    return depth // groups


def _by_group(x: Tensor, columns: int) -> Tensor:
    """[columns, groups] -> [groups, padded columns]: neighbouring threads read neighbouring scales."""
    out = torch.zeros(x.shape[1], columns, dtype=x.dtype, device=x.device)
    out[:, : len(x)] = x.T
    return out


def _words(values: Tensor, kind: Kind) -> Tensor:
    """uint8 [columns, depth] -> int32 [columns, tiles, 16]."""
    planes, bits = PLANES[kind], 16 // PLANES[kind]
    if kind == "int8":
        values = values ^ 128  # two's complement, from which the kernel builds a signed number without a table
    shaped = values.view(len(values), -1, planes, WORDS, 2).int()  # [columns, tiles, plane, word, half]
    out = torch.zeros(shaped.shape[0], shaped.shape[1], WORDS, dtype=torch.int32, device=values.device)
    for plane in range(planes):
        for half in (0, 1):
            out |= shaped[:, :, plane, :, half] << (bits * plane + 16 * half)
    return out


def _bytes(words: Tensor, kind: Kind) -> Tensor:
    """int32 [columns, tiles, 16] -> uint8 [columns, depth]."""
    planes, bits = PLANES[kind], 16 // PLANES[kind]
    shape = (*words.shape[:2], planes, WORDS, 2)
    out = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for plane in range(planes):
        for half in (0, 1):
            out[:, :, plane, :, half] = (words >> (bits * plane + 16 * half) & (2**bits - 1)).to(torch.uint8)
    return (out ^ 128 if kind == "int8" else out).view(len(words), -1)
