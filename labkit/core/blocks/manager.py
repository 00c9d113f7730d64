"""The block manager: tables by name (`allocate`, `append`, `fork`, `free`). The scheduler uses its rows, see
`rows.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from labkit.core.blocks.eviction import EvictionChoice
from labkit.core.blocks.prefix import Explanation, Hit, Lookup, Span, hash_blocks, root_hash, span_keys
from labkit.core.blocks.rows import OutOfBlocksError, RowBlocks
from labkit.core.blocks.states import States, StateScore
from labkit.core.blocks.stats import BlockStats, filled_places, tier_counts
from labkit.core.blocks.table import BlockTable, Pin
from labkit.core.options import duration, flag, named_arguments, named_options, text, whole
from labkit.core.shown import Shown
from labkit.core.tokens import TokenIds, as_tokens

NO_HIT = Hit(0, [[]])


@named_options
class BlockManager(RowBlocks, Shown):
    """Fixed-size blocks, allocated to tables, shared by reference count, copied on write, and cached by prefix.

    `windows` has one entry for each group of layers with blocks of its own: how many of the last tokens these layers
    attend to, None for all. Blocks that have left the window are released.

    With `kv_offloading`, cached blocks that an engine evicts are kept in the host blocks, of which `host_eviction`
    chooses the next to go, and then in `num_disk_blocks` files if the runner has a folder for them. Swapped requests
    use the same host blocks, and go first.

    `num_states`, for models with recurrent layers: how many copies of their states are kept, so that prefixes can be
    continued; a prefix is hit up to the last block whose state is there. None: the model has no such layers. If there
    is no room for a new one, the state with the lowest `state_score` goes, a function of a `lk.Kept`, or without one
    the least recently used. With `state_every` prompts leave a state after every so many tokens, too.

    >>> bm = BlockManager(num_blocks=64, block_size=16)
    >>> bm.allocate("a", list(range(40)))
    BlockTable('a': 40 tokens in blocks 1 2 3)
    >>> bm
    BlockManager(64x16: used 3, cached 0, free 61)
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        num_host_blocks: int = 0,
        eviction: EvictionChoice = "lru",
        prefix_caching: bool = True,
        windows: Sequence[int | None] = (None,),
        kv_offloading: bool = False,
        host_eviction: EvictionChoice = "lru",
        num_disk_blocks: int = 0,
        num_states: int | None = None,
        state_score: StateScore | None = None,
        state_every: int | None = None,
    ) -> None:
        whole("num_disk_blocks", num_disk_blocks, least=0, most=2**31 - 2)
        if flag("kv_offloading", kv_offloading) and not num_host_blocks:
            raise ValueError("kv_offloading keeps evicted blocks in host memory: give it num_host_blocks")
        if num_disk_blocks and not kv_offloading:
            raise ValueError("blocks go to disk through host memory: num_disk_blocks needs kv_offloading=True")
        if num_states is not None and kv_offloading:
            raise ValueError("kv_offloading moves blocks, not the states of recurrent layers: leave it out")
        super().__init__(
            whole("num_blocks", num_blocks, least=1, most=2**31 - 2),
            whole("block_size", block_size, least=1, most=2**20),
            whole("num_host_blocks", num_host_blocks, least=0, most=2**31 - 2),
            eviction,
            flag("prefix_caching", prefix_caching),
            windows,
            (host_eviction, num_disk_blocks) if kv_offloading else None,
            _states(num_states, state_score, state_every, block_size),
        )
        self.taken: Callable[[str], bool] = _nobody  # whether a request has this name

    def __repr__(self) -> str:
        return (
            f"BlockManager({self.num_blocks}x{self.block_size}: "
            f"used {self.num_used}, cached {self.num_cached}, free {self.num_free})"
        )

    def row(self, name: str) -> int:
        return self.tables.row(name)

    def table(self, name: str) -> BlockTable:
        self.row(name)
        return BlockTable(self, name)

    def stats(self) -> BlockStats:
        filled, table_tokens = filled_places(self.tables, self.pool, self.pins)
        return BlockStats(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            used_blocks=self.num_used,
            cached_blocks=self.num_cached,
            free_blocks=self.num_free,
            used_tokens=int(filled.sum()),
            table_tokens=table_tokens,
            num_tables=len(self.tables.row_of),
            num_queries=self.num_queries,
            num_hit_queries=self.num_hit_queries,
            num_queried_tokens=self.num_queried_tokens,
            num_hit_tokens=self.num_hit_tokens,
            num_evicted=self.num_evicted,
            num_copied=self.num_copied,
            **({} if self.offload is None else tier_counts(self.offload)),
        )

    # -- tables by name ------------------------------------------------------------------------------------------

    @named_arguments
    def allocate(
        self,
        name: str,
        tokens: TokenIds,
        *,
        salt: str | None = None,
        adapter: str | None = None,
        spans: Sequence[Span] = (),
        window: int | None = None,
    ) -> BlockTable:
        """A table for `tokens`, starting with the blocks that the prefix cache already holds. With a sliding `window`
        only the last blocks of the prefix need to be there; the entries before them name the scratch block."""
        self._check_new(name)
        ids = as_tokens(tokens, "tokens")
        keys = span_keys(spans, self.block_size, len(ids))
        root = self.prefix.root(salt, adapter)
        hashes = hash_blocks(ids, self.block_size, root, keys)
        hit = self.hit(hashes, len(ids), spans, self._windows(window)) if self.prefix_caching else NO_HIT
        wanted = (self.blocks_for(len(ids)) - hit.num_blocks) * self.num_groups
        self._check_fits(name, wanted, hit.held)
        row = self.open(name, root, hashes, keys)
        if self.prefix_caching and len(ids):
            self.count_query(len(ids), hit.num_blocks)
        self.join(row, ids, hit)
        self.grow(row, len(ids), name)
        self._commit_named(row)
        return BlockTable(self, name)

    def append(self, name: str, tokens: TokenIds) -> BlockTable:
        """Write further tokens behind a table's last; a shared last block is copied first."""
        row = self.row(name)
        if row not in self._own_rows:
            raise ValueError(f"table {name!r} belongs to a running request: only a step appends to it")
        ids = as_tokens(tokens, "tokens")
        have = int(self.tables.num_tokens[row])
        copy = self.must_copy(row, have)
        more = self.blocks_for(have + len(ids)) - int(self.tables.num_blocks[row])
        self._check_fits(name, (more + copy) * self.num_groups, [])
        if copy and len(ids):
            self.copy_on_write(row, have)
        self.grow(row, have + len(ids), name)
        self.tables.write_tokens(row, have, ids)
        self._commit_named(row)
        return BlockTable(self, name)

    def fork(self, source: str, name: str) -> BlockTable:
        """A second table over the same blocks, the partial last one included."""
        row = self.row(source)
        if row in self.tables.dropping:
            raise ValueError(f"table {source!r} belongs to a request with kv=: it moves its keys, and shares no block")
        self._check_new(name)
        self._own_rows.add(self.fork_row(row, name))
        return BlockTable(self, name)

    def free(self, name: str) -> None:
        """Release a table's blocks; full ones stay cached until their place is needed."""
        row = self.row(name)
        if row not in self._own_rows:
            raise ValueError(f"table {name!r} belongs to a running request: abort the request instead")
        self.close(name)
        self._own_rows.discard(row)

    @named_arguments
    def lookup(
        self,
        tokens: TokenIds,
        *,
        salt: str | None = None,
        adapter: str | None = None,
        spans: Sequence[Span] = (),
        window: int | None = None,
    ) -> Lookup:
        """What an allocation would hit. A pure peek: no count, no order, no statistic changes."""
        ids = as_tokens(tokens, "tokens")
        hit = NO_HIT
        places: list[int | None] = []
        num_below = 0
        if self.prefix_caching:
            hashes = hash_blocks(
                ids, self.block_size, root_hash(salt, adapter), span_keys(spans, self.block_size, len(ids))
            )
            hit = self.hit(hashes, len(ids), spans, self._windows(window))
            places, num_below = self.below(hashes, hit, spans, len(ids))
        num_host = (len(places) - num_below) * self.block_size
        return Lookup(
            len(ids), hit.num_blocks * self.block_size, tuple(hit.held), num_host, num_below * self.block_size
        )

    @named_arguments
    def explain(
        self,
        tokens: TokenIds,
        *,
        salt: str | None = None,
        adapter: str | None = None,
        spans: Sequence[Span] = (),
    ) -> Explanation:
        """Why a lookup hits as far as it does, and not further."""
        ids = as_tokens(tokens, "tokens")
        if not self.prefix_caching:
            return Explanation(len(ids), 0, "off", "prefix caching is off")
        usable = self.usable_blocks(len(ids), spans, len(ids))
        found = self.prefix.explain(ids, usable, salt, adapter, spans)
        if self.offload is None and self.states is None:
            return found
        look = self.lookup(ids, salt=salt, adapter=adapter, spans=spans)
        if self.states is not None:
            if look.num_hit == found.num_hit:
                return found
            detail = f"{found.num_hit} tokens are stored, the state of recurrent layers only after {look.num_hit}"
            return Explanation(found.num_tokens, look.num_hit, "no state", detail)
        parts = [(look.num_host, "in host memory"), (look.num_disk, "on disk")]
        where = " and ".join(f"{number} {there}" for number, there in parts if number)
        if not where:
            return found
        detail = f"the device has {look.num_hit} tokens of it; of the next, {where} ({found.reason}: {found.detail})"
        return Explanation(found.num_tokens, found.num_hit, "offloaded", detail)

    @named_arguments
    def pin(
        self,
        tokens: TokenIds,
        *,
        ttl: float | None = None,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> Pin:
        """Keep the cached blocks of this prefix, `ttl` seconds long or until unpinned. Soft: a request that would
        starve without them gets them."""
        ids = as_tokens(tokens, "tokens")
        expires = None if ttl is None else self.now + int(duration("ttl", ttl) * 1e9)
        hashes = hash_blocks(ids, self.block_size, root_hash(salt, adapter))
        hit = self.hit(hashes, len(hashes) * self.block_size + 1)
        blocks = [block for block in hit.held if block]
        self.hold(blocks)
        digest = hashes[hit.num_blocks - 1] if hit.num_blocks else b""
        pin = Pin(tuple(blocks), hit.num_blocks * self.block_size, expires, digest)
        self.pins.append(pin)
        if self.states is not None:
            self.states.pinned.add(digest)
        return pin

    def unpin(self, pin: Pin) -> None:
        at = next((i for i, mine in enumerate(self.pins) if mine is pin), None)
        if at is None:
            raise ValueError(f"{pin!r} is not held here: it was released, or expired")
        del self.pins[at]
        self.release(list(pin.blocks))

    def release_front(self, name: str, num_tokens: int) -> None:
        """The first `num_tokens` tokens of a table have left the attention window: release the blocks that hold only
        such tokens. Their entries name the scratch block."""
        row = self.row(name)
        if row not in self._own_rows:
            raise ValueError(f"table {name!r} belongs to a running request: only a step releases its blocks")
        most = int(self.tables.num_computed[row])
        first = whole("num_tokens", num_tokens, least=0, most=most) // self.block_size
        for group in range(self.num_groups):
            if first > self.tables.front[group, row]:
                self.leave_window(group, row, first)

    def evict(self) -> int:
        """Evict every cached block now; returns how many. With kv_offloading an engine's next step moves them."""
        evicted = self.num_cached
        self.pool.free += self._evict(evicted, None, evicted)
        return evicted

    def reset(self) -> None:
        """Forget every cached prefix, in all tiers. Refused while blocks are in use, because their prefixes are being
        shared."""
        if self.num_used:
            raise RuntimeError(f"{self.num_used} blocks are in use: free their tables and pins first")
        self.clear_prefixes()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _windows(self, window: int | None) -> tuple[int | None, ...]:
        if window is None:
            return self.windows
        return (whole("window", window, least=1),) * self.num_groups

    def _commit_named(self, row: int) -> None:
        self.commit(np.array([row]), self.tables.num_tokens[[row]])

    def _check_new(self, name: str) -> None:
        text("a table's name", name)
        if name in self.tables.row_of:
            raise ValueError(f"there is already a table {name!r}")
        if self.taken(name):
            raise ValueError(f"{name!r} is the id of a request: choose another name")

    def _check_fits(self, name: str, wanted: int, hit: list[int]) -> None:
        available = self.available - self.num_revived(hit)
        if wanted > available:
            raise OutOfBlocksError(
                f"table {name!r} needs {wanted} more blocks of {self.block_size} tokens, "
                f"{available} of {self.num_blocks} are available"
            )


def _states(num_states: int | None, score: StateScore | None, every: int | None, block_size: int) -> States | None:
    if num_states is None:
        if score is not None or every is not None:
            raise ValueError("state_score and state_every are for kept states of recurrent layers: give num_states")
        return None
    if score is not None and not callable(score):
        raise ValueError(f"state_score must be a function of a kept state, got {score!r}")
    if every is not None and whole("state_every", every, least=1) % block_size:
        raise ValueError(f"state_every must be a multiple of block_size={block_size}, got {every}")
    return States(whole("num_states", num_states, least=0, most=2**20), score, every)


def _nobody(name: str) -> bool:
    return False
