"""LRU caches of all sizes in one pass over a trace, by stack distance: a C++ version (`stack.cpp`, which explains how)
and a plain Python one that gives the same numbers. Knows block hashes; nothing of files, policies or tables."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.study.traces.trace import Columns

IDLE_BINS = 32  # bin b > 0: idle for 2**(b - 11) to 2**(b - 10) seconds
HEAT = (40, 24)  # powers of two of the distance, of the depth
MISS, SYSTEM, SESSION, CROSS = range(4)  # what a block of a request owes its hit to
ENDLESS = 2**62

Found = tuple[NDArray[np.int32], NDArray[np.uint8]]  # hits [requests, capacities], causes [blocks]


def idle_bin(seconds: float) -> int:
    """The bin of a time between a block's last use and its eviction."""
    return 0 if seconds < 2.0**-10 else min(math.frexp(seconds)[1] + 10, IDLE_BINS - 1)


def idle_bins(seconds: Sequence[float]) -> NDArray[np.int64]:
    """How many of these times are in each bin."""
    times = np.array(seconds, np.float64)
    bins = np.where(times < 2.0**-10, 0, np.minimum(np.frexp(times)[1] + 10, IDLE_BINS - 1))
    return np.bincount(bins, minlength=IDLE_BINS)


def new_stack(capacities: Sequence[float], history: float = math.inf) -> Stack | PythonStack:
    """The C++ version if it can be built, or else the Python one, which is some forty times slower."""
    library = _library()
    return PythonStack(capacities, history) if library is None else Stack(library, capacities, history)


