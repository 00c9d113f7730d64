"""How much of each waiting request's prompt is cached, updated as the prefix cache stores and evicts blocks.

A request is looked up again only if its match can have changed: the first block it missed was stored, or one of the
blocks it matched was evicted. Requests with the same matched prefix are handled together.
"""

from __future__ import annotations

from collections.abc import Callable

from labkit.core.blocks.prefix import PrefixCache
from labkit.core.request import Request
from labkit.core.scheduling.policy import WaitingQueue

Measure = Callable[[Request], tuple[list[bytes], int]]  # -> (hashes of its blocks, how many of them are matched)


class PrefixMatches:
    """For queue orders that sort by cached tokens."""

    def __init__(self, prefix: PrefixCache) -> None:
        self.prefix = prefix
        self.active = False
        self._at: dict[int, tuple[bytes, bytes]] = {}  # serial -> (last block matched, first block missed)
        self._matched: dict[bytes, dict[int, Request]] = {}  # by the last block matched
        self._missed: dict[bytes, dict[int, Request]] = {}  # by the first block missed
        self._chains: dict[bytes, frozenset[bytes]] = {}  # last block matched -> all blocks matched

    def __repr__(self) -> str:
        return f"PrefixMatches({len(self._at)} requests, {len(self._chains)} prefixes)"

    def stop(self, queue: WaitingQueue) -> None:
        """The order no longer asks for matches: forget everything, record nothing."""
        self.active, self.prefix.changes, queue.pushed = False, None, None
        for one in (self._at, self._matched, self._missed, self._chains):
            one.clear()

    def refresh(self, queue: WaitingQueue, measure: Measure) -> list[Request]:
        """Look up those whose match may have changed; returns these requests."""
        stale = self._stale(queue)
        for request in stale:
            self._forget(request.serial)
            hashes, num_matched = measure(request)
            last = hashes[num_matched - 1] if num_matched else b""
            first = hashes[num_matched] if num_matched < len(hashes) else b""
            self._at[request.serial] = last, first
            if last:
                self._matched.setdefault(last, {})[request.serial] = request
                if last not in self._chains:
                    self._chains[last] = frozenset(hashes[:num_matched])
            if first:
                self._missed.setdefault(first, {})[request.serial] = request
        return stale

    def _stale(self, queue: WaitingQueue) -> list[Request]:
        changes, pushed = self.prefix.start_recording(), queue.pushed
        queue.pushed = []
        if not self.active or pushed is None or changes is None or len(self._at) > 2 * len(queue) + 64:
            for one in (self._at, self._matched, self._missed, self._chains):
                one.clear()
            self.active = True
            return list(queue)
        found = {request.serial: request for request in pushed}
        for digest in changes.stored:
            found |= self._missed.get(digest, {})
        if changes.removed:
            for last, chain in self._chains.items():
                if not changes.removed.isdisjoint(chain):
                    found |= self._matched[last]
        return [request for request in found.values() if request in queue]

    def _forget(self, serial: int) -> None:
        last, first = self._at.pop(serial, (b"", b""))
        if last:
            del self._matched[last][serial]
            if not self._matched[last]:
                del self._matched[last], self._chains[last]
        if first:
            del self._missed[first][serial]
            if not self._missed[first]:
                del self._missed[first]
