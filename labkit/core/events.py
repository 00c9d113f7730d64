"""Everything that changed, in order. Knows events and how to fold them; refuses to know who reacts to them.

The hot path appends one batch a step: plain tuples, whose first item names the event. The classes below are how a log
is *read*. Times are integer nanoseconds.
"""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .why import Waits, Why

if TYPE_CHECKING:
    import pandas

    from .request import Request


@dataclass(frozen=True)
class Event:
    step: int
    now: int


@dataclass(frozen=True)
class Submitted(Event):
    request: str
    num_prompt: int
    max_tokens: int
    priority: int
    parent: str | None


@dataclass(frozen=True)
class Admitted(Event):
    request: str
    row: int
    num_cached: int
    lookup: str  # "full", "partial", "none", "off": a cheap code, BlockManager.explain has the rest


@dataclass(frozen=True)
class Scheduled(Event):
    """From this step on the request computes `num_tokens` a step; written when that changes."""

    request: str
    num_tokens: int


@dataclass(frozen=True)
class Held(Event):
    """From this step on `limit` keeps the request; at the `head` of the queue it keeps everyone behind it as well."""

    request: str
    limit: str
    head: bool


@dataclass(frozen=True)
class Stored(Event):
    hash: str
    parent: str
    block: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Removed(Event):
    hash: str
    block: int
    request: str | None  # for whom it was evicted


@dataclass(frozen=True)
class Cleared(Event):
    pass


@dataclass(frozen=True)
class Copied(Event):
    source: int
    copy: int


@dataclass(frozen=True)
class Forked(Event):
    request: str
    parent: str
    row: int


@dataclass(frozen=True)
class Preempted(Event):
    request: str
    how: str
    needed_by: str  # the request whose tokens needed the blocks
    num_tokens: int  # computed tokens given up, or moved to host memory


@dataclass(frozen=True)
class SwappedOut(Event):
    request: str
    num_blocks: int


@dataclass(frozen=True)
class SwappedIn(Event):
    request: str
    num_blocks: int


@dataclass(frozen=True)
class Resumed(Event):
    request: str
    row: int
    num_cached: int


@dataclass(frozen=True)
class Finished(Event):
    request: str
    reason: str
    num_output: int


@dataclass(frozen=True)
class Aborted(Event):
    request: str
    num_output: int


@dataclass(frozen=True)
class Rejected(Event):
    request: str
    reason: str


@dataclass(frozen=True)
class Control(Event):
    setting: str
    value: str


@dataclass(frozen=True)
class Failed(Event):
    error: str
    num_rows: int


@dataclass(frozen=True)
class Rewound(Event):
    """The log was cut back to this step."""


@dataclass(frozen=True)
class Step(Event):
    """One committed step: tokens by kind, rows, queue and blocks after it."""

    num_rows: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    output_tokens: int
    running: int
    waiting: int
    swapped: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    duration: int


EVENTS: dict[str, type[Event]] = {
    cls.__name__: cls
    for cls in (
        Submitted, Admitted, Scheduled, Held, Stored, Removed, Cleared, Copied, Forked, Preempted, SwappedOut,
        SwappedIn, Resumed, Finished, Aborted, Rejected, Control, Failed, Rewound, Step,
    )
}  # fmt: skip
NAMES = {name: [f.name for f in fields(cls)] for name, cls in EVENTS.items()}


class Batch(NamedTuple):
    """What happened at one moment. `row` is the Step event's columns, in the batch that closes a step."""

    step: int
    now: int
    events: tuple[tuple[Any, ...], ...]
    row: tuple[int, ...] | None


Subscriber = Callable[[list[Batch]], None]