@lru_cache(maxsize=1)
def _library() -> Any:
    from labkit_kernels import native

    try:
        library = ctypes.CDLL(str(native.build(Path(__file__).with_name("stack.cpp"))))
    except (native.BuildError, OSError) as error:
        warnings.warn(f"stack distances are computed in Python, which is slower: {error}", stacklevel=3)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, types in {
        "stack_new": (number, pointer, number, pointer),
        "stack_free": (pointer,),
        "stack_add": (pointer, number, *[pointer] * 6),
        "stack_sizes": (pointer, pointer),
        "stack_read": (pointer, *[pointer] * 4),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _whole(capacity: float) -> int:
    return ENDLESS if capacity == math.inf else int(capacity)


class Stack:
    """All LRU caches over what was added. `capacities` are ascending; blocks that have not been among the `history`
    most recent ones are forgotten."""

    def __init__(self, library: Any, capacities: Sequence[float], history: float) -> None:
        self.library, self.num = library, len(capacities)
        sizes, self._handle = np.array([*map(_whole, capacities)], np.int64), ctypes.c_void_p()
        library.stack_new(self.num, sizes.ctypes.data, _whole(history), ctypes.byref(self._handle))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.library.stack_free(self._handle)

    def add(self, batch: Columns) -> Found:
        hits = np.empty((len(batch), self.num), np.int32)
        causes = np.empty(len(batch.hashes), np.uint8)
        arrays = (batch.indptr, batch.hashes, batch.arrival, batch.session, hits, causes)
        self.library.stack_add(self._handle, len(batch), *(array.ctypes.data for array in arrays))
        return hits, causes

    def read(self) -> Distances:
        sizes = np.zeros(4, np.int64)
        self.library.stack_sizes(self._handle, sizes.ctypes.data)
        distances, evicted = np.zeros(int(sizes[0]), np.int64), np.zeros(self.num, np.int64)
        idle, heat = np.zeros((self.num, IDLE_BINS), np.int64), np.zeros(HEAT, np.int64)
        self.library.stack_read(self._handle, *(array.ctypes.data for array in (distances, idle, heat, evicted)))
        return Distances(np.trim_zeros(distances, "b"), int(sizes[2]), heat, idle, evicted, int(sizes[3]))


class Distances:
    """What a stack has counted.

    `distances[d]` is the number of blocks that a cache of d blocks is the smallest to hit, `cold` of those that none
    hits. `idle` [capacities, bins] and `evicted` [capacities] are about evictions.
    """

    def __init__(
        self, distances: NDArray[np.int64], cold: int, heat: NDArray[np.int64], idle: NDArray[np.int64],
        evicted: NDArray[np.int64], num_bytes: int,
    ) -> None:  # fmt: skip
        self.distances, self.cold, self.heat, self.idle = distances, cold, heat, idle
        self.evicted, self.num_bytes = evicted, num_bytes

    def __repr__(self) -> str:
        reused, farthest = int(self.distances.sum()), max(len(self.distances) - 1, 0)
        return f"Distances({reused:,} reuses within {farthest:,} blocks, {self.cold:,} cold)"

    def hits(self) -> NDArray[np.int64]:
        """Hits of LRU caches of 0, 1, 2, ... blocks."""
        return np.cumsum(self.distances)


class PythonStack:
    """The same in plain Python, block by block."""

    def __init__(self, capacities: Sequence[float], history: float = math.inf) -> None:
        self.capacities, self.history = list(capacities), history
        self.slot_of: dict[int, int] = {}  # in order of use
        self.used_at: dict[int, float] = {}
        self.sessions_of: dict[int, list[int]] = {}  # the first three different ones
        self.tree = [0] * 1025
        self.top = 0
        num = len(self.capacities)
        self.distances: dict[int, int] = {}
        self.cold = 0
        self.heat = np.zeros(HEAT, np.int64)
        self.idle = np.zeros((num, IDLE_BINS), np.int64)
        self.evicted = np.zeros(num, np.int64)
        self.caches: list[dict[int, None]] = [{} for _ in range(num)]  # each in order of use

    def add(self, batch: Columns) -> Found:
        hits = np.zeros((len(batch), len(self.capacities)), np.int32)
        causes = np.zeros(len(batch.hashes), np.uint8)
        hashes, ends = batch.hashes.tolist(), batch.indptr.tolist()
        for r, (now, session) in enumerate(zip(batch.arrival.tolist(), batch.session.tolist(), strict=True)):
            own = hashes[ends[r] : ends[r + 1]]
            causes[ends[r] : ends[r + 1]] = self._look_up(own, session)
            for k, cache in enumerate(self.caches):
                hits[r, k] = next((i for i, digest in enumerate(own) if digest not in cache), len(own))
                self._use(k, cache, own, now)
            self._move(own, now, session)
        return hits, causes

    def _look_up(self, hashes: list[int], session: int) -> list[int]:
        causes = [MISS] * len(hashes)
        farthest = 0
        for depth, digest in enumerate(hashes):
            slot = self.slot_of.get(digest)
            if slot is None:
                self.cold += len(hashes) - depth
                break
            farthest = max(farthest, len(self.slot_of) - self._below(slot))
            self.distances[farthest] = self.distances.get(farthest, 0) + 1
            place = min(farthest.bit_length(), HEAT[0]) - 1, min((depth + 1).bit_length(), HEAT[1]) - 1
            self.heat[place] += 1
            known = self.sessions_of[digest]
            if len({*known, session}) >= 3:
                causes[depth] = SYSTEM
            else:
                causes[depth] = SESSION if session in known else CROSS
        return causes

    def _use(self, k: int, cache: dict[int, None], hashes: list[int], now: float) -> None:
        for digest in reversed(hashes):
            cache.pop(digest, None)
            cache[digest] = None
        while len(cache) > self.capacities[k]:
            digest = next(iter(cache))
            del cache[digest]
            self.evicted[k] += 1
            self.idle[k, idle_bin(now - (now if digest in hashes else self.used_at[digest]))] += 1

    def _move(self, hashes: list[int], now: float, session: int) -> None:
        if self.top + len(hashes) >= len(self.tree):
            self._compact(len(hashes))
        for digest in reversed(hashes):
            if (slot := self.slot_of.pop(digest, None)) is not None:
                self._count(slot, -1)
            self.slot_of[digest] = self.top
            self._count(self.top, 1)
            self.top += 1
            self.used_at[digest] = now
            known = self.sessions_of.setdefault(digest, [])
            if session not in known and len(known) < 3:
                known.append(session)
        while len(self.slot_of) > self.history:
            digest = next(iter(self.slot_of))
            self._count(self.slot_of.pop(digest), -1)
            del self.sessions_of[digest], self.used_at[digest]

    def _below(self, slot: int) -> int:
        total, at = 0, slot
        while at > 0:
            total += self.tree[at]
            at -= at & -at
        return total

    def _count(self, slot: int, by: int) -> None:
        at = slot + 1
        while at < len(self.tree):
            self.tree[at] += by
            at += at & -at

    def _compact(self, room: int) -> None:
        self.tree = [0] * (2 * (len(self.slot_of) + room) + 1024)
        self.top = 0
        for digest in self.slot_of:
            self.slot_of[digest] = self.top
            self._count(self.top, 1)
            self.top += 1

    def read(self) -> Distances:
        distances = np.zeros(max(self.distances, default=-1) + 1, np.int64)
        for distance, count in self.distances.items():
            distances[distance] = count
        return Distances(distances, self.cold, self.heat.copy(), self.idle.copy(), self.evicted.copy(), 0)
