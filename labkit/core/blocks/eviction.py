"""Eviction policies: which cached block is evicted when an empty one is needed.

A policy is told when a block becomes evictable (`freed`), is hit (`touched`) or is no longer cached (`forget`), and
answers `evict(n)`. Its candidates are cached blocks with no holder. Every policy keeps a block while a cached block
chains to it, because a continuation cannot be found without its prefix.
"""

from __future__ import annotations

import heapq
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from labkit.core.blocks.hinted import Hinted
from labkit.core.blocks.prefix import PrefixCache
from labkit.core.blocks.queues import S3FIFO, SLRU
from labkit.core.blocks.sessions import SessionInfo
from labkit.core.options import choose, duration, named_options, real
from labkit.core.shown import Shown

DEPTH_HALF = 128.0  # blocks


@dataclass(frozen=True)
class BlockInfo:
    """What a scoring function may read. `stored_at` counts stores, `freed_at` releases; `now` is in seconds.

    `sessions` are those with a state that ends in this block; a block before an end needs no score of its own, because
    it stays for as long as its end does. A block is `superseded` if a later state of its session replaced it and nobody
    else needs it.
    """

    block: int
    depth: int
    hits: int
    children: int
    stored_at: int
    freed_at: int
    now: float = 0.0
    sessions: tuple[SessionInfo, ...] = ()
    superseded: bool = False

    @property
    def cost(self) -> float:
        """Of computing the block again, where 1 is that of a first block: its own tokens, and attention over all before
        it, which is the larger part beyond 128 blocks."""
        return 1.0 + self.depth / DEPTH_HALF


@runtime_checkable
class EvictionPolicy(Protocol):
    name: str

    def attach(self, cache: PrefixCache) -> None: ...
    def freed(self, blocks: list[int]) -> None: ...
    def touched(self, blocks: list[int]) -> None: ...
    def forget(self, blocks: list[int]) -> None: ...
    def evict(self, n: int) -> list[int]: ...
    def candidates(self) -> list[int]: ...
    def __len__(self) -> int: ...


EvictionChoice: TypeAlias = "str | EvictionPolicy | Callable[[BlockInfo], float]"


class LRU(Shown):
    """Least recently released first; O(1). A table releases its last block first, so chains are evicted from the
    end."""

    name = "lru"

    def __init__(self) -> None:
        self._queue: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} candidates)"

    def __len__(self) -> int:
        return len(self._queue)

    def attach(self, cache: PrefixCache) -> None:
        pass

    def freed(self, blocks: list[int]) -> None:
        queue = self._queue
        for block in blocks:
            queue[block] = None

    def forget(self, blocks: list[int]) -> None:
        queue = self._queue
        for block in blocks:
            del queue[block]

    touched = forget

    def evict(self, n: int) -> list[int]:
        pop = self._queue.popitem
        return [pop(last=False)[0] for _ in range(n)]

    def candidates(self) -> list[int]:
        return list(self._queue)

    def queues(self) -> dict[str, list[int]]:
        """What waits where, the next to go first."""
        return {"least recently released first": list(self._queue)}


class Scored(Shown):
    """Lowest score first, among blocks without a cached child; a heap with lazy deletion, O(log n).

    The score is computed once, when the block becomes evictable; ties go by release order. A block that is popped while
    a child is cached is set aside until the child is gone.
    """

    name = "scored"

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []
        self._live: dict[int, tuple[float, int, int]] = {}
        self._parked: dict[int, tuple[float, int, int]] = {}
        self._num_freed = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} candidates)"

    def __len__(self) -> int:
        return len(self._live)

    def attach(self, cache: PrefixCache) -> None:
        self.cache = cache

    def key(self, block: int) -> float:
        raise NotImplementedError

    def safe_key(self, block: int) -> float:
        """The key; of a scoring function that fails, a warning and the lowest: cached blocks can always be computed
        again, and a step half done cannot be undone."""
        try:
            key = float(self.key(block))
            if key == key:
                return key
            raise ValueError("the score is nan")
        except Exception as error:  # a user's function may raise anything
            warnings.warn(f"eviction policy {self.name!r} failed on block {block}: {error!r}", stacklevel=2)
            return float("-inf")

    def freed(self, blocks: list[int]) -> None:
        for block in blocks:
            self._num_freed += 1
            entry = (self.safe_key(block), self._num_freed, block)
            self._live[block] = entry
            heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._parked.clear()
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def order_of(self, block: int) -> int:
        """Its place in the order of releases."""
        return self._live[block][1] if block in self._live else self._num_freed

    def rescore(self, blocks: list[int]) -> None:
        """The sessions of these blocks have changed."""
        for block in blocks:
            if (old := self._live.get(block)) is not None:
                self._parked.pop(block, None)
                entry = self._live[block] = (self.safe_key(block), old[1], block)
                heapq.heappush(self._heap, entry)

    def forget(self, blocks: list[int]) -> None:
        for block in blocks:
            del self._live[block]
            self._parked.pop(block, None)

    touched = forget

    def evict(self, n: int) -> list[int]:
        evicted: list[int] = []
        gone: dict[int, int] = {}  # block -> children evicted in this call, which the cache still counts
        cache, live, parked, heap = self.cache, self._live, self._parked, self._heap
        strict = True
        while len(evicted) < n:
            if not heap:  # the rest have children in use, through a duplicate: evict them anyway
                strict = False
                heap.extend(parked.values())
                heapq.heapify(heap)
                parked.clear()
            entry = heapq.heappop(heap)
            block = entry[2]
            if live.get(block) is not entry:
                continue
            if strict and cache.children[block] > gone.get(block, 0):
                parked[block] = entry
                continue
            del live[block]
            evicted.append(block)
            self.evicted(entry[0])
            parent = cache.has_parent(block)
            if block in cache.sessions.at:  # these sessions end in the parent from here on
                cache.sessions.climb(block, 0 if parent in evicted else parent, cache)
                self.rescore([parent])
            if parent:
                gone[parent] = gone.get(parent, 0) + 1
                if parent in parked and cache.children[parent] <= gone[parent]:
                    heapq.heappush(heap, parked.pop(parent))
        return evicted

    def evicted(self, key: float) -> None:
        """A hook for policies whose keys age."""

    def candidates(self) -> list[int]:
        return [block for _, _, block in sorted(self._live.values(), key=lambda entry: entry[1])]

    def queues(self) -> dict[str, list[int]]:
        """What waits where, the next to go first; a block whose cached children wait longer is spared until they go."""
        return {"lowest score first": [block for _, _, block in sorted(self._live.values())]}

    def scores(self) -> dict[int, float]:
        """Candidate -> the score it waits with."""
        return {block: key for key, _, block in self._live.values()}


