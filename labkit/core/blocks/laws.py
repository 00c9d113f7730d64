"""The conservation laws of a block manager: what `check` asserts. Reads only."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from labkit.core.blocks.eviction import EvictionPolicy
from labkit.core.blocks.prefix import PrefixCache
from labkit.core.blocks.states import States
from labkit.core.blocks.table import Pin
from labkit.core.blocks.tables import BlockPool, BlockTables
from labkit.core.blocks.tiers import Offloading


class Blocks(Protocol):
    """What the laws are about."""

    num_blocks: int
    block_size: int
    windows: tuple[int | None, ...]
    pool: BlockPool
    host: BlockPool
    tables: BlockTables
    prefix: PrefixCache
    pins: list[Pin]
    offload: Offloading | None
    states: States | None

    @property
    def eviction(self) -> EvictionPolicy: ...


def check(blocks: Blocks) -> None:
    """free + cached + used == total; every reference count is its tables plus its pins; no block is listed
    twice."""
    tables, pool = blocks.tables, blocks.pool
    counted = np.zeros(blocks.num_blocks + 1, np.int64)
    for row in tables.row_of.values():
        held = [block for block in tables.held(row) if block]
        assert len(set(held)) == len(held), f"row {row} names a block twice"
        np.add.at(counted, held, 1)
        places = tables.num_blocks[row] * blocks.block_size + tables.dropped[row]
        assert not tables.dropped[row] or row in tables.dropping, f"row {row} dropped keys, and may share blocks"
        assert tables.room[row] == places, f"row {row}: room and blocks disagree"
        for group, window in enumerate(blocks.windows):
            front = tables.front[group, row]
            if row in tables.dropping:
                line = tables.blocks[group, row, : tables.num_blocks[row]]
                assert not line[:front].any() and line[front:].all(), f"row {row}: group {group} misses a block"
            if window is None:
                continue
            assert not tables.blocks[group, row, :front].any(), f"row {row} holds blocks before its window"
            assert front * blocks.block_size <= max(tables.num_computed[row] - window + 1, 0), (
                f"row {row} has released blocks inside its window"
            )
        assert tables.num_computed[row] <= tables.num_tokens[row], f"row {row}: more computed than known"
        assert tables.num_computed[row] <= tables.room[row], f"row {row}: more computed than there is room for"
    for pin in blocks.pins:
        np.add.at(counted, list(pin.blocks), 1)
    if blocks.offload is not None:
        np.add.at(counted, list(blocks.offload.fetches), 1)
    assert (counted == pool.count).all(), f"counts are wrong: {np.flatnonzero(counted != pool.count)[:8]}"
    candidates = blocks.eviction.candidates()
    assert len(candidates) == len(blocks.eviction), "the eviction policy miscounts its candidates"
    places = np.concatenate((np.flatnonzero(counted), np.array(pool.free + candidates, np.int64)))
    assert len(places) == blocks.num_blocks and len(np.unique(places)) == blocks.num_blocks, (
        "a block is missing or counted twice"
    )
    assert blocks.prefix.stored[candidates].all(), "a candidate for eviction is not stored"
    assert not blocks.prefix.stored[pool.free].any(), "a free block still has a hash"
    blocks.prefix.check()
    if blocks.states is not None:
        blocks.states.check()
    host = blocks.host
    if blocks.offload is not None:
        return blocks.offload.check()
    assert int((host.count > 0).sum()) + len(host.free) == host.num_blocks, "a host block is missing"
