"""Columns of bytes kept side by side in large pieces of memory. Knows lengths; refuses to know what the bytes mean.

A busy scheduler logs 40 kB of stored blocks a step. As objects of their own they are ten pages touched for the first
time, 20 us each on a virtual machine, a third of the step. numpy maps a piece of this size with huge pages: one first
touch in fifty steps.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .blocks import Tokens

Piece: TypeAlias = NDArray[np.uint8]

PIECE = 8 << 20
SMALL = 16 << 10  # a log that stays small never pays for a large piece


class Packing:
    """Appends bytes to the current piece; a piece goes when nothing refers to it."""

    def __init__(self) -> None:
        self._piece: Piece = np.empty(0, np.uint8)
        self._view = self._piece.data
        self._at = 0

    def keep(self, digests: bytes, parents: bytes, blocks: Tokens, tokens: Tokens) -> tuple[Piece, int]:
        """Where they were put: (piece, offset)."""
        data = b"".join((digests, parents, blocks.tobytes(), tokens.tobytes()))
        at, end = self._at, self._at + len(data)
        if end > len(self._piece):
            size = max(len(data), min(PIECE, max(SMALL, 8 * len(self._piece))))
            self._piece = np.empty(size, np.uint8)
            self._view = self._piece.data
            at, end = 0, len(data)
        self._view[at:end] = data
        self._at = end
        return self._piece, at


def unpack_stored(n: int, size: int, piece: Piece, at: int) -> tuple[bytes, bytes, list[int], list[list[int]]]:
    """`n` blocks of `size` tokens each: hashes, parents' hashes, block numbers, token ids."""
    data = piece[at : at + n * (68 + 4 * size)].tobytes()
    blocks = np.frombuffer(data[64 * n : 68 * n], np.int32).tolist()
    tokens = np.frombuffer(data[68 * n :], np.int32).reshape(n, size).tolist()
    return data[: 32 * n], data[32 * n : 64 * n], blocks, tokens
