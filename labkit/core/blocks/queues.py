"""Eviction policies with several queues: SLRU and S3-FIFO."""

from __future__ import annotations

from collections import OrderedDict

from labkit.core.blocks.prefix import PrefixCache
from labkit.core.options import named_options, real
from labkit.core.shown import Shown


@named_options
class SLRU(Shown):
    """Two LRU segments: a block starts on probation and is protected once hit. At most a share `protected` of the pool
    is protected; beyond that the oldest protected block goes back on probation."""

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
        """The blocks in each queue, the next to be evicted first."""
        return {"on probation": list(self._probation), "protected": list(self._protected)}


@named_options
class S3FIFO(Shown):
    """Small, main and ghost queues. A block that is never hit leaves from the small queue without disturbing the main
    one. If it comes back after that, it enters the main queue at once."""

    name = "s3-fifo"

    def __init__(self, small: float = 0.1) -> None:
        self.share = real("small", small, least=0.0, most=1.0)
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._in_main: set[int] = set()
        self._spent: dict[int, int] = {}  # block -> hits already spent on another round
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
        passed = {True: 0, False: 0}  # from small?, blocks skipped in a row because of their children
        while len(evicted) < n:
            small, main = len(self._small), len(self._main)
            from_small = bool(small) and (small > self.share * (small + main) or not main)
            spent = {True: passed[True] >= small, False: passed[False] >= main}
            if spent[from_small] and not spent[not from_small]:
                from_small = not from_small
            queue = self._small if from_small else self._main
            block, _ = queue.popitem(last=False)
            if self.cache.children[block] > gone.get(block, 0) and not spent[from_small]:
                queue[block] = None
                passed[from_small] += 1
                continue
            if self._credit(block) > 0:
                self._spent[block] = self._spent.get(block, 0) + 1
                self._in_main.add(block)
                self._main[block] = None
                continue
            passed = {True: 0, False: 0}
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
        """The blocks in each queue, the next to be evicted first."""
        return {"small": list(self._small), "main": list(self._main)}
