"""Replays in C++ (`replay.cpp`, which explains how) for the policies that it knows, in Python for all others."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.eviction import FIFO, LFU, LRU, EvictionPolicy
from labkit.core.blocks.queues import S3FIFO, SLRU
from labkit.core.blocks.sessions import Turn
from labkit.study.caches.foresight import Clairvoyant, LengthAware
from labkit.study.caches.replay import Replay
from labkit.study.caches.stack import IDLE_BINS, idle_bins
from labkit.study.traces.trace import Columns

KINDS = (LRU, SLRU, S3FIFO, FIFO, LFU, Clairvoyant, LengthAware)


class Batch:
    """Requests as columns, and as lists once somebody asks for these. `next_uses` are those of a request's blocks."""

    def __init__(self, columns: Columns, next_uses: Sequence[Any] | None = None) -> None:
        self.columns, self.next_uses = columns, next_uses

    def __repr__(self) -> str:
        return f"Batch({len(self.columns)} requests)"

    @cached_property
    def requests(self) -> list[tuple[list[int], float, Any, Turn | None]]:
        """Hashes, arrival, next uses, and what is said of the session."""
        hashes, ends = self.columns.hashes.tolist(), self.columns.indptr.tolist()
        own = [hashes[begin:end] for begin, end in pairwise(ends)]
        uses = [None] * len(own) if self.next_uses is None else self.next_uses
        turns = self.columns.turns or [None] * len(own)
        return list(zip(own, self.columns.arrival.tolist(), uses, turns, strict=True))

    @cached_property
    def flat_uses(self) -> NDArray[np.float64] | None:
        if self.next_uses is None:
            return None
        return np.fromiter(chain.from_iterable(self.next_uses), np.float64, len(self.columns.hashes))


class PythonReplay:
    """A `Replay` by batches."""

    def __init__(self, policy: EvictionPolicy, capacity: float, hold: bool) -> None:
        self.replay = Replay(policy, capacity, hold=hold)
        self.name = policy.name
        self.idle = np.zeros(IDLE_BINS, np.int64)

    def __repr__(self) -> str:
        return repr(self.replay)

    @property
    def num_evicted(self) -> int:
        return self.replay.num_evicted

    def add(self, batch: Batch, asked: NDArray[np.bool_]) -> NDArray[np.int32]:
        """How many blocks hit, of each request that is `asked` for."""
        hits, replay = np.zeros(len(asked), np.int32), self.replay
        for i, (hashes, arrival, uses, turn) in enumerate(batch.requests):
            if asked[i]:
                hits[i] = replay.add(hashes, arrival, uses, turn)
        self.idle += idle_bins(replay.idle)
        replay.idle.clear()
        return hits


class NativeReplay:
    """The same in C++."""

    def __init__(self, library: Any, policy: EvictionPolicy, capacity: float, hold: bool) -> None:
        self.library, self.name, self.num_evicted = library, policy.name, 0
        self.idle = np.zeros(IDLE_BINS, np.int64)
        self._handle = ctypes.c_void_p()
        kind, share = KINDS.index(type(policy)), getattr(policy, "share", 0.0)
        library.replay_new(kind, capacity, hold, share, ctypes.byref(self._handle))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.library.replay_free(self._handle)

    def __repr__(self) -> str:
        return f"NativeReplay({self.name}: {self.num_evicted} evicted)"

    def add(self, batch: Batch, asked: NDArray[np.bool_]) -> NDArray[np.int32]:
        hits, columns, uses = np.zeros(len(asked), np.int32), batch.columns, batch.flat_uses
        wanted = np.ascontiguousarray(asked, np.uint8)
        arrays = (columns.indptr, columns.hashes, columns.arrival, wanted)
        self.library.replay_add(
            self._handle, len(asked), *(array.ctypes.data for array in arrays),
            None if uses is None else uses.ctypes.data, hits.ctypes.data,
        )  # fmt: skip
        numbers = np.zeros(2, np.int64)
        self.library.replay_read(self._handle, numbers.ctypes.data, self.idle.ctypes.data)
        self.num_evicted = int(numbers[0])
        return hits


def new_replay(policy: EvictionPolicy, capacity: float, hold: bool) -> NativeReplay | PythonReplay:
    """C++ for a policy object of labkit that is as it was made."""
    used = any(getattr(policy, name, None) for name in ("_ghosts", "_in_main", "_spent"))
    if type(policy) in KINDS and not used and (library := _library()) is not None:
        return NativeReplay(library, policy, capacity, hold)
    return PythonReplay(policy, capacity, hold)


@lru_cache(maxsize=1)
def _library() -> Any:
    from labkit_kernels import native

    try:
        library = ctypes.CDLL(str(native.build(Path(__file__).with_name("replay.cpp"))))
    except (native.BuildError, OSError) as error:
        warnings.warn(f"caches are replayed in Python, which is slower: {error}", stacklevel=4)
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    for name, types in {
        "replay_new": (number, real, number, real, pointer),
        "replay_free": (pointer,),
        "replay_add": (pointer, number, *[pointer] * 6),
        "replay_read": (pointer, pointer, pointer),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
