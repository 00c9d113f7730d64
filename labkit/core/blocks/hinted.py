"""An eviction policy that reads sessions: what they said they will do decides which state goes first.

Knows the cache's columns and its sessions. Knows nothing of requests or tiers.
"""

from __future__ import annotations

import heapq

from labkit.core.blocks.prefix import PrefixCache
from labkit.core.shown import Shown

GONE, EXPECTED, PINNED = 0, 1, 2
FOREVER = 2**63
Entry = tuple[int, int, int, int]  # rank, time, order of release, block


class Hinted(Shown):
    """Evicts from the end of the state that goes on the latest, as far as is known.

    First go states of sessions that have finished, and states that a later one of their session replaced; last those
    that are pinned. Between them, the longest time until the next use goes first. Of a session that waits, that is the
    time that is left. Of all others it is the time since the last use, as is the time by which a session is overdue: a
    wrong hint costs for as long as it was wrong. Without sessions this is LRU.

    >>> import labkit as lk
    >>> bm = lk.BlockManager(num_blocks=64, eviction="hinted")
    >>> bm.eviction
    Hinted(0 candidates)
    """

    name = "hinted"

    def __init__(self) -> None:
        self._live: dict[int, tuple[int, int]] = {}  # candidate -> its order of release, and when (ns)
        self._entries: dict[int, Entry] = {}  # of those without a cached child
        self._soonest: list[Entry] = []  # a heap: by rank, the earliest time first
        self._latest: list[tuple[int, int, Entry]] = []  # a heap of those that are expected later than now
        self._pins: list[Entry] = []  # a heap of those that are pinned for a time
        self._num_freed = 0

    def __repr__(self) -> str:
        return f"Hinted({len(self)} candidates)"

    def __len__(self) -> int:
        return len(self._live)

    def attach(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.sessions = cache.sessions

    def freed(self, blocks: list[int]) -> None:
        children, now = self.cache.children, self.cache.now
        for block in blocks:
            self._num_freed += 1
            self._live[block] = self._num_freed, now
            if not children[block]:
                self._push(block)

    def forget(self, blocks: list[int]) -> None:
        for block in blocks:
            del self._live[block]
            self._entries.pop(block, None)

    touched = forget

    def rescore(self, blocks: list[int]) -> None:
        """The sessions of these blocks have changed."""
        for block in blocks:
            if block in self._entries:
                self._push(block)

    def evict(self, n: int) -> list[int]:
        evicted: list[int] = []
        done: set[int] = set()
        gone: dict[int, int] = {}  # block -> children evicted in this call, which the cache still counts
        cache, live, sessions = self.cache, self._live, self.sessions
        while len(evicted) < n:
            block = self._next(gone)
            if block is None:  # the rest have children in use, through a duplicate: evict them anyway
                block = next(iter(live))
            self.forget([block])
            evicted.append(block)
            done.add(block)
            parent = cache.has_parent(block)
            if parent in done:
                parent = 0
            if sessions:
                sessions.climb(block, parent, cache)
            if parent:
                gone[parent] = gone.get(parent, 0) + 1
                if parent in live and cache.children[parent] <= gone[parent]:
                    self._push(parent)
        return evicted

    def _next(self, gone: dict[int, int]) -> int | None:
        """The leaf to evict. Entries that are out of date are dropped or written anew on the way."""
        children, now = self.cache.children, self.cache.now
        while (entry := self._choose(now)) is not None:
            block = entry[3]
            if children[block] > gone.get(block, 0):  # a child was stored behind it
                del self._entries[block]
            elif self._key(block) != entry[:2]:  # several sessions end here, and time has passed
                self._push(block)
            else:
                return block
        return None

    def next_is_worth_less(self, expected: int | None) -> bool:
        """Would a block be evicted now that goes before one which is expected at this time?"""
        now = self.cache.now
        block = self._next({})
        if block is None or expected is None:
            return False
        rank, time = self._entries[block][:2]
        return rank == GONE or (rank == EXPECTED and abs(time - now) > abs(expected - now))

    def _choose(self, now: int) -> Entry | None:
        entries, soonest, latest, pins = self._entries, self._soonest, self._latest, self._pins
        while pins and (pins[0][1] <= now or entries.get(pins[0][3]) is not pins[0]):
            entry = heapq.heappop(pins)
            if entries.get(entry[3]) is entry:
                self._push(entry[3])
        while soonest and entries.get(soonest[0][3]) is not soonest[0]:
            heapq.heappop(soonest)
        while latest and entries.get(latest[0][2][3]) is not latest[0][2]:
            heapq.heappop(latest)
        if not soonest:
            return None
        first = soonest[0]
        if not latest or first[0] == GONE:
            return first
        last = latest[0][2]
        return last if first[0] == PINNED or last[1] - now > now - first[1] else first

    def _push(self, block: int) -> None:
        rank, time = self._key(block)
        order = self._live[block][0]
        entry = self._entries[block] = (rank, time, order, block)
        heapq.heappush(self._soonest, entry)
        if rank == EXPECTED and time > self.cache.now:
            heapq.heappush(self._latest, (-time, order, entry))
        elif rank == PINNED and time < FOREVER:
            heapq.heappush(self._pins, entry)
        if len(self._soonest) + len(self._latest) + len(self._pins) > 4 * len(self._entries) + 64:
            self._rebuild()

    def _rebuild(self) -> None:
        now = self.cache.now
        self._soonest = list(self._entries.values())
        self._latest = [(-e[1], e[2], e) for e in self._soonest if e[0] == EXPECTED and e[1] > now]
        self._pins = [e for e in self._soonest if e[0] == PINNED and e[1] < FOREVER]
        heapq.heapify(self._soonest)
        heapq.heapify(self._latest)
        heapq.heapify(self._pins)

    def _key(self, block: int) -> tuple[int, int]:
        """Rank, and when the block is expected to be used: the nearest time of its sessions, or its last release."""
        sessions, now, released = self.sessions, self.cache.now, self._live[block][1]
        ending = sessions.at.get(block)
        if not ending:
            return (GONE, 0) if block in sessions.superseded else (EXPECTED, released)
        if pins := [s.expected for s in ending if s.is_pinned(now)]:
            return PINNED, max(FOREVER if until is None else until for until in pins)
        times = []
        if not sessions.sees_uses:
            released = min(released, max(session.used for session in ending))
        others = block in sessions.shared
        for session in ending:
            if session.kind != "finished":
                times.append(session.expected or 0)
            others |= released > session.used
        if others or not times:
            if not others:
                return GONE, 0
            times.append(released)
        return EXPECTED, min(times, key=lambda time: abs(time - now))

    def candidates(self) -> list[int]:
        return list(self._live)

    def queues(self) -> dict[str, list[int]]:
        """The ends of states, the next to go first; the blocks before them wait until they are ends."""
        now = self.cache.now
        ranked = sorted(self._entries.values(), key=lambda e: (e[0], -abs(e[1] - now), e[2]))
        return {
            "finished or superseded": [e[3] for e in ranked if e[0] == GONE],
            "longest time to the next use first": [e[3] for e in ranked if e[0] == EXPECTED],
            "pinned": [e[3] for e in ranked if e[0] == PINNED],
        }
