"""Traces: requests as they arrived somewhere, one record type for every source. A trace is read as a stream, again and
again; it keeps no requests in memory and does not know file formats."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.sessions import Hint, Turn
from labkit.core.options import whole

ERRORS = ("raise", "skip")
MOST_TOKENS = 2**40  # of one prompt or output; more is a damaged line


class TraceRequest(NamedTuple):
    """One request of a trace.

    `hashes` are its prompt's block hashes, one for each block of the trace's `block_size` tokens, a partial last block
    included. Each stands for its tokens and all before them, so equal hashes mean equal prefixes.
    """

    arrival: float  # seconds
    num_prompt: int
    num_output: int
    hashes: Sequence[int] = ()
    tokens: Sequence[int] | None = None
    id: str | None = None
    session: str | None = None  # a conversation
    tenant: str | None = None
    parent: str | None = None  # id of the request whose answer this one continues
    think: float | None = None  # seconds between that answer and this request
    kind: str | None = None
    parent_session: str | None = None  # the session that this one works for
    hint: Hint | None = None  # what the session does after the answer

    @property
    def turn(self) -> Turn | None:
        """What it says of its session."""
        return None if self.session is None else Turn(self.session, self.parent_session, self.hint)


class BadRequestError(ValueError):
    """A request that a trace cannot hold. `reason` is a short phrase to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class Excluded:
    """What one pass over a trace left out: how many requests for each reason, and the first place of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        if not self.counts:
            return "nothing excluded"
        each = (f"{count:,} {reason} (first at {self.first[reason]})" for reason, count in self.counts.items())
        return f"{len(self):,} excluded: {', '.join(each)}"


@dataclass(frozen=True)
class Columns:
    """Requests as columns. Request i has `hashes[indptr[i] : indptr[i + 1]]`. Sessions are numbers to compare; a
    request without one is a session of its own."""

    arrival: NDArray[np.float64]  # [requests]
    num_prompt: NDArray[np.int64]
    num_output: NDArray[np.int64]
    indptr: NDArray[np.int64]  # [requests + 1]
    hashes: NDArray[np.int64]
    session: NDArray[np.int64]  # [requests]
    tenant: tuple[str | None, ...]
    turns: tuple[Turn | None, ...] | None = None  # of sessions, if any request names one

    def __len__(self) -> int:
        return len(self.arrival)


Source = Callable[[], Iterator["tuple[str, TraceRequest | BadRequestError]"]]


class Trace:
    """A stream of requests in order of arrival, which can be read any number of times.

    `source()` starts a pass: it yields (place, request), or (place, error) for what it could not read. Every request is
    checked: lengths and times are not negative, times do not go backwards, there are as many hashes as blocks. With
    `errors="raise"` the first bad one ends the pass; with "skip" it is counted in `excluded`, which describes the
    last pass.

    >>> requests = [TraceRequest(0.0, 40, 8, (1, 2, 3)), TraceRequest(1.5, 20, 8, (1, 4))]
    >>> trace = Trace.of(requests, block_size=16)
    >>> trace
    Trace(requests: blocks of 16 tokens)
    >>> [request.num_prompt for request in trace]
    [40, 20]
    """

    def __init__(self, name: str, source: Source, *, block_size: int | None = None, errors: str = "raise") -> None:
        if errors not in ERRORS:
            raise ValueError(f"errors must be 'raise' or 'skip', got {errors!r}")
        self.name, self.source, self.errors = name, source, errors
        self.block_size = None if block_size is None else whole("block_size", block_size, least=1, most=2**20)
        self.excluded = Excluded()

    @classmethod
    def of(
        cls, requests: Sequence[TraceRequest], *, name: str = "requests", block_size: int | None = None,
        errors: str = "raise",
    ) -> Trace:  # fmt: skip
        """A trace of requests that are in memory."""

        def source() -> Iterator[tuple[str, TraceRequest | BadRequestError]]:
            for i, request in enumerate(requests):
                yield f"request {i}", request

        return cls(name, source, block_size=block_size, errors=errors)

    def __repr__(self) -> str:
        blocks = f"blocks of {self.block_size} tokens" if self.block_size else "no block hashes"
        left = f"; {self.excluded}" if self.excluded else ""
        return f"Trace({self.name}: {blocks}{left})"

    def __iter__(self) -> Iterator[TraceRequest]:
        excluded = self.excluded = Excluded()
        block_size, latest, num_good = self.block_size, 0.0, 0
        for place, request in self.source():
            try:
                if isinstance(request, BadRequestError):
                    raise request
                _check(request, latest, block_size)
            except BadRequestError as error:
                if self.errors == "raise":
                    raise ValueError(f"{self.name}, {place}: {error}; errors='skip' counts such requests") from None
                excluded.add(error.reason, place)
                continue
            latest = request.arrival
            num_good += 1
            yield request
        if not num_good:
            left = f" ({excluded})" if excluded else ""
            raise ValueError(f"{self.name} has no requests{left}")

    def columns(self, size: int = 4096) -> Iterator[Columns]:
        """One pass, `size` requests at a time as arrays.

        >>> trace = Trace.of([TraceRequest(0.0, 40, 8, (1, 2, 3)), TraceRequest(1.5, 20, 8, (1, 4))], block_size=16)
        >>> for columns in trace.columns():
        ...     print(columns.num_prompt, columns.indptr, columns.hashes)
        [40 20] [0 3 5] [1 2 3 1 4]
        """
        requests, begin = iter(self), 0
        while some := list(islice(requests, size)):
            yield _columns(some, begin)
            begin += len(some)

    def head(self, num: int = 5) -> list[TraceRequest]:
        """The first requests."""
        return list(islice(self, whole("num", num, least=0)))

    def first(self, num: int) -> Trace:
        """The trace that ends after `num` requests.

        >>> trace = Trace.of([TraceRequest(float(i), 8, 1) for i in range(9)])
        >>> len(list(trace.first(3)))
        3
        """
        whole("num", num, least=1)

        def source() -> Iterator[tuple[str, TraceRequest | BadRequestError]]:
            found = 0
            for place, request in self.source():
                yield place, request
                found += not isinstance(request, BadRequestError)
                if found == num:
                    return

        return Trace(f"{self.name}, first {num}", source, block_size=self.block_size, errors=self.errors)


def session_numbers(names: Sequence[str | None], begin: int) -> NDArray[np.int64]:
    """A number for each session, to compare. Requests without one, of which the first is the `begin`-th of its trace,
    have numbers of their own."""
    if not any(names):
        return -np.arange(begin + 1, begin + len(names) + 1)
    return np.array([hash(name) & (2**62 - 1) if name else -i for i, name in enumerate(names, begin + 1)], np.int64)


def _columns(requests: list[TraceRequest], begin: int) -> Columns:
    hashes: array[int] = array("q")
    ends = array("q", [0])
    for request in requests:
        hashes.extend(request.hashes)
        ends.append(len(hashes))
    arrival, num_prompt, num_output, _, _, _, session, tenant, *_ = zip(*requests, strict=True)
    turns = tuple(request.turn for request in requests) if any(session) else None
    return Columns(
        np.array(arrival, np.float64),
        np.array(num_prompt, np.int64),
        np.array(num_output, np.int64),
        np.frombuffer(ends, np.int64),
        np.frombuffer(hashes, np.int64) if hashes else np.zeros(0, np.int64),
        session_numbers(session, begin),
        tenant,
        turns,
    )


def _check(request: TraceRequest, latest: float, block_size: int | None) -> None:
    arrival, num_prompt, num_output, hashes = request[:4]
    if not arrival >= latest:  # also nan
        if not arrival >= 0:
            raise BadRequestError("negative time", f"{arrival}")
        raise BadRequestError("time goes backwards", f"{arrival:g} s after {latest:g} s; sort the trace")
    if arrival == float("inf"):
        raise BadRequestError("time is not finite", "")
    if not (0 < num_prompt <= MOST_TOKENS):
        raise BadRequestError("no prompt" if num_prompt == 0 else "impossible length", f"{num_prompt} prompt tokens")
    if not (0 <= num_output <= MOST_TOKENS):
        raise BadRequestError("impossible length", f"{num_output} output tokens")
    if block_size is not None:
        wanted = -(-num_prompt // block_size)
        if len(hashes) != wanted:
            raise BadRequestError(
                "hashes disagree with length",
                f"{num_prompt} tokens are {wanted} blocks of {block_size}, and there are {len(hashes)} hashes",
            )
        if len(set(hashes)) != wanted:
            raise BadRequestError("repeated hash", "a chained hash stands for one place only")
