"""Blocks without their keys and values, and what a plan moves between tiers. Plain columns; decides nothing."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.prefix import PrefixCache
from labkit.core.blocks.tables import Tokens


class Stub(NamedTuple):
    """A full block without its keys and values: what it is found by, and what it holds."""

    digest: bytes
    parent: bytes
    depth: int
    tokens: Tokens  # [block_size]

    def __repr__(self) -> str:
        return f"Stub({self.digest.hex()[:12]}: {len(self.tokens)} tokens, depth {self.depth})"


class DiskWrite(NamedTuple):
    """Write a host block to disk."""

    host_block: int
    stub: Stub


BlockBytes: TypeAlias = NDArray[np.uint8]  # a block's keys and values, as `read_blocks` of a runner gives them


class Arrival(NamedTuple):
    """A block of another engine, to be written to a host block."""

    host_block: int
    data: BlockBytes


class DiskMoves(NamedTuple):
    """What a plan does on disk. A runner may read later than the step: its result then says which reads are done."""

    drops: tuple[bytes, ...] = ()
    writes: tuple[DiskWrite, ...] = ()
    reads: tuple[tuple[bytes, int], ...] = ()  # (hash, host block)

    def __repr__(self) -> str:
        return f"DiskMoves({len(self.drops)} drops, {len(self.writes)} writes, {len(self.reads)} reads)"


NO_MOVES = DiskMoves()


class Fetch(NamedTuple):
    """A device block that plan `step` fills from host memory for a session. Without a stub it was forgotten since."""

    step: int
    stub: Stub | None
    session: str


def stub_of(prefix: PrefixCache, block: int) -> Stub:
    return Stub(
        prefix.hash_of(block), prefix.parent_hash_of(block), int(prefix.depth_of[block]), prefix.tokens_of[block].copy()
    )
