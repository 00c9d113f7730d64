"""Pool usage in tokens and in blocks, and what contiguous reservation would have cost. Reads only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from labkit.core.blocks.table import Pin
from labkit.core.blocks.tables import BlockPool, BlockTables, Ints
from labkit.core.blocks.tiers import Offloading
from labkit.core.shown import Shown


@dataclass(frozen=True)
class BlockStats(Shown):
    """Counts tokens and blocks separately: a used block may be nearly empty, and one block may serve many tables."""

    num_blocks: int
    block_size: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    used_tokens: int  # distinct token places filled in used blocks
    table_tokens: int  # the same, counted once a table: what unshared tables would hold
    num_tables: int
    num_queries: int
    num_hit_queries: int
    num_queried_tokens: int
    num_hit_tokens: int
    num_evicted: int
    num_copied: int
    host_cached_blocks: int = 0  # with kv_offloading: offloaded blocks in host memory
    disk_cached_blocks: int = 0
    num_host_hit_tokens: int = 0  # loaded from host memory, beyond num_hit_tokens
    num_disk_hit_tokens: int = 0  # the same, of blocks that were read from disk for the request
    num_offloaded: int = 0  # blocks copied from the device to host memory
    num_loaded: int = 0  # blocks copied back
    num_disk_missing: int = 0  # files that were gone or damaged when they were wanted

    @property
    def usage(self) -> float:
        """The share of blocks in use."""
        return self.used_blocks / self.num_blocks

    @property
    def token_usage(self) -> float:
        """The share of all token slots in use."""
        return self.used_tokens / (self.num_blocks * self.block_size)

    @property
    def waste(self) -> float:
        """The share of token slots in used blocks that hold no token."""
        places = self.used_blocks * self.block_size
        return 1.0 - self.used_tokens / places if places else 0.0

    @property
    def saved_by_sharing(self) -> float:
        """The share of tokens that tables would store again if they did not share blocks."""
        return 1.0 - self.used_tokens / self.table_tokens if self.table_tokens else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Hit tokens over queried tokens; None if nothing was queried yet (0 means that nothing was hit)."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else None

    def contiguous_waste(self, reserved_tokens: int) -> float:
        """The share that would be wasted if every table reserved `reserved_tokens` contiguous token slots."""
        places = self.num_tables * reserved_tokens
        return 1.0 - self.table_tokens / places if places else 0.0

    @property
    def total_hit_rate(self) -> float | None:
        """`hit_rate`, with the tokens that were loaded from host memory and disk."""
        hit = self.num_hit_tokens + self.num_host_hit_tokens + self.num_disk_hit_tokens
        return hit / self.num_queried_tokens if self.num_queried_tokens else None

    def __repr__(self) -> str:
        hit = "nothing queried" if self.hit_rate is None else f"{self.hit_rate:.1%} of queried tokens hit"
        if self.num_host_hit_tokens or self.num_disk_hit_tokens:
            hit += f", {self.total_hit_rate:.1%} with host memory and disk"
        return (
            f"BlockStats({self.used_blocks}+{self.cached_blocks} of {self.num_blocks} blocks used+cached, "
            f"{self.used_tokens} tokens, waste {self.waste:.1%}, {hit})"
        )


def tier_counts(offload: Offloading) -> dict[str, int]:
    return {
        "host_cached_blocks": len(offload.host),
        "disk_cached_blocks": 0 if offload.disk is None else len(offload.disk),
        "num_host_hit_tokens": offload.num_host_hit_tokens,
        "num_disk_hit_tokens": offload.num_disk_hit_tokens,
        "num_offloaded": offload.num_offloaded,
        "num_loaded": offload.num_loaded,
        "num_disk_missing": offload.num_missing,
    }


def filled_places(tables: BlockTables, pool: BlockPool, pins: Iterable[Pin]) -> tuple[Ints, int]:
    """How many token slots of each block hold a token of a current holder [num_blocks + 1], and the tokens of all
    tables, counting shared ones once per table."""
    size = tables.block_size
    filled = np.zeros(pool.num_blocks + 1, np.int64)
    rows = np.array(list(tables.row_of.values()), np.int64)
    held = np.minimum(tables.num_tokens[rows] - tables.dropped[rows], tables.num_blocks[rows] * size)  # [tables]
    lengths = -(-held // size)
    at = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # 0, 1, .. of each table
    for group in range(tables.num_groups):
        blocks = tables.blocks[group, np.repeat(rows, lengths), at]
        np.maximum.at(filled, blocks, np.minimum(np.repeat(held, lengths) - at * size, size))
    filled[0] = 0
    for pin in pins:
        filled[list(pin.blocks)] = size
    missing = int(tables.front[:, list(tables.dropping)].sum()) * size  # where a group keeps fewer keys than others
    return filled, int(held.sum()) * tables.num_groups - missing
