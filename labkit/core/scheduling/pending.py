"""Prefixes that a running row is computing now, or that are read from disk, and the requests that wait for them instead
of computing them again."""

from __future__ import annotations

from collections.abc import Container, Sequence

from labkit.core.request import Request


class PendingPrefixes:
    """hash -> the row that will store it, and the requests parked until it is stored or the row gives up."""

    def __init__(self) -> None:
        self.row_of: dict[bytes, int] = {}
        self.hashes_of: dict[int, list[bytes]] = {}  # row -> hashes it has yet to store, in order
        self.parked: dict[bytes, list[Request]] = {}
        self.hash_for: dict[int, bytes] = {}  # serial of a parked request -> what it waits for
        self.from_disk: dict[int, int] = {}  # serial of a request without a row -> blocks that were read for it

    def __repr__(self) -> str:
        return f"PendingPrefixes({len(self.row_of)} blocks being computed, {len(self)} requests parked)"

    def __len__(self) -> int:
        """The number of parked requests."""
        return len(self.hash_for)

    def __contains__(self, request: Request) -> bool:
        return request.serial in self.hash_for

    def begin(self, row: int, hashes: list[bytes]) -> None:
        mine = [digest for digest in hashes if self.row_of.setdefault(digest, row) == row]
        if mine:
            self.hashes_of[row] = mine

    def last_shared(self, hashes: Sequence[bytes], first: int) -> bytes | None:
        """The last of `hashes[first:]` that the row computing `hashes[first]` will store, if there is such a row."""
        row = self.row_of.get(hashes[first]) if first < len(hashes) else None
        if row is None:
            return None
        low, high = first, len(hashes) - 1  # chained: if a hash is being computed, so is each before it
        while low < high:
            middle = (low + high + 1) // 2
            if self.row_of.get(hashes[middle]) == row:
                low = middle
            else:
                high = middle - 1
        return hashes[low]

    def park(self, request: Request, digest: bytes) -> None:
        self.parked.setdefault(digest, []).append(request)
        self.hash_for[request.serial] = digest

    def unpark(self, request: Request) -> None:
        digest = self.hash_for.pop(request.serial)
        others = self.parked[digest]
        others.remove(request)
        if not others:
            del self.parked[digest]

    def settle(self, row: int, num_left: int) -> list[Request]:
        """The row has stored all but its last `num_left` blocks; returns the requests that no longer need to wait."""
        mine = self.hashes_of.get(row)
        if mine is None:
            return []
        num_done = max(len(mine) - num_left, 0)
        done = mine[:num_done]
        if num_done == len(mine):
            del self.hashes_of[row]
        else:
            del mine[:num_done]
        free: list[Request] = []
        for digest in done:
            del self.row_of[digest]
            if digest in self.parked:
                waiting = self.parked.pop(digest)
                free += waiting
                for request in waiting:
                    del self.hash_for[request.serial]
        return free

    def arrived(self, digest: bytes) -> list[Request]:
        """The block was read from disk, or could not be; returns the requests that waited for it."""
        waiting = self.parked.pop(digest, [])
        for request in waiting:
            del self.hash_for[request.serial]
        return waiting

    def check(self, reading: Container[bytes] = ()) -> None:
        """`reading`: hashes of blocks that are being read from disk."""
        assert sum(map(len, self.parked.values())) == len(self.hash_for), "the counts of parked requests disagree"
        alone = [digest for digest in self.parked if digest not in self.row_of and digest not in reading]
        assert not alone, "a request waits for a prefix that no row computes and nobody reads"
        assert sum(map(len, self.hashes_of.values())) == len(self.row_of), "a pending hash has no row"
