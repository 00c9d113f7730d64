"""Cache studies: replay a trace through prefix caches of several sizes under several policies, in one pass over it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.eviction import EVICTION_POLICIES, EvictionPolicy, Function
from labkit.core.options import choose
from labkit.study.caches.foresight import Clairvoyant, LengthAware
from labkit.study.caches.future import Future
from labkit.study.caches.replaying import Batch, NativeReplay, PythonReplay, new_replay
from labkit.study.caches.result import PrefixStudy
from labkit.study.caches.stack import Distances, new_stack
from labkit.study.caches.tally import Tally
from labkit.study.shapes import ModelShape
from labkit.study.traces.formats import read_trace
from labkit.study.traces.trace import Columns, Trace

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    **EVICTION_POLICIES,
    "length-aware": LengthAware,
    "clairvoyant": Clairvoyant,
}
PolicyChoice = Any  # a name, an eviction policy or its class, or f(block) -> score
HISTORY = 2**20  # recent blocks for which reuse is known, at least; about 150 MB


def prefix(
    trace: Trace | str | PathLike[str],
    capacities: Iterable[float],
    policies: Iterable[PolicyChoice] = ("lru",),
    *,
    hold: bool = False,
    model: ModelShape | Any = None,
) -> PrefixStudy:
    """Replay a trace's block hashes through one prefix cache for each policy and capacity (in blocks; `math.inf`).

    A request's blocks until the first miss are hits; then all its blocks are stored at once and the policy evicts down
    to the capacity. No time passes, and outputs are not stored. `hold=True` keeps the blocks of the request itself, as
    an engine must, and leaves out requests that are longer than the cache.

    A policy is a name, one of the engine's policy objects, or a function of a block as in `lk.Engine(eviction=f)`.
    All caches of "lru" are computed together from stack distances, and equal `lk.LRU()` exactly. With a `model` (a
    Hugging Face config or a `ModelShape`) the table has the prefill operations that hits save.

    >>> from labkit.study.traces.trace import Trace, TraceRequest
    >>> chat = [TraceRequest(float(i), 16 * (i % 4 + 1), 8, range(i % 4 + 1)) for i in range(8)]
    >>> study = prefix(Trace.of(chat, block_size=16), capacities=[2, 4], policies=["lru", "clairvoyant"])
    >>> study
    PrefixStudy(2 policies x 2 capacities over requests: 8 requests, 20 blocks of 16 tokens)
    >>> [(row["policy"], row["capacity"], row["block_hit_rate"]) for row in study.rows][:2]
    [('lru', 2, 0.6), ('lru', 4, 0.8)]
    """
    if not isinstance(trace, Trace):
        trace = read_trace(trace)
    if trace.block_size is None:
        raise ValueError(
            f"{trace.name} has no block hashes, so nothing in it is known to be shared. Mooncake and Bailian traces "
            f"have them; so do generated ones, runs recorded by lk.study.record, and event logs of engines with the "
            f"prefix cache on"
        )
    sizes = sorted({_capacity(size) for size in capacities})
    if not sizes:
        raise ValueError("capacities is empty: give at least one number of blocks")
    chosen = list(policies)
    if not chosen:
        raise ValueError("policies is empty: give at least one, such as 'lru'")
    shape = model if model is None or isinstance(model, ModelShape) else ModelShape.of(model)
    caches = _Caches(sizes, chosen, hold)
    tally = Tally(len(caches.names), trace.block_size, shape)
    with ExitStack() as open_files:
        future = open_files.enter_context(Future(trace)) if caches.need_future else None
        next_uses = iter(future) if future is not None else None
        for batch in trace.columns():
            lengths = np.diff(batch.indptr)[:, None]
            served = np.broadcast_to(lengths <= caches.capacity if hold else True, (len(batch), len(caches.names)))
            hits, causes = caches.add(batch, served, next_uses)
            tally.add(batch, hits, causes, served)
    distances = caches.stack.read()
    rows = [
        {"policy": name, "capacity": size, **tally.row(j), "evictions": int(caches.evicted(distances)[j]),
         "too_long": int(caches.too_long[j]), "excluded": len(trace.excluded)}
        for j, (name, size) in enumerate(zip(caches.names, sizes * len(chosen), strict=True))
    ]  # fmt: skip
    tenants = [
        {"policy": row["policy"], "capacity": row["capacity"], **one}
        for j, row in enumerate(rows)
        for one in tally.tenant_rows(j)
    ]
    return PrefixStudy(trace.name, trace.block_size, rows, tenants, distances, caches.idle(distances), trace.excluded)


class _Caches:
    """A cache for each policy and capacity. Those of "lru" are read off one stack, the others replayed one by one."""

    def __init__(self, sizes: list[float], policies: list[PolicyChoice], hold: bool) -> None:
        self.sizes, self.hold = sizes, hold
        self.names: list[str] = []
        self.on_stack: list[int] = []  # column -> of these caches
        self.need_future = False
        self.replays: dict[int, NativeReplay | PythonReplay] = {}
        for policy in policies:
            make = _maker(policy)
            for size in sizes:
                if policy == "lru" and not hold:
                    self.on_stack.append(len(self.names))
                    self.names.append("lru")
                    continue
                chosen = make()
                self.need_future |= isinstance(chosen, Clairvoyant)
                self.replays[len(self.names)] = new_replay(chosen, size, hold)
                self.names.append(chosen.name)
        self.capacity = np.array(sizes * len(policies))  # [caches]
        largest = max(sizes)
        self.stack = new_stack(sizes, math.inf if self.need_future else max(HISTORY, 4 * largest))
        self.too_long = np.zeros(len(self.names), np.int64)

    def add(
        self, batch: Columns, served: NDArray[np.bool_], next_uses: Iterator[Any] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Blocks hit [requests, caches], and for each block of a request what its hit is owed to."""
        hits = np.zeros((len(batch), len(self.names)), np.int32)
        on_stack, causes = self.stack.add(batch)
        self.too_long += (np.diff(batch.indptr)[:, None] > self.capacity).sum(0)
        if self.on_stack:
            hits[:, self.on_stack] = np.tile(on_stack, (1, len(self.on_stack) // len(self.sizes)))
        if not self.replays:
            return hits, causes
        given = Batch(batch, None if next_uses is None else [next(next_uses) for _ in range(len(batch))])
        for j, replay in self.replays.items():
            hits[:, j] = replay.add(given, served[:, j])
        return hits, causes

    def evicted(self, distances: Distances) -> list[int]:
        stack = [int(count) for count in distances.evicted]
        return [
            self.replays[j].num_evicted if j in self.replays else stack[j % len(stack)] for j in range(len(self.names))
        ]

    def idle(self, distances: Distances) -> NDArray[np.int64]:
        """[caches, bins] evictions by the time since the last use."""
        num = len(self.sizes)
        return np.array(
            [self.replays[j].idle if j in self.replays else distances.idle[j % num] for j in range(len(self.names))]
        )


def _capacity(size: float) -> float:
    if size != math.inf and not (size >= 1 and size == int(size)):
        raise ValueError(f"a capacity is a whole number of blocks, at least 1, or inf, got {size!r}")
    return size if size == math.inf else int(size)


def _maker(choice: PolicyChoice) -> Callable[[], EvictionPolicy]:
    """What makes a fresh policy for each cache."""
    if isinstance(choice, str):
        return choose("eviction policy", choice, POLICIES)
    if isinstance(choice, type):
        return choice
    if isinstance(choice, EvictionPolicy):
        if len(choice):
            raise ValueError(f"{choice!r} already serves a block manager: make another one")
        return lambda: copy.deepcopy(choice)
    if callable(choice):
        return lambda: Function(choice)
    raise ValueError(f"a policy is a name, a policy object or f(block) -> score, got {choice!r}")
