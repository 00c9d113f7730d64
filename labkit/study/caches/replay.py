"""Replays block hashes through one cache with one eviction policy. Knows hashes and the policy's protocol; nothing of
tokens, time or engines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from labkit.core.blocks.eviction import EvictionPolicy
from labkit.core.blocks.sessions import Sessions, Turn


class ReplayCache:
    """What eviction policies read of a prefix cache, over hashes alone: the columns of `PrefixCache`, as lists.

    Block numbers start at 1. There are as many as were ever cached at once.
    """

    def __init__(self, num_blocks: float) -> None:
        self.num_blocks = num_blocks
        self.block_of: dict[int, int] = {}
        self.hits = [0]
        self.depth_of = [0]
        self.children = [0]
        self.stored_at = [0]
        self.next_use = [0.0]
        self.used_at = [0.0]
        self.parent_of = [0]
        self.hashes: list[int | None] = [None]
        self.parent_hashes: list[int | None] = [None]
        self.free: list[int] = []
        self.num_stored = 0
        self.now = 0  # ns
        self.sessions = Sessions()

    def hash_of(self, block: int) -> int | None:
        return self.hashes[block]

    def has_parent(self, block: int) -> int:
        """The cached block right before `block`, or 0 when it is gone."""
        parent = self.parent_of[block]
        return parent if parent and self.hashes[parent] == self.parent_hashes[block] else 0

    def store(self, digest: int, parent: int, depth: int) -> int:
        """The number of a new block behind `parent` (0: none)."""
        if self.free:
            block = self.free.pop()
            self.hashes[block], self.depth_of[block], self.stored_at[block] = digest, depth, self.num_stored
            self.parent_of[block], self.parent_hashes[block] = parent, self.hashes[parent]
        else:
            block = len(self.hashes)
            self.hits.append(0)
            self.children.append(0)
            self.next_use.append(0.0)
            self.used_at.append(0.0)
            self.hashes.append(digest)
            self.depth_of.append(depth)
            self.stored_at.append(self.num_stored)
            self.parent_of.append(parent)
            self.parent_hashes.append(self.hashes[parent])
        self.block_of[digest] = block
        self.children[parent] += 1
        self.num_stored += 1
        return block

    def adopt(self, block: int, parent: int) -> None:
        """`parent` was evicted before this child, and is stored anew."""
        if not self.has_parent(block):
            self.parent_of[block], self.parent_hashes[block] = parent, self.hashes[parent]
            self.children[parent] += 1

    def remove(self, blocks: Sequence[int]) -> None:
        hashes, hits, children = self.hashes, self.hits, self.children
        if self.sessions:
            self.sessions.removed(blocks, [self.has_parent(block) for block in blocks], self)
        for block in blocks:
            if parent := self.has_parent(block):
                children[parent] -= 1
            del self.block_of[hashes[block]]  # type: ignore[arg-type]
            hashes[block] = None
            hits[block] = children[block] = 0
        self.free += blocks


class Replay:
    """One cache of `capacity` blocks under one policy; `add` is a request and returns how many of its blocks hit.

    The blocks before the first miss are hits. Then all blocks of the request are stored at once, its last block the
    least recent, and the policy evicts down to the capacity. It may pick blocks of the request itself, as published
    replays do. With `hold` it may not, as in an engine, where a request needs all its blocks until it ends.

    >>> from labkit.core.blocks.eviction import LRU
    >>> replay = Replay(LRU(), 4)
    >>> [replay.add(hashes) for hashes in ([1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3])]
    [0, 2, 0, 2]
    """

    def __init__(self, policy: EvictionPolicy, capacity: float, *, hold: bool = False) -> None:
        if not (capacity == math.inf or (capacity >= 1 and capacity == int(capacity))):
            raise ValueError(f"a capacity is a whole number of blocks, at least 1, or inf, got {capacity!r}")
        self.policy, self.capacity, self.hold = policy, capacity, hold
        self.cache = ReplayCache(capacity)
        self.num_evicted = 0
        self.idle: list[float] = []  # seconds between last use and eviction, until somebody empties it
        policy.attach(self.cache)  # type: ignore[arg-type]
        self._expired = getattr(policy, "expired", None)
        self._rescore = getattr(policy, "rescore", None)  # it reads sessions

    def __repr__(self) -> str:
        return f"Replay({self.policy!r}: {len(self.cache.block_of)} of {self.capacity:g} blocks cached)"

    def __len__(self) -> int:
        return len(self.cache.block_of)

    def add(
        self, hashes: Sequence[int], now: float = 0.0, next_use: Sequence[float] | None = None, turn: Turn | None = None
    ) -> int:
        """A request with these block hashes at `now` (seconds). Block i is used again at `next_use[i]`. The request is
        a `turn` of a session, which goes on as its hint says, from `now` on: no time passes while it is served."""
        cache, policy = self.cache, self.policy
        cache.now = int(now * 1e9)
        if self._expired is not None and (old := self._expired(cache.now)):
            policy.forget(old)
            self._remove(old, now)
        get, hits = cache.block_of.get, cache.hits
        blocks: list[int] = []
        for digest in hashes:
            block = get(digest)
            if block is None:
                break
            blocks.append(block)
            hits[block] += 1
        num_hit = len(blocks)
        held = blocks
        if cache.sessions.superseded:
            cache.sessions.superseded.difference_update(blocks)
        if turn is not None and self._rescore is not None:
            mine = set(blocks)
            changed = cache.sessions.begin(turn.session, turn.parent, blocks, cache, mine.__contains__, cache.now)
            self._rescore(changed)
        if num_hit < len(hashes):
            rest = hashes[num_hit:]
            found = [get(digest) for digest in rest]
            held = blocks + [block for block in found if block is not None]
            if held:
                policy.touched(held)
            if self.hold:
                self._evict(len(self) + len(hashes) - len(held) - self.capacity, now)
            parent = blocks[-1] if blocks else 0
            for depth, (digest, block) in enumerate(zip(rest, found, strict=True), num_hit):
                if block is None:
                    block = cache.store(digest, parent, depth)
                else:  # cached without its prefix: no hit, but used again
                    cache.adopt(block, parent)
                blocks.append(block)
                parent = block
        else:
            policy.touched(held)
        if next_use is not None:
            column = cache.next_use
            for block, when in zip(blocks, next_use, strict=True):
                column[block] = when
        used_at = cache.used_at
        for block in blocks:
            used_at[block] = now
        if turn is not None and self._rescore is not None:
            self._rescore(cache.sessions.settle(turn.session, turn.parent, blocks[-1:], turn.hint, cache.now))
        policy.freed(blocks[::-1])
        self._evict(len(self) - self.capacity, now)
        return num_hit

    def _evict(self, num: float, now: float) -> None:
        if num > 0:
            self._remove(self.policy.evict(int(num)), now)

    def _remove(self, blocks: list[int], now: float) -> None:
        used_at = self.cache.used_at
        self.idle += [now - used_at[block] for block in blocks]
        self.cache.remove(blocks)
        self.num_evicted += len(blocks)

    def check(self) -> None:
        """Every cached block is a candidate of the policy, and none is cached beyond the capacity."""
        cache = self.cache
        assert len(cache.block_of) <= self.capacity, "more blocks than the capacity"
        assert sorted(self.policy.candidates()) == sorted(cache.block_of.values()), "the policy lost or kept a block"
        assert len(cache.block_of) + len(cache.free) == len(cache.hashes) - 1, "a block is neither cached nor free"
        children = [0] * len(cache.hashes)
        for digest, block in cache.block_of.items():
            assert cache.hashes[block] == digest, f"block {block} is listed under another hash"
            children[cache.has_parent(block)] += 1
        assert children[1:] == cache.children[1:], "the counts of cached children are wrong"
        cache.sessions.check(lambda block: cache.hashes[block] is not None)
