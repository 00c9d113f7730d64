"""Requests for a simulation, one after the other as they arrive: from a workload, a trace, or any iterable. Holds no
more of them than it must."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from labkit.bench.workload import Ask, Workload
from labkit.core.blocks.sessions import Turn
from labkit.core.blocks.tables import Tokens
from labkit.core.request import Request
from labkit.study.traces.trace import Trace, TraceRequest

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15))


class Incoming(NamedTuple):
    """A request about to arrive. `index` is its place in the workload."""

    arrival: float  # seconds
    index: int  # type: ignore[assignment]
    prompt: Tokens
    num_output: int
    priority: int = 0
    extra: Mapping[str, Any] | None = None  # becomes `extra_args`, for policies
    turn: Turn | None = None  # of a session


class Arrivals:
    """What arrives, in order of time. `ended` adds the next turns of a conversation.

    >>> import labkit as lk
    >>> arrivals = Arrivals(lk.workloads.poisson(3))
    >>> [one.index for one in iter(arrivals.pop, None)]
    [0, 1, 2]
    """

    def __init__(self, source: Workload | Trace | Iterable[Any], vocab_size: int = 32_000) -> None:
        self.vocab_size = vocab_size
        self._asks: tuple[Ask, ...] = source.asks if isinstance(source, Workload) else ()
        self._turns: dict[int, list[int]] = {}  # request -> those that go on with its answer
        for i, ask in enumerate(self._asks):
            if ask.after is not None:
                self._turns.setdefault(ask.after, []).append(i)
        self._due: list[tuple[float, int, Incoming]] = []  # later turns, a heap by time
        self._rest = self._of_workload() if self._asks else self._of_stream(source)  # type: ignore[arg-type]
        self._head = next(self._rest, None)

    def next_time(self) -> float | None:
        """Seconds of the next arrival; None if nothing is known to arrive."""
        times = [entry.arrival for entry in (self._head, self._due[0][2] if self._due else None) if entry is not None]
        return min(times, default=None)

    def pop(self) -> Incoming | None:
        head = self._head
        if self._due and (head is None or self._due[0][0] < head.arrival):
            return heapq.heappop(self._due)[2]
        if head is not None:
            self._head = next(self._rest, None)
            if self._head is not None and self._head.arrival < head.arrival:
                raise ValueError(
                    f"request {self._head.index} arrives at {self._head.arrival:g} s, before the one that precedes it "
                    f"({head.arrival:g} s): sort the stream by time"
                )
        return head

    def ended(self, index: int, request: Request) -> None:
        """The answer to request `index` is there: its next turns come after a pause."""
        if index in self._turns:
            for turn in self.turns(index, request.tokens, request.finished_at or 0):
                heapq.heappush(self._due, (turn.arrival, turn.index, turn))

    def goes_on(self, index: int) -> bool:
        """Whether others wait for the answer to request `index`."""
        return index in self._turns

    def turns(self, index: int, tokens: Tokens, finished_at: int) -> list[Incoming]:
        """The requests that follow request `index`, which has ended with these tokens; for a caller who adds them."""
        found = []
        for i in self._turns.pop(index, ()):
            ask = self._asks[i]
            prompt = np.concatenate((tokens, np.asarray(ask.prompt, np.int32)))
            found.append(
                Incoming(finished_at / 1e9 + ask.arrival, i, prompt, ask.num_output, ask.priority, ask.extra, ask.turn)
            )
        return found

    def take(self, num: int) -> list[Incoming]:
        """At most `num` requests, without those that follow an answer; fewer if there are no more."""
        assert not self._due
        found: list[Incoming] = []
        while len(found) < num and (one := self.pop()) is not None:
            found.append(one)
        return found

    def give_back(self, stream: Iterable[Incoming], due: Iterable[Incoming]) -> None:
        """Requests that were taken, and turns, that have not arrived."""
        head = [] if self._head is None else [self._head]
        self._rest = chain(stream, head, self._rest)
        self._head = next(self._rest, None)
        for turn in due:
            heapq.heappush(self._due, (turn.arrival, turn.index, turn))

    def _of_workload(self) -> Iterator[Incoming]:
        first = [i for i, ask in enumerate(self._asks) if ask.after is None]
        for i in sorted(first, key=lambda i: self._asks[i].arrival):
            ask = self._asks[i]
            yield Incoming(
                ask.arrival, i, np.asarray(ask.prompt, np.int32), ask.num_output, ask.priority, ask.extra, ask.turn
            )

    def _of_stream(self, source: Iterable[Any]) -> Iterator[Incoming]:
        size = getattr(source, "block_size", None) or 16
        for i, given in enumerate(source):
            if isinstance(given, Incoming):
                yield given
            elif isinstance(given, Ask):
                if given.after is not None:
                    raise ValueError(f"request {i} goes on with another: conversations need a Workload")
                prompt = np.asarray(given.prompt, np.int32)
                yield Incoming(given.arrival, i, prompt, given.num_output, given.priority, given.extra, given.turn)
            elif isinstance(given, TraceRequest):
                prompt = self._prompt(given, i, size)
                yield Incoming(given.arrival, i, prompt, max(given.num_output, 1), turn=given.turn)
            else:
                raise TypeError(f"request {i} must be an Ask, a TraceRequest or an Incoming, got {given!r}")

    def _prompt(self, request: TraceRequest, index: int, size: int) -> Tokens:
        """Its tokens; those of a block follow from its hash, so that what was shared is shared."""
        if request.tokens is not None:
            return np.asarray(request.tokens, np.int32)
        number = max(request.num_prompt, 1)
        if len(request.hashes):
            keys, width = np.asarray(request.hashes).astype(np.uint64), size
        else:
            keys, width = np.array([index + (1 << 40)], np.uint64), number
        return mixed(keys[:, None] * _MIX[0] + np.arange(width, dtype=np.uint64), self.vocab_size).reshape(-1)[:number]


def mixed(x: Any, vocab_size: int) -> Tokens:
    """Token ids, well mixed from numbers."""
    x = (x + _MIX[2]) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    tokens: Tokens = ((x ^ (x >> np.uint64(31))) % np.uint64(vocab_size)).astype(np.int32)
    return tokens