class EventLog:
    """An append-only log, bounded to the latest `keep` events; `keep=None` keeps all.

    What is trimmed has gone into the folds, so that `why` still answers for requests that have not ended.
    """

    def __init__(self, keep: int | None = 200_000) -> None:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"keep must be a positive whole number or None, got {keep!r}")
        self.keep = keep
        self._batches: deque[Batch] = deque()
        self._pending: list[tuple[Any, ...]] = []
        self._unposted: list[Batch] = []
        self._subscribers: list[Subscriber] = []
        self._size = 0
        self._trimmed = Waits()
        self.num_trimmed = 0
        self.add = self._pending.append  # hot: one call an event

    def __getstate__(self) -> dict[str, Any]:
        """Copies and saved engines carry the events, not who listens."""
        state = dict(self.__dict__, _subscribers=[], _unposted=[], _batches=self._batches.copy())
        del state["add"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.add = self._pending.append

    def __deepcopy__(self, memo: dict[int, Any]) -> EventLog:
        """Events are immutable: a copy of the log shares them."""
        twin = EventLog.__new__(EventLog)
        memo[id(self)] = twin
        state = self.__getstate__()
        state["_pending"] = list(self._pending)
        state["_trimmed"] = self._trimmed.copy()
        twin.__setstate__(state)
        return twin

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        trimmed = f", {self.num_trimmed} trimmed" if self.num_trimmed else ""
        steps = sum(batch.row is not None for batch in self._batches)
        return f"EventLog({self._size} events, {steps} steps{trimmed})"

    def flush(self, step: int, now: int, row: tuple[int, ...] | None = None) -> None:
        """Close the moment: what was added since the last flush happened at `now`."""
        pending = self._pending
        if pending:
            batch = Batch(step, now, tuple(pending), row)
            pending.clear()
        elif row is None:
            return
        else:
            batch = Batch(step, now, (), row)
        self._batches.append(batch)
        self._size += _size_of(batch)
        if self._subscribers:
            self._unposted.append(batch)
        if self.keep is not None and self._size > self.keep:
            self._trim()

    def _trim(self) -> None:
        assert self.keep is not None
        for _ in range(64):  # a long way back is caught up over several steps
            if self._size <= self.keep or len(self._batches) == 1:
                break
            batch = self._batches.popleft()
            size = _size_of(batch)
            self._size -= size
            self.num_trimmed += size
            self._trimmed.apply(batch, forget_ended=True)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber(batches)` once a step; returns a function that ends it. One that raises is unsubscribed."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber) if subscriber in self._subscribers else None

    def post(self) -> None:
        """Hand what was flushed since the last post to the subscribers."""
        if not self._unposted:
            return
        batches, self._unposted = self._unposted, []
        for subscriber in list(self._subscribers):
            try:
                subscriber(batches)
            except Exception as error:
                self._subscribers.remove(subscriber)
                warnings.warn(f"{subscriber!r} raised {error!r} and is no longer subscribed", stacklevel=2)

    def __iter__(self) -> Iterator[Event]:
        for step, now, events, row in self._batches:
            for event in events:
                if event[0] in ("Stored", "Removed"):
                    yield from _COLUMNS[event[0]](step, now, *event[1:])
                else:
                    yield _read(step, now, event)
            if row is not None:
                yield Step(step, now, *row)

    def events(self, *kinds: str | type[Event]) -> list[Event]:
        """The events of these kinds, in order; all of them when none is named."""
        names = {kind if isinstance(kind, str) else kind.__name__ for kind in kinds}
        for name in names - EVENTS.keys():
            from .options import closest

            raise ValueError(f"unknown event {name!r}; {closest(name, EVENTS)}")
        return [event for event in self if not names or type(event).__name__ in names]

    def frame(self, kind: str | type[Event] | None = None) -> pandas.DataFrame:
        """A DataFrame, one line an event; of one kind, with that kind's columns only. Needs labkit[lab]."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("frame() needs pandas: pip install 'labkit[lab]'") from error
        chosen = self.events(*([] if kind is None else [kind]))
        records = [{"event": type(event).__name__, **event.__dict__} for event in chosen]
        kinds = EVENTS if kind is None else [kind if isinstance(kind, str) else kind.__name__]
        columns = dict.fromkeys(["step", "now", "event", *(name for one in kinds for name in NAMES[one])])
        frame = pandas.DataFrame.from_records(records, columns=list(columns))
        frame.insert(1, "time", frame.pop("now") / 1e9)
        return frame

    def why(self, request: str | Request) -> Why:
        """Why a request waited: for each step, the limit that bound; and what it was preempted for."""
        waits = self._trimmed.copy()
        for batch in self._batches:
            waits.apply(batch)
        return waits.why(request if isinstance(request, str) else request.id)

    def mark(self) -> int:
        """The place where the log ends now, for `rewind`."""
        return self._size + self.num_trimmed

    def rewind(self, mark: int) -> None:
        """Cut the log back to a mark, and tell the subscribers."""
        if mark < self.num_trimmed:
            raise ValueError("the log was trimmed past that point: give EventLog a larger keep")
        while self._batches and self.mark() > mark:
            batch = self._batches.pop()
            self._size -= _size_of(batch)
        self._pending.clear()
        last = self._batches[-1] if self._batches else Batch(0, 0, (), None)
        if self._subscribers:
            self._unposted = [Batch(last.step, last.now, (("Rewound",),), None)]
            self.post()

    def save(self, file: str | IO[str]) -> None:
        """One JSON object a line. The same events give the same bytes."""
        if isinstance(file, str):
            with open(file, "w", encoding="utf-8", newline="\n") as opened:
                return self.save(opened)
        file.write(json.dumps({"labkit_log": 1, "trimmed": self.num_trimmed}) + "\n")
        for event in self:
            file.write(json.dumps({"event": type(event).__name__, **event.__dict__}, separators=(",", ":")) + "\n")
        return None

    @classmethod
    def load(cls, file: str | IO[str]) -> EventLog:
        """A saved log, ready for every view and fold."""
        if isinstance(file, str):
            with open(file, encoding="utf-8") as opened:
                return cls.load(opened)
        header = file.readline()
        if not header.startswith('{"labkit_log": 1'):
            raise ValueError("this is no labkit event log: its first line should say so")
        log = cls(keep=None)
        moment: tuple[int, int] | None = None
        for number, line in enumerate(file, start=2):
            try:
                record = json.loads(line)
                kind = record.pop("event")
                step, now = record.pop("step"), record.pop("now")
                values = [_written(kind, name, record[name]) for name in NAMES[kind][2:]]
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"line {number} is no event: {error!r}") from error
            if moment is not None and moment != (step, now):
                log.flush(*moment)
            moment = (step, now)
            if kind == "Stored":
                digest, parent, block, ids = values
                log.add((kind, digest, parent, (block,), np.array(ids, np.int32).tobytes()))
            elif kind == "Removed":
                digest, block, request = values
                log.add((kind, digest, (block,), (request,)))
            elif kind == "Step":
                log.flush(step, now, tuple(values))
                moment = None
            else:
                log.add((kind, *values))
        if moment is not None:
            log.flush(*moment)
        return log


def _read(step: int, now: int, event: tuple[Any, ...]) -> Event:
    kind = event[0]
    return EVENTS[kind](step, now, *event[1:])


def _read_stored(step: int, now: int, digests: Any, parents: Any, blocks: Any, tokens: Any) -> Iterator[Event]:
    ids_of = np.frombuffer(tokens, np.int32).reshape(len(blocks), -1).tolist()
    for i, (block, ids) in enumerate(zip(blocks, ids_of, strict=True)):
        at = slice(32 * i, 32 * i + 32)
        yield Stored(step, now, digests[at].hex(), parents[at].hex(), block, tuple(ids))


def _read_removed(step: int, now: int, digests: Any, blocks: Any, requests: Any) -> Iterator[Event]:
    for i, (block, request) in enumerate(zip(blocks, requests, strict=True)):
        yield Removed(step, now, digests[32 * i : 32 * i + 32].hex(), block, request)


_COLUMNS: dict[str, Callable[..., Iterator[Event]]] = {"Stored": _read_stored, "Removed": _read_removed}


def _size_of(batch: Batch) -> int:
    """Events in a batch; the blocks stored together are one tuple of columns, and one event each."""
    size = len(batch.events) + (batch.row is not None)
    for event in batch.events:
        if event[0] in _COLUMNS:
            size += len(event[1]) // 32 - 1
    return size


def _written(kind: str, name: str, value: Any) -> Any:
    """The form an event's field has on the hot path."""
    if kind in ("Stored", "Removed") and name in ("hash", "parent"):
        return bytes.fromhex(value)
    return value