class FIFO(Scored):
    """First stored, first evicted, regardless of hits."""

    name = "fifo"

    def key(self, block: int) -> float:
        return int(self.cache.stored_at[block])


class LFU(Scored):
    """Fewest hits first; ties go to the longest unused."""

    name = "lfu"

    def key(self, block: int) -> float:
        return int(self.cache.hits[block])


@named_options
class TTL(LRU):
    """LRU, but a block unused for `seconds` is dropped even if there is room."""

    name = "ttl"

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self.seconds = duration("seconds", seconds)
        self._since: OrderedDict[int, int] = OrderedDict()
        self._now = 0

    def freed(self, blocks: list[int]) -> None:
        super().freed(blocks)
        for block in blocks:
            self._since[block] = self._now

    def forget(self, blocks: list[int]) -> None:
        super().forget(blocks)
        for block in blocks:
            del self._since[block]

    touched = forget

    def evict(self, n: int) -> list[int]:
        evicted = super().evict(n)
        for block in evicted:
            del self._since[block]
        return evicted

    def expired(self, now: int) -> list[int]:
        """Blocks past their time at `now` (ns); the caller forgets them."""
        self._now = now
        last = now - int(self.seconds * 1e9)
        old = []
        for block, since in self._since.items():
            if since > last:
                break
            old.append(block)
        return old


@named_options
class CostAware(Scored):
    """Greedy-dual: `cost(block)` times its uses, plus an age that rises with every eviction.

    The default cost is that of recomputing the block: its own tokens, and attention over everything before it, which is
    the larger part beyond `depth_half` blocks.
    """

    name = "cost"

    def __init__(self, cost: Callable[[BlockInfo], float] | None = None, depth_half: float = DEPTH_HALF) -> None:
        super().__init__()
        half = real("depth_half", depth_half, least=0.0, open_left=True)
        if cost is not None and not callable(cost):
            raise ValueError(f"cost must be a function of a block, got {cost!r}")
        self.cost = cost or (lambda block: 1.0 + block.depth / half)
        self._age = 0.0

    def key(self, block: int) -> float:
        return self._age + self.cost(info(self.cache, block, self.order_of(block))) * (1 + int(self.cache.hits[block]))

    def evicted(self, key: float) -> None:
        self._age = max(self._age, key)


class Function(Scored):
    """A plain function `f(block) -> score`: the lowest score is evicted first.

    It is tried once when given. If it raises later, that is a warning, and that block is evicted first.
    """

    def __init__(self, function: Callable[[BlockInfo], float]) -> None:
        super().__init__()
        self.function = function
        self.name = getattr(function, "__name__", "function")
        real(f"{self.name}(block)", float(function(BlockInfo(1, 0, 0, 0, 1, 1))), least=float("-inf"))

    def __repr__(self) -> str:
        return f"Function({self.name}: {len(self)} candidates)"

    def key(self, block: int) -> float:
        return float(self.function(info(self.cache, block, self.order_of(block))))


def info(cache: PrefixCache, block: int, freed_at: int) -> BlockInfo:
    return BlockInfo(
        block,
        int(cache.depth_of[block]),
        int(cache.hits[block]),
        int(cache.children[block]),
        int(cache.stored_at[block]),
        freed_at,
        cache.now / 1e9,
        cache.sessions.infos(block),
        block in cache.sessions.superseded,
    )


EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "slru": SLRU,
    "s3-fifo": S3FIFO,
    "ttl": TTL,
    "cost": CostAware,
    "hinted": Hinted,
}


def eviction_policy(choice: EvictionChoice) -> EvictionPolicy:
    """A policy from its name, from a scoring function, or as it is."""
    if isinstance(choice, str):
        return choose("eviction policy", choice, EVICTION_POLICIES)()
    if isinstance(choice, type):
        raise ValueError(f"eviction must be an instance: {choice.__name__}(), not the class")
    if isinstance(choice, EvictionPolicy):
        if len(choice):
            raise ValueError(f"{choice!r} already serves a block manager: make another one")
        return choice
    if callable(choice):
        return Function(choice)
    raise ValueError(f"eviction must be a name, a policy or f(block) -> score, got {choice!r}")
