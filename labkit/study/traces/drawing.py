"""How traces are drawn: random numbers from one seed, new texts, arrival times, and sessions whose requests follow
answers. Knows no kind of workload."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from labkit.bench.workload import Range
from labkit.core.options import real, whole
from labkit.study.traces.content import Part, num_tokens, part_hashes, part_tokens
from labkit.study.traces.trace import Trace, TraceRequest


class Source:
    """One pass: random numbers, numbers for new texts, arrival times."""

    def __init__(self, seed: int, rate: float, burstiness: float) -> None:
        self.random = random.Random(seed)
        self.arrivals = random.Random(seed + 2**32)  # of its own: lengths do not change with the rate
        self.rate, self.burstiness = rate, burstiness
        self.fresh = itertools.count(1)

    def length(self, span: Range) -> int:
        return self.random.randint(*span)

    def text(self, span: Range) -> Part:
        """A text that has not been seen before."""
        return Part(next(self.fresh), self.length(span))

    def gap(self) -> float:
        """Seconds to the next arrival."""
        return self.arrivals.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))


def checked_range(name: str, span: Range) -> Range:
    low, high = span
    whole(f"the end of {name}", high, least=whole(f"the beginning of {name}", low, least=1))
    return low, high


def check_common(rate: float, burstiness: float, block_size: int, vocab_size: int | None, seed: int) -> None:
    real("rate", rate, least=0.0, open_left=True)
    real("burstiness", burstiness, least=0.0, open_left=True)
    whole("block_size", block_size, least=1)
    if vocab_size is not None:
        whole("vocab_size", vocab_size, least=2)
    whole("seed", seed, least=0)


def make_request(
    i: int, now: float, parts: list[Part], output: int, fields: dict[str, Any], block_size: int, vocab_size: int | None
) -> TraceRequest:
    tokens = None if vocab_size is None else part_tokens(parts, vocab_size)
    fields.setdefault("id", str(i))
    return TraceRequest(now, num_tokens(parts), output, part_hashes(parts, block_size), tokens, **fields)


class Call(NamedTuple):
    """A request of a session. `go_on(id, what was said, when answered)` gives those that follow: (time, request)."""

    parts: list[Part]
    output: int
    fields: dict[str, Any]
    go_on: Callable[[str, list[Part], float], list[tuple[float, Call]]]


def sessions_trace(
    name: str, num: int, begin: Callable[[Source], Callable[[Source, int], Call]], token_seconds: float, rate: float,
    burstiness: float, block_size: int, vocab_size: int | None, seed: int,
) -> Trace:  # fmt: skip
    """Sessions whose requests follow answers. In memory are the sessions that go on."""
    whole("num", num, least=1)
    real("token_seconds", token_seconds, least=0.0)
    check_common(rate, burstiness, block_size, vocab_size, seed)

    def source() -> Iterator[tuple[str, TraceRequest]]:
        drawn = Source(seed, rate, burstiness)
        first = begin(drawn)
        due: list[tuple[float, int, Call]] = []
        order, begun, next_begin, i = itertools.count(), 0, 0.0, 0
        while due or begun < num:
            while begun < num and (not due or next_begin <= due[0][0]):
                heapq.heappush(due, (next_begin, next(order), first(drawn, begun)))
                begun += 1
                next_begin += drawn.gap()
            now, _, call = heapq.heappop(due)
            request = make_request(i, now, call.parts, call.output, call.fields, block_size, vocab_size)
            yield f"request {i}", request
            answered = now + token_seconds * call.output
            said = [*call.parts, Part(next(drawn.fresh), call.output)]
            for later, follower in call.go_on(str(i), said, answered):
                heapq.heappush(due, (later, next(order), follower))
            i += 1

    return Trace(f"{name}, {rate:g}/s", source, block_size=block_size)
