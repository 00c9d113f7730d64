"""The only door between the scheduler and blocks, prefix cache and eviction. Refuses to know requests and time's unit.

Two kinds of callers come through it with the same machinery: people in a cell (`allocate`, `append`, `fork`, `free`, by
name) and the scheduler (rows and vectors of rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

import numpy as np

from labkit.core.blocks.eviction import EvictionChoice, EvictionPolicy, eviction_policy
from labkit.core.blocks.prefix import (
    EventSink,
    Explanation,
    Lookup,
    PrefixCache,
    Span,
    hash_blocks,
    root_hash,
    span_keys,
)
from labkit.core.blocks.stats import BlockStats, block_stats
from labkit.core.blocks.table import BlockTable, Pin
from labkit.core.blocks.tables import NEVER, BlockPool, BlockTables, Ints, Tokens
from labkit.core.options import duration, flag, named_arguments, named_options, text, whole
from labkit.core.shown import Shown
from labkit.core.tokens import TokenIds, as_tokens


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free or evictable. Nothing was changed."""


@named_options
class BlockManager(Shown):
    """Fixed-size blocks, handed out to tables, shared by reference count, copied when written, found again by prefix.

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
    ) -> None:
        self.num_blocks = whole("num_blocks", num_blocks, least=1, most=2**31 - 2)
        self.block_size = whole("block_size", block_size, least=1, most=2**20)
        self.pool = BlockPool(num_blocks)
        self.host = BlockPool(whole("num_host_blocks", num_host_blocks, least=0, most=2**31 - 2))
        self.tables = BlockTables(block_size)
        self.prefix = PrefixCache(num_blocks, block_size, holders=self.pool.count)
        self.prefix_caching = flag("prefix_caching", prefix_caching)
        self._eviction = eviction_policy(eviction)
        self._eviction.attach(self.prefix)
        self.pins: list[Pin] = []
        self.now = 0
        self.step = 0
        self.attached = False  # a runner computes these blocks: nothing may be stored that it did not compute
        self.taken: Callable[[str], bool] = _nobody  # is this name a request's?
        self.emit: EventSink | None = None
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_queries = 0
        self.num_hit_queries = 0
        self.num_copied = 0
        self.copies: dict[int, dict[int, int]] = {}  # row -> index in its table -> the block that was copied there
        self.num_evicted = 0
        self._within = np.arange(self.block_size)
        self._own_rows: set[int] = set()  # rows of tables that people made

    def __repr__(self) -> str:
        return (
            f"BlockManager({self.num_blocks}x{self.block_size}: "
            f"used {self.num_used}, cached {self.num_cached}, free {self.num_free})"
        )

    # -- what there is -------------------------------------------------------------------------------------------

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
        """Blocks that can be had without taking them from anyone."""
        return len(self.pool.free) + len(self._eviction)

    def row(self, name: str) -> int:
        if name not in self.tables.row_of:
            known = ", ".join(map(repr, list(self.tables.row_of)[:8])) or "none"
            raise ValueError(f"there is no table {name!r}; tables: {known}")
        return self.tables.row_of[name]

    def table(self, name: str) -> BlockTable:
        self.row(name)
        return BlockTable(self, name)

    def stats(self) -> BlockStats:
        return block_stats(self)

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
        _tell_time(policy, self.now)
        policy.freed(cached)
        old.forget(cached)
        self._eviction = policy

    # -- people's door: tables by name ---------------------------------------------------------------------------

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
        hit = self.hit(hashes, len(ids), spans, window) if self.prefix_caching else []
        self._check_fits(name, self.blocks_for(len(ids)) - len(hit), hit)
        row = self.open(name, root, hashes, keys)
        if self.prefix_caching and len(ids):
            self.count_query(len(ids), len(hit))
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
        self._check_fits(name, self.blocks_for(have + len(ids)) - int(self.tables.num_blocks[row]) + copy, [])
        if copy and len(ids):
            self.copy_on_write(row, have)
        self.grow(row, have + len(ids), name)
        self.tables.write_tokens(row, have, ids)
        self._commit_named(row)
        return BlockTable(self, name)

    def fork(self, source: str, name: str) -> BlockTable:
        """A second table over the same blocks, the partial last one included."""
        row = self.row(source)
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
        hit: list[int] = []
        if self.prefix_caching:
            hashes = hash_blocks(
                ids, self.block_size, root_hash(salt, adapter), span_keys(spans, self.block_size, len(ids))
            )
            hit = self.hit(hashes, len(ids), spans, window)
        return Lookup(len(ids), len(hit) * self.block_size, tuple(hit))

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
        return self.prefix.explain(ids, usable, salt, adapter, spans)

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
        blocks = self.prefix.find(hash_blocks(ids, self.block_size, root_hash(salt, adapter)))
        self.hold(blocks)
        pin = Pin(tuple(blocks), len(blocks) * self.block_size, expires)
        self.pins.append(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        at = next((i for i, mine in enumerate(self.pins) if mine is pin), None)
        if at is None:
            raise ValueError(f"{pin!r} is not held here: it was released, or expired")
        del self.pins[at]
        self.release(list(pin.blocks))

    def reset(self) -> None:
        """Forget every cached prefix. Refused while blocks are in use, as their prefixes are being shared."""
        if self.num_used:
            raise RuntimeError(f"{self.num_used} blocks are in use: free their tables and pins first")
        self.clear_prefixes()

    # -- the scheduler's door: rows ------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def usable_blocks(self, num_hashes_or_tokens: int, spans: Sequence[Span], num_tokens: int) -> int:
        """How many whole blocks a hit may use: one token is left to compute, and no span is split."""
        usable = min(num_hashes_or_tokens, max(num_tokens - 1, 0)) // self.block_size
        for span in sorted(spans, key=lambda span: -span.start):
            if span.start < usable * self.block_size < span.end:
                usable = span.start // self.block_size
        return usable

    def hit(
        self, hashes: list[bytes], num_tokens: int, spans: Sequence[Span] = (), window: int | None = None
    ) -> list[int]:
        """The cached blocks a prompt may start with. Changes nothing."""
        usable = max(num_tokens - 1, 0) // self.block_size
        if window is not None:
            return self._hit_window(hashes[: self.usable_blocks(num_tokens, spans, num_tokens)], window)
        found = self.prefix.find(hashes[:usable])
        if spans:
            found = found[: self.usable_blocks(len(found) * self.block_size, spans, num_tokens)]
        return found

    def _hit_window(self, hashes: list[bytes], window: int) -> list[int]:
        """The longest prefix whose last `window` tokens are cached, scratch in place of the blocks before them."""
        reach = self.blocks_for(whole("window", window, least=1))
        found = [self.prefix.block_of.get(digest, 0) for digest in hashes]
        for end in range(len(found), 0, -1):
            first = max(0, end - reach)
            if all(found[first:end]):
                return [0] * first + found[first:end]
        return []

    def release_front(self, name: str, num_tokens: int) -> None:
        """The first `num_tokens` tokens of a table have left the attention window: release the blocks that hold only
        such tokens. Their entries name the scratch block."""
        row = self.row(name)
        if row not in self._own_rows:
            raise ValueError(f"table {name!r} belongs to a running request: only a step releases its blocks")
        table = self.tables.blocks[0, row]
        most = int(self.tables.num_computed[row])
        gone = table[: whole("num_tokens", num_tokens, least=0, most=most) // self.block_size]
        self.release(gone.tolist())
        gone[:] = 0

    def num_revived(self, hit: list[int]) -> int:
        """How many of these blocks nobody holds: taking them makes that many fewer available."""
        return int((self.pool.count[[block for block in hit if block]] == 0).sum()) if hit else 0

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

    def join(self, row: int, tokens: Tokens, hit: list[int]) -> None:
        """Fill a fresh row with known tokens and the blocks that were hit."""
        tables = self.tables
        tables.write_tokens(row, 0, tokens)
        if hit:
            self.hold(hit)
            self.prefix.hits[hit] += 1
            tables.append(row, hit)
            tables.num_computed[row] = len(hit) * self.block_size
            if tables.next_full[row] != NEVER:
                tables.next_full[row] = (len(hit) + 1) * self.block_size
            tables.last_hash[row] = self.prefix.hash_of(hit[-1])

    def hold(self, blocks: list[int]) -> None:
        """Count blocks up; those that were only cached are no longer up for eviction."""
        at = np.array(blocks, np.int64)
        at = at[at > 0]
        if not len(at):
            return
        idle = self.pool.count[at] == 0
        if idle.any():
            self._eviction.touched(at[idle].tolist())
        self.pool.count[at] += 1

    def release(self, blocks: list[int]) -> None:
        """Count blocks down, the last of a chain first. Whoever is free then: cached ones wait in line to be evicted,
        the others are the next to be reused."""
        if not blocks:
            return
        at = np.array(blocks[::-1], np.int64)
        gone = self.pool.release(at[at > 0])
        stored = self.prefix.stored[gone]
        self.pool.free += gone[~stored].tolist()
        if stored.any():
            self._eviction.freed(gone[stored].tolist())

    def take(self, n: int, names: str | Sequence[str | None] | None = None) -> list[int]:
        """`n` empty blocks, counted once each, evicting what must go. `names` says for whom, once or for each."""
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
        each = [names] * n if names is None or isinstance(names, str) else names[wanted - n :]
        self.prefix.remove(evicted, self.step, each)
        self.num_evicted += n
        return evicted

    def grow(self, row: int, num_tokens: int, name: str | None = None) -> list[int]:
        """Blocks for a row's first `num_tokens` tokens; the new ones."""
        more = self.blocks_for(num_tokens) - int(self.tables.num_blocks[row])
        if more <= 0:
            return []
        blocks = self.take(more, name)
        self.tables.append(row, blocks)
        return blocks

    def must_copy(self, row: int, start: int) -> bool:
        """Would writing at token `start` touch a block that others hold too, or that was stored by one who did?"""
        if row not in self.tables.shared:
            return False
        index = start // self.block_size
        if index >= self.tables.num_blocks[row]:
            return False
        block = self.tables.blocks[0, row, index]
        return bool(self.pool.count[block] > 1 or self.prefix.stored[block])

    def copy_on_write(self, row: int, start: int) -> tuple[int, int, int]:
        """Give the row its own copy of the block that token `start` is written to: (index, source, copy)."""
        index = start // self.block_size
        source = int(self.tables.blocks[0, row, index])
        (copy,) = self.take(1)
        self.tables.blocks[0, row, index] = copy
        self.release([source])
        self.tables.shared.discard(row)
        self.num_copied += 1
        self.copies.setdefault(row, {})[index] = source
        if self.emit is not None:
            self.emit(("Copied", source, copy))
        return index, source, copy

    def fork_row(self, row: int, name: str, to: int | None = None) -> int:
        """A row over the same blocks and tokens."""
        tables = self.tables
        other = self.open(name, b"", None, {}, to)
        blocks = tables.row_blocks(row)[: self.blocks_for(int(tables.num_tokens[row]))]
        self.hold(blocks)
        tables.append(other, blocks)
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
        self.release(self.tables.row_blocks(row))
        self.copies.pop(row, None)
        self.tables.close(name, reserved=reserved)

    def commit(self, rows: Ints, end: Ints) -> None:
        """These rows are computed up to `end`: full blocks become hit-able."""
        tables = self.tables
        tables.num_computed[rows] = end
        full = (end >= tables.next_full[rows]).nonzero()[0]
        if 0 < len(full) <= 8:
            for row, stop in zip(rows[full].tolist(), end[full].tolist(), strict=True):
                self._store_row(row, stop)
        elif len(full):
            self._store(rows[full], end[full])

    def _store(self, rows: Ints, end: Ints) -> None:
        """Hash and store the blocks completed by computing `rows` up to `end`: one each for decode rows, gathered
        together; a run of them for a prefill, row by row."""
        tables, size = self.tables, self.block_size
        first = tables.next_full[rows] - size
        apart = end - first >= 2 * size
        if tables.span_keys:
            apart |= np.isin(rows, list(tables.span_keys))
        if apart.any():
            for i in apart.nonzero()[0].tolist():
                self._store_run(int(rows[i]), int(first[i]) // size, int(end[i]) // size)
            rows, first = rows[~apart], first[~apart]
            if not len(rows):
                return
        tokens = tables.flat_tokens[(tables.token_base[rows] + first)[:, None] + self._within]  # [rows, block_size]
        data = tokens.tobytes()
        depths = first // size
        at = tables.block_base[rows] + depths
        parents = np.where(depths > 0, tables.flat_blocks[at - 1], 0)
        tables.next_full[rows] = first + 2 * size
        last_hash, known = tables.last_hash, tables.hashes
        before, digests = [], []
        width, begin = 4 * size, 0
        for row, depth in zip(rows.tolist(), depths.tolist(), strict=True):
            digest = last_hash[row]
            before.append(digest)
            hashes = known[row]
            if hashes is not None and depth < len(hashes):
                digest = hashes[depth]
            else:
                digest = sha256(digest + data[begin : begin + width]).digest()
            begin += width
            digests.append(digest)
            last_hash[row] = digest
        self.prefix.store(tables.flat_blocks[at].tolist(), digests, before, parents, depths, tokens)

    def _store_row(self, row: int, stop: int) -> None:
        """What `_store` does, for one row: with few at a border, scalars are cheaper than vectors."""
        tables, size = self.tables, self.block_size
        first = int(tables.next_full[row]) - size
        depth = first // size
        if stop - first >= 2 * size or row in tables.span_keys:
            return self._store_run(row, depth, stop // size)
        tokens = tables.tokens[row, first : first + size]
        before, hashes = tables.last_hash[row], tables.hashes[row]
        if hashes is not None and depth < len(hashes):
            digest = hashes[depth]
        else:
            tables.hashes[row] = None
            digest = sha256(before + tokens.tobytes()).digest()
        tables.last_hash[row] = digest
        tables.next_full[row] = first + 2 * size
        table = tables.blocks[0, row]
        parent = int(table[depth - 1]) if depth else 0
        self.prefix.store_one(int(table[depth]), digest, before, parent, depth, tokens)

    def _store_run(self, row: int, first: int, stop: int) -> None:
        """Blocks `first..stop-1` of one row."""
        tables, size = self.tables, self.block_size
        tokens = tables.tokens[row, first * size : stop * size]
        before = [tables.last_hash[row]]
        known = tables.hashes[row] or []
        digests = known[first:stop]
        if len(digests) < stop - first:
            keys = tables.span_keys.get(row, {})
            done = first + len(digests)
            parent = digests[-1] if digests else before[0]
            digests = digests + hash_blocks(tokens[(done - first) * size :], size, parent, keys, done)
        table = tables.blocks[0, row]
        parents = table[first - 1 : stop - 1] if first else np.concatenate((table[:1] * 0, table[: stop - 1]))
        tables.last_hash[row] = digests[-1]
        tables.next_full[row] = (stop + 1) * size
        depths = np.arange(first, stop)
        blocks = table[first:stop].tolist()
        self.prefix.store(blocks, digests, before + digests[:-1], parents, depths, tokens.reshape(-1, size).copy())

    def release_pins(self) -> bool:
        """Let go of the oldest pin; whether there was one."""
        if not self.pins:
            return False
        self.unpin(self.pins[0])
        return True

    def tick(self, now: int) -> None:
        """Time has come to `now` (ns): expired pins and blocks go."""
        self.now = now
        expired = getattr(self._eviction, "expired", None)
        if expired is not None and (old := expired(now)):
            self._eviction.forget(old)
            self.prefix.remove(old, self.step, [None] * len(old))
            self.pool.free += old
        for pin in [pin for pin in self.pins if pin.expires is not None and pin.expires <= now]:
            self.unpin(pin)  # last: its blocks were in use until now

    def attach(self) -> None:
        """A runner computes these blocks from now on. What was stored before is in no runner's memory, and tables that
        people made are never stored."""
        self.clear_prefixes()
        self.tables.next_full[list(self._own_rows)] = NEVER
        self.attached = True

    def clear_prefixes(self) -> None:
        """Forget every hash; blocks in use stay in use, and chains that have begun are never stored again."""
        cached = self._eviction.candidates()
        self._eviction.forget(cached)
        self.prefix.clear()
        self.pool.free += cached
        self.tables.next_full[self.tables.num_computed > 0] = NEVER

    # -- laws ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """free + cached + used == total; every count is its tables plus its pins; no block is in two places."""
        tables, pool = self.tables, self.pool
        counted = np.zeros(self.num_blocks + 1, np.int64)
        for row in tables.row_of.values():
            table = tables.row_blocks(row)
            blocks = [block for block in table if block]
            assert len(set(blocks)) == len(blocks), f"row {row} names a block twice"
            np.add.at(counted, blocks, 1)
            assert tables.room[row] == len(table) * self.block_size, f"row {row}: room and blocks disagree"
            assert tables.num_computed[row] <= tables.num_tokens[row], f"row {row}: more computed than known"
            assert tables.num_computed[row] <= tables.room[row], f"row {row}: more computed than there is room for"
        for pin in self.pins:
            np.add.at(counted, list(pin.blocks), 1)
        assert (counted == pool.count).all(), f"counts are wrong: {np.flatnonzero(counted != pool.count)[:8]}"
        candidates = self._eviction.candidates()
        assert len(candidates) == len(self._eviction), "the eviction policy miscounts its candidates"
        places = np.concatenate((np.flatnonzero(counted), np.array(pool.free + candidates, np.int64)))
        assert len(places) == self.num_blocks and len(np.unique(places)) == self.num_blocks, "a block is lost or twice"
        assert self.prefix.stored[candidates].all(), "a candidate for eviction holds nothing"
        assert not self.prefix.stored[pool.free].any(), "a free block still has a hash"
        self.prefix.check()
        host = self.host
        assert int((host.count > 0).sum()) + len(host.free) == host.num_blocks, "a host block is lost"

    # -- helpers of people's door --------------------------------------------------------------------------------

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


def _nobody(name: str) -> bool:
    return False


def _tell_time(policy: EvictionPolicy, now: int) -> None:
    """Policies that reckon with time are told before they are given blocks."""
    if (expired := getattr(policy, "expired", None)) is not None:
        expired(now)
