"""Block tables by row, as the scheduler uses them: reference counts, prefix cache, eviction. Independent of requests.

Layers that keep different parts of the context are in different *groups*: `windows[g]` is how many of the last tokens
group g's layers attend to, None for all. A row has one table per group, all of equal length, over one pool; a block
holds the keys and values of one group's layers. Blocks that have left a group's window are released, and their entries
are set to block 0, the scratch block. So are entries at the front where a group keeps fewer keys than others (`kv=`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.eviction import EvictionChoice, EvictionPolicy, eviction_policy
from labkit.core.blocks.full import FullBlocks
from labkit.core.blocks.laws import check
from labkit.core.blocks.prefix import EventSink, Hit, PrefixCache, Span, group_key
from labkit.core.blocks.states import States
from labkit.core.blocks.table import Pin
from labkit.core.blocks.tables import NEVER, BlockPool, BlockTables, Ints, Tokens
from labkit.core.blocks.tiers import HostPool, Offloading
from labkit.core.options import whole


class OutOfBlocksError(RuntimeError):
    """More blocks were requested than are free or evictable. Nothing was changed."""


class RowBlocks:
    """The pool, the tables by row, the prefix cache and the eviction policy, kept consistent."""

    def __init__(
        self, num_blocks: int, block_size: int, num_host_blocks: int, eviction: EvictionChoice, prefix_caching: bool,
        windows: Sequence[int | None],
        offload: tuple[EvictionChoice, int] | None = None,  # host memory's eviction policy, blocks on disk
        states: States | None = None,
    ) -> None:  # fmt: skip
        self.num_blocks, self.block_size = num_blocks, block_size
        self.windows = tuple(None if w is None else whole("a window", w, least=1) for w in windows)
        if not self.windows:
            raise ValueError("windows must have one entry per group of layers (None: full attention), got an empty one")
        self.num_groups = len(self.windows)
        self.pool = BlockPool(num_blocks)
        self.tables = BlockTables(block_size, self.num_groups)
        self.prefix = PrefixCache(num_blocks, block_size, holders=self.pool.count)
        self._eviction = eviction_policy(eviction)
        self._eviction.attach(self.prefix)
        self._ages = hasattr(self._eviction, "expired")
        self.offload: Offloading | None = None
        self.host = BlockPool(num_host_blocks) if offload is None else HostPool(num_host_blocks)
        if isinstance(self.host, HostPool) and offload is not None:
            if self.windows != (None,):
                raise ValueError(
                    f"kv_offloading needs layers that all keep the whole context, windows is {self.windows}: "
                    "leave out hybrid_kv and kv_groups, or kv_offloading"
                )
            self.offload = Offloading(self.prefix, self.host, *offload)
        self.states = states
        self.prefix_caching = prefix_caching
        self.attached = False  # a runner computes these blocks: store only what it computed
        self.pins: list[Pin] = []
        self.now = 0
        self.step = 0
        self.emit: EventSink | None = None
        self.num_queries = self.num_hit_queries = self.num_queried_tokens = self.num_hit_tokens = 0
        self.num_copied = 0
        self.copies: dict[int, dict[int, int]] = {}  # row -> index in its table -> the block that was copied there
        self.num_evicted = 0
        self.released: list[tuple[int, Ints, Ints]] = []  # (group, rows, indices) since the last plan: now scratch
        self._own_rows: set[int] = set()  # rows of tables made by name, not by a scheduler
        self.full = FullBlocks(self.tables, self.prefix, self.windows)
        self._windowed = [(group, window) for group, window in enumerate(self.windows) if window is not None]

    @property
    def num_free(self) -> int:
        return len(self.pool.free)

    @property
    def num_cached(self) -> int:
        return len(self._eviction)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self.pool.free) - len(self._eviction)

    @property
    def available(self) -> int:
        """Blocks that can be allocated without taking them from a holder."""
        return len(self.pool.free) + len(self._eviction)

    @property
    def eviction(self) -> EvictionPolicy:
        return self._eviction

    @eviction.setter
    def eviction(self, choice: EvictionChoice) -> None:
        policy, old = eviction_policy(choice), self._eviction
        if policy is old:
            return
        cached = old.candidates()
        policy.attach(self.prefix)
        if ages := hasattr(policy, "expired"):
            policy.expired(self.now)  # it is told the time before it is given blocks
        policy.freed(cached)
        old.forget(cached)
        self._eviction, self._ages = policy, ages

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def usable_blocks(self, num_hashes_or_tokens: int, spans: Sequence[Span], num_tokens: int) -> int:
        """How many whole blocks a hit may use: at least one token is left to compute, and no atomic span is split."""
        usable = min(num_hashes_or_tokens, max(num_tokens - 1, 0)) // self.block_size
        for span in sorted(spans, key=lambda span: -span.start):
            if span.atomic and span.start < usable * self.block_size < span.end:
                usable = span.start // self.block_size
        return usable

    def hit(
        self, hashes: list[bytes], num_tokens: int, spans: Sequence[Span] = (), windows: Sequence[int | None] = ()
    ) -> Hit:
        """The cached blocks a prompt can start with: the longest prefix for which every group has the blocks in its
        window, and whose state was kept where layers are recurrent. Changes nothing."""
        windows = windows or self.windows
        usable = max(num_tokens - 1, 0) // self.block_size
        if windows == (None,) and self.states is None:
            found = self.prefix.find(hashes[:usable])
            if spans:
                found = found[: self.usable_blocks(len(found) * self.block_size, spans, num_tokens)]
            return Hit(len(found), [found])
        if spans:
            usable = self.usable_blocks(num_tokens, spans, num_tokens)
        get = self.prefix.block_of.get
        stored = [[get(group_key(digest, group), 0) for digest in hashes[:usable]] for group in range(len(windows))]
        for end in range(min(usable, len(hashes)), 0, -1):
            if self.states is not None and hashes[end - 1] not in self.states.kept:
                continue
            first = [0 if window is None else max(0, end - self.blocks_for(window)) for window in windows]
            if (not spans or self.usable_blocks(end * self.block_size, spans, num_tokens) == end) and all(
                all(blocks[begin:end]) for blocks, begin in zip(stored, first, strict=True)
            ):
                return Hit(end, [[0] * begin + blocks[begin:end] for blocks, begin in zip(stored, first, strict=True)])
        return Hit(0, [[] for _ in windows])

    def below(
        self, hashes: list[bytes], hit: Hit, spans: Sequence[Span], num_tokens: int
    ) -> tuple[list[int | None], int]:
        """Where the prefix goes on below the device: host blocks, None for those that are not in host memory, and how
        many those are. Changes nothing."""
        if self.offload is None or hit.num_blocks >= len(hashes):
            return [], 0
        first = hit.num_blocks
        places, num_below = self.offload.find(hashes[first : max(num_tokens - 1, 0) // self.block_size])
        if spans and places:
            end = self.usable_blocks((first + len(places)) * self.block_size, spans, num_tokens)
            places = places[: max(end - first, 0)]
            num_below = places.count(None)
        return places, num_below

    def num_revived(self, blocks: list[int]) -> int:
        """How many of these blocks have no holder. Taking them reduces `available` by that number."""
        return int((self.pool.count[[block for block in blocks if block]] == 0).sum()) if blocks else 0

    def most_blocks(self, num_tokens: int, chunk: int, num_hit: int = 0) -> int:
        """The most blocks a row needs to compute `num_tokens` tokens in chunks of at most `chunk`, besides the first
        `num_hit` blocks of each group. A windowed group releases blocks that have left its window."""
        whole_row = self.blocks_for(num_tokens) - num_hit
        if not self._windowed:
            return whole_row * self.num_groups
        within = sum(min(whole_row, self._most_within(window, chunk)) for _, window in self._windowed)
        return whole_row * (self.num_groups - len(self._windowed)) + within

    def most_tokens(self, chunk: int) -> int:
        """The longest row that the whole pool can hold."""
        full = self.num_groups - len(self._windowed)
        within = sum(self._most_within(window, chunk) for _, window in self._windowed)
        blocks = self.num_blocks // self.num_groups
        if self._windowed and full:
            blocks = max(blocks, (self.num_blocks - within) // full)
        elif self._windowed and within <= self.num_blocks:
            blocks = self.num_blocks
        return blocks * self.block_size

    def _most_within(self, window: int, chunk: int) -> int:
        """Blocks that hold a window and a chunk, wherever they begin."""
        return self.blocks_for(window + chunk) + 1

    def count_query(self, num_tokens: int, num_hit_blocks: int) -> None:
        self.num_queries += 1
        self.num_hit_queries += num_hit_blocks > 0
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += num_hit_blocks * self.block_size

    def open(
        self, name: str, root: bytes, hashes: list[bytes] | None, keys: dict[int, bytes], row: int | None = None
    ) -> int:
        """A row for `name`, empty."""
        own = row is None
        row = self.tables.open(name, row)
        if own:
            self._own_rows.add(row)
        self.tables.last_hash[row] = root
        self.tables.hashes[row] = hashes
        if keys:
            self.tables.span_keys[row] = keys
        stores = self.prefix_caching and not (own and self.attached)
        self.tables.next_full[row] = self.block_size if stores else NEVER
        return row

    def join(self, row: int, tokens: Tokens, hit: Hit) -> None:
        """Fill a fresh row with known tokens and the blocks that were hit."""
        tables = self.tables
        tables.write_tokens(row, 0, tokens)
        if hit.num_blocks:
            held = hit.held
            self.hold(held)
            self.prefix.hits[held] += 1
            if self.prefix.sessions:
                self.prefix.sessions.superseded.difference_update(held)
            tables.append(row, hit.blocks)
            tables.num_computed[row] = hit.num_blocks * self.block_size
            if tables.next_full[row] != NEVER:
                tables.next_full[row] = (hit.num_blocks + 1) * self.block_size
            tables.last_hash[row] = self.prefix.hash_of(hit.blocks[0][-1])
            for group, _ in self._windowed:
                tables.front[group, row] = hit.blocks[group].count(0)

    def hold(self, blocks: list[int]) -> None:
        """Increase reference counts. Blocks that were only cached are no longer candidates for eviction."""
        at = np.array(blocks, np.int64)
        at = at[at > 0]
        if not len(at):
            return
        idle = self.pool.count[at] == 0
        if idle.any():
            self._eviction.touched(at[idle].tolist())
        self.pool.count[at] += 1

    def release(self, blocks: list[int]) -> None:
        """Decrease reference counts, the end of a chain first. Of the blocks without a holder, cached ones become
        candidates for eviction, and the others are the next to be reused."""
        if not blocks:
            return
        at = np.array(blocks[::-1], np.int64)
        gone = self.pool.release(at[at > 0])
        stored = self.prefix.stored[gone]
        self.pool.free += gone[~stored].tolist()
        if stored.any():
            self._eviction.freed(gone[stored].tolist())

    def take(self, n: int, names: str | Sequence[str | None] | None = None) -> list[int]:
        """`n` empty blocks with a reference count of one, evicting as needed. `names` says for which request, once or
        for each."""
        pool = self.pool
        short = n - len(pool.free)
        if short > 0:
            evicted = self._evict(short, names, n)
            blocks = pool.take(n - short) + evicted
        else:
            blocks = pool.take(n)
        if n <= 8:
            for block in blocks:
                pool.count[block] = 1
        else:
            pool.count[blocks] = 1
        return blocks

    def _evict(self, n: int, names: str | Sequence[str | None] | None, wanted: int) -> list[int]:
        if n > len(self._eviction):
            raise OutOfBlocksError(f"{wanted} blocks wanted, {self.available} available")
        evicted = self._eviction.evict(n)
        if self.offload is not None and self.attached:  # else nobody moves their contents
            self.offload.evicted(evicted)
        each = [names] * n if names is None or isinstance(names, str) else names[wanted - n :]
        self.prefix.remove(evicted, self.step, each)
        self.num_evicted += n
        return evicted

    def grow(self, row: int, num_tokens: int, name: str | None = None) -> list[list[int]]:
        """Blocks for a row's first `num_tokens` tokens; the new ones of each group."""
        more = self.blocks_for(num_tokens - int(self.tables.room[row]))
        if more <= 0:
            return []
        taken = self.take(more * self.num_groups, name)
        blocks = [taken[at : at + more] for at in range(0, len(taken), more)]
        self.tables.append(row, blocks)
        return blocks

    def shrink(self, row: int, num_tokens: int) -> None:
        """Release the blocks that a row's first `num_tokens` tokens do not need."""
        tables, keep = self.tables, self.blocks_for(num_tokens)
        gone = tables.blocks[:, row, keep : tables.num_blocks[row]]
        if gone.size:
            self.release(gone.reshape(-1).tolist())
            gone[:] = 0
            tables.num_blocks[row], tables.room[row] = keep, keep * self.block_size

    def compact(self, row: int, num_keys: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Ints, ...]:
        """Each group keeps `keep` of its `num_keys` keys, and the blocks for them; the others are released. The row has
        shared no block and stores none from here on. Gives each group's blocks so far."""
        tables = self.tables
        begin = tables.front[:, row].tolist()
        blocks = tuple(
            tables.blocks[group, row, first : first + self.blocks_for(num)].astype(np.int64)
            for group, (first, num) in enumerate(zip(begin, num_keys, strict=True))
        )
        tables.next_full[row] = NEVER
        self.release(self.tables.compact(row, num_keys, keep))
        return blocks

    def put_back(self, row: int, present: NDArray[np.bool_], name: str | None = None) -> Ints:
        """More blocks for a row where `present` [groups, blocks] is true, scratch elsewhere."""
        blocks = np.zeros(present.shape, np.int64)
        blocks[present] = self.take(int(present.sum()), name)
        self.tables.append(row, blocks.astype(np.int32))
        for group, there in enumerate(present):
            if not there.all():
                self.leave_window(group, row, int(self.tables.num_blocks[row]) - int(there.sum()))
        return blocks

    def must_copy(self, row: int, start: int) -> bool:
        """Whether a write at token `start` would touch a block that has other holders, or that another holder
        stored."""
        if row not in self.tables.shared:
            return False
        index = start // self.block_size
        if index >= self.tables.num_blocks[row]:
            return False
        block = self.tables.blocks[0, row, index]
        return bool(self.pool.count[block] > 1 or self.prefix.stored[block])

    def copy_on_write(self, row: int, start: int) -> tuple[int, list[tuple[int, int]]]:
        """Give the row its own copy of the blocks that token `start` is written to. Returns their index in its tables,
        and (source, copy) for each group."""
        index = start // self.block_size
        column = self.tables.blocks[:, row, index]
        sources = column.tolist()
        copies = self.take(self.num_groups)
        column[:] = copies
        self.release(sources)
        self.tables.shared.discard(row)
        self.num_copied += self.num_groups
        self.copies.setdefault(row, {})[index] = sources[0]
        pairs = list(zip(sources, copies, strict=True))
        if self.emit is not None:
            for source, copy in pairs:
                self.emit(("Copied", source, copy))
        return index, pairs

    def fork_row(self, row: int, name: str, to: int | None = None) -> int:
        """A row over the same blocks and tokens."""
        tables = self.tables
        other = self.open(name, b"", None, {}, to)
        blocks = tables.blocks[:, row, : self.blocks_for(int(tables.num_tokens[row]))]
        self.hold(blocks.reshape(-1).tolist())
        tables.append(other, blocks.copy())
        tables.front[:, other] = tables.front[:, row]
        tables.write_tokens(other, 0, tables.row_tokens(row).copy())
        tables.num_computed[other] = tables.num_computed[row]
        if tables.next_full[other] != NEVER:
            next_full = int(tables.next_full[row])
            tables.next_full[other] = next_full
            tables.last_hash[other] = tables.last_hash[row]
            tables.hashes[other] = tables.hashes[row]
            if row in tables.span_keys:
                tables.span_keys[other] = tables.span_keys[row]
        if tables.num_tokens[row] % self.block_size or tables.num_computed[row] % self.block_size:
            tables.shared |= {row, other}
        return other

    def close(self, name: str, *, reserved: bool = False) -> None:
        """Release a table and its row."""
        row = self.tables.row_of[name]
        self.release(self.tables.held(row))
        self.copies.pop(row, None)
        self.tables.close(name, reserved=reserved)

    def commit(self, rows: Ints, end: Ints) -> None:
        """These rows are computed up to `end`: store their full blocks in the prefix cache."""
        tables = self.tables
        tables.num_computed[rows] = end
        full = (end >= tables.next_full[rows]).nonzero()[0]
        if len(full):
            self.full.store(rows[full], end[full])
        for group, window in self._windowed:
            first = np.maximum(end - window + 1, 0) // self.block_size  # the first block that later queries read
            for i in (first > tables.front[group, rows]).nonzero()[0].tolist():
                self.leave_window(group, int(rows[i]), int(first[i]))

    def leave_window(self, group: int, row: int, first: int) -> None:
        """Release the blocks of a row's table before index `first`, and put scratch in their place."""
        tables = self.tables
        index = np.arange(tables.front[group, row], first)
        gone = tables.blocks[group, row, index]
        self.release(gone.tolist())
        tables.blocks[group, row, index] = 0
        tables.front[group, row] = first
        self.released.append((group, np.full(len(index), row), index))

    def release_pins(self) -> bool:
        """Release the oldest pin; returns whether there was one."""
        if not self.pins:
            return False
        self.release(list(self.pins.pop(0).blocks))
        return True

    def tick(self, now: int) -> None:
        """Advance the time to `now` (ns): drop expired pins and blocks."""
        self.now = self.prefix.now = now
        if self.offload is not None:
            self.offload.step = self.step
            self.offload.tick(now)
        if self._ages and (old := self._eviction.expired(now)):  # type: ignore[attr-defined]
            self._eviction.forget(old)
            self.prefix.remove(old, self.step, [None] * len(old))
            self.pool.free += old
        if self.pins:
            over = [pin for pin in self.pins if pin.expires is not None and pin.expires <= now]
            self.pins = [pin for pin in self.pins if all(pin is not other for other in over)]
            for pin in over:
                self.release(list(pin.blocks))  # last: they were in use until now

    def attach(self) -> None:
        """A runner computes these blocks from here on. It has no keys and values of blocks stored before, so these are
        forgotten, and tables created by name are never stored."""
        self.clear_prefixes()
        self.tables.next_full[list(self._own_rows)] = NEVER
        self.attached = True

    def clear_prefixes(self, on_disk: bool = True) -> None:
        """Forget every hash, in all tiers. Blocks in use stay in use, and chains that have begun are never stored. With
        on_disk=False the files are kept."""
        cached = self._eviction.candidates()
        self._eviction.forget(cached)
        self.prefix.clear()
        if self.offload is not None:
            self.offload.clear(self.prefix.emit, on_disk)
        if self.states is not None:
            self.states.clear()
        self.pool.free += cached
        self.tables.next_full[self.tables.num_computed > 0] = NEVER

    def check(self) -> None:
        check(self)
