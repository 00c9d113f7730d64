"""Eviction policies for cache studies that no engine can have, or that come from a paper: the clairvoyant bound, and
Mooncake's length-aware one. They know a cache's columns and nothing of traces."""

from __future__ import annotations

from typing import Any

from labkit.core.blocks.eviction import Scored


class Clairvoyant(Scored):
    """Belady's policy: the block whose next use is farthest away goes first, among blocks without a cached child.

    A block is used whenever a block behind it is, so leaves are always among the farthest, and no other policy hits
    more blocks. Only a replay knows the future: `lk.study.prefix(trace, policies=["clairvoyant"])`.
    """

    name = "clairvoyant"

    def attach(self, cache) -> None:  # type: ignore[no-untyped-def]
        if not hasattr(cache, "next_use"):
            raise ValueError("only a replay knows the future: use Clairvoyant in lk.study.prefix, not in an engine")
        super().attach(cache)

    def key(self, block: int) -> float:
        cache: Any = self.cache  # a replay's, see attach
        return -float(cache.next_use[block])


class LengthAware(Scored):
    """Mooncake's length-aware policy: fewest hits first, and of these the block that lies farthest from the beginning
    of its prompt."""

    name = "length-aware"

    def key(self, block: int) -> float:
        return int(self.cache.hits[block]) + 1.0 / (1 + int(self.cache.depth_of[block]))
