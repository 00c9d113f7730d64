"""Which cached block goes first when an empty one is needed. Knows use and order; refuses to know requests.

A policy is told what became evictable (`freed`), what was hit (`touched`) and what is no longer cached (`forget`), and
answers `evict(n)`. Its candidates are cached blocks that nobody holds. All of them spare a block that a cached block
still chains to, as evicting a prefix before its continuation would strand the continuation.
"""

from __future__ import annotations

import heapq
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from labkit.core.blocks.prefix import PrefixCache
from labkit.core.options import choose, duration, named_options, real
from labkit.core.shown import Shown


@dataclass(frozen=True)
class BlockInfo:
    """What a scoring function may look at. Times are counts: stores for `stored_at`, releases for `freed_at`."""

    block: int
    depth: int
    hits: int
    children: int
    stored_at: int
    freed_at: int


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
    """Least recently released first; O(1). A table releases its tail before its head, and so they go."""

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
    """Lowest key first among blocks without a cached child; a heap with lazy deletion, O(log n).

    The key is asked once, when the block becomes evictable; ties go by release order. A block popped while a child is
    cached is parked until the child goes.
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
        except Exception as error:
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
            if not heap:  # what is left chains to blocks in use, through a duplicate: take it all the same
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
    """First stored, first out, however often it was hit since."""

    name = "fifo"

    def key(self, block: int) -> float:
        return int(self.cache.stored_at[block])


class LFU(Scored):
    """Fewest hits first, then the longest unused."""

    name = "lfu"

    def key(self, block: int) -> float:
        return int(self.cache.hits[block])


@named_options
class SLRU(Shown):
    """Two LRU segments: a block enters on probation and is protected once hit. At most a share `protected` of the pool
    is; beyond it the oldest protected block steps back to probation."""

    name = "slru"

    def __init__(self, protected: float = 0.8) -> None:
        self.share = real("protected", protected, least=0.0, most=1.0)
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"SLRU({len(self._probation)} on probation, {len(self._protected)} protected)"

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def attach(self, cache: PrefixCache) -> None:
        self.cache = cache

    def freed(self, blocks: list[int]) -> None:
        for block in blocks:
            (self._protected if self.cache.hits[block] else self._probation)[block] = None
        while len(self._protected) > self.share * self.cache.num_blocks:
            self._probation[self._protected.popitem(last=False)[0]] = None

    def forget(self, blocks: list[int]) -> None:
        for block in blocks:
            del (self._probation if block in self._probation else self._protected)[block]

    touched = forget

    def evict(self, n: int) -> list[int]:
        return [(self._probation or self._protected).popitem(last=False)[0] for _ in range(n)]

    def candidates(self) -> list[int]:
        return [*self._probation, *self._protected]

    def queues(self) -> dict[str, list[int]]:
        """What waits where, the next to go first."""
        return {"on probation": list(self._probation), "protected": list(self._protected)}


@named_options
class S3FIFO(Shown):
    """Small, main and ghost queues: a block that was never hit leaves from the small queue without disturbing the main
    one; one that comes back after that enters the main queue at once."""

    name = "s3-fifo"

    def __init__(self, small: float = 0.1) -> None:
        self.share = real("small", small, least=0.0, most=1.0)
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._in_main: set[int] = set()
        self._spent: dict[int, int] = {}  # block -> hits already paid for by going round again
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"S3FIFO({len(self._small)} small, {len(self._main)} main, {len(self._ghosts)} ghosts)"

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def attach(self, cache: PrefixCache) -> None:
        self.cache = cache

    def freed(self, blocks: list[int]) -> None:
        for block in blocks:
            if self._ghosts.pop(self.cache.hash_of(block), 0) is None:
                self._in_main.add(block)
            (self._main if block in self._in_main else self._small)[block] = None

    def touched(self, blocks: list[int]) -> None:
        for block in blocks:
            del (self._small if block in self._small else self._main)[block]

    def forget(self, blocks: list[int]) -> None:
        self.touched(blocks)
        for block in blocks:
            self._in_main.discard(block)
            self._spent.pop(block, None)

    def _credit(self, block: int) -> int:
        return min(int(self.cache.hits[block]), 3) - self._spent.get(block, 0)

    def evict(self, n: int) -> list[int]:
        evicted: list[int] = []
        gone: dict[int, int] = {}
        passed = 0  # candidates seen in a row that were spared for their children
        while len(evicted) < n:
            from_small = bool(self._small) and (len(self._small) > self.share * len(self) or not self._main)
            queue = self._small if from_small else self._main
            block, _ = queue.popitem(last=False)
            if self.cache.children[block] > gone.get(block, 0) and passed <= len(self):
                queue[block] = None
                passed += 1
                continue
            if self._credit(block) > 0:
                self._spent[block] = self._spent.get(block, 0) + 1
                self._in_main.add(block)
                self._main[block] = None
                continue
            passed = 0
            if from_small:
                self._ghosts[self.cache.hash_of(block)] = None
                if len(self._ghosts) > self.cache.num_blocks:
                    self._ghosts.popitem(last=False)
            self._in_main.discard(block)
            self._spent.pop(block, None)
            evicted.append(block)
            if parent := self.cache.has_parent(block):
                gone[parent] = gone.get(parent, 0) + 1
        return evicted

    def candidates(self) -> list[int]:
        return [*self._small, *self._main]

    def queues(self) -> dict[str, list[int]]:
        """What waits where, the next to go first."""
        return {"small": list(self._small), "main": list(self._main)}


@named_options
class TTL(LRU):
    """LRU, and a block unused for `seconds` is dropped even when there is room."""

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

    The default cost is what recomputing the block takes: its own tokens, and attention over everything before it,
    which outweighs them beyond `depth_half` blocks.
    """

    name = "cost"

    def __init__(self, cost: Callable[[BlockInfo], float] | None = None, depth_half: float = 128.0) -> None:
        super().__init__()
        half = real("depth_half", depth_half, least=0.0, open_left=True)
        if cost is not None and not callable(cost):
            raise ValueError(f"cost must be a function of a block, got {cost!r}")
        self.cost = cost or (lambda block: 1.0 + block.depth / half)
        self._age = 0.0

    def key(self, block: int) -> float:
        return self._age + self.cost(info(self.cache, block, self._num_freed)) * (1 + int(self.cache.hits[block]))

    def evicted(self, key: float) -> None:
        self._age = max(self._age, key)


class Function(Scored):
    """A plain function `f(block) -> score`: the lowest score goes first.

    It is tried once when given. A later exception is a warning, and that block goes first.
    """

    def __init__(self, function: Callable[[BlockInfo], float]) -> None:
        super().__init__()
        self.function = function
        self.name = getattr(function, "__name__", "function")
        real(f"{self.name}(block)", float(function(BlockInfo(1, 0, 0, 0, 1, 1))), least=float("-inf"))

    def __repr__(self) -> str:
        return f"Function({self.name}: {len(self)} candidates)"

    def key(self, block: int) -> float:
        return float(self.function(info(self.cache, block, self._num_freed)))


def info(cache: PrefixCache, block: int, freed_at: int) -> BlockInfo:
    return BlockInfo(
        block,
        int(cache.depth_of[block]),
        int(cache.hits[block]),
        int(cache.children[block]),
        int(cache.stored_at[block]),
        freed_at,
    )


EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "slru": SLRU,
    "s3-fifo": S3FIFO,
    "ttl": TTL,
    "cost": CostAware,
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
