"""The event log: keeps, saves and loads events, and passes them to subscribers."""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from os import PathLike
from typing import IO, TYPE_CHECKING, Any

from labkit.core.events.types import EVENTS, NAMES, Batch, Event, parse, read, size_of
from labkit.core.events.why import Waits, Why
from labkit.core.frames import table
from labkit.core.options import closest, named_options, whole
from labkit.core.shown import Shown

if TYPE_CHECKING:
    import pandas

    from labkit.core.request import Request

Subscriber = Callable[[list[Batch]], None]


@named_options
class EventLog(Shown):
    """An append-only log of the latest `keep` events; `keep=None` keeps all.

    Running summaries include trimmed events, so `why` still works for requests that have not ended.
    """

    records = True

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
        """Copies and saved engines carry the events, but not the subscribers."""
        fresh = {"_subscribers": [], "_unposted": [], "_batches": self._batches.copy()}
        state = {**vars(self), **fresh}
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
        steps = sum(batch.row is not None for batch in self.batches())
        return f"EventLog({self._size} events, {steps} steps{trimmed})"

    def correct(self, event: tuple[Any, ...]) -> None:
        """Replace the event of this kind and request that was added since the last flush, if there is one."""
        for i, other in enumerate(self._pending):
            if other[:2] == event[:2]:
                self._pending[i] = event

    def flush(self, step: int, now: int, row: tuple[int, ...] | None = None) -> None:
        """End the current moment: everything added since the last flush happened at `now`."""
        pending = self._pending
        if pending:
            batch = Batch(step, now, tuple(pending), row)
            pending.clear()
        elif row is None:
            return
        else:
            batch = Batch(step, now, (), row)
        self._batches.append(batch)
        self._size += size_of(batch)
        if self._subscribers:
            self._unposted.append(batch)
        if self.keep is not None and self._size > self.keep:
            self._trim()

    def _trim(self) -> None:
        assert self.keep is not None
        for _ in range(64):  # a long backlog is trimmed over several steps
            if self._size <= self.keep or len(self._batches) == 1:
                break
            batch = self._batches.popleft()
            size = size_of(batch)
            self._size -= size
            self.num_trimmed += size
            self._trimmed.apply(batch, forget_ended=True)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber(batches)` once a step; returns a function that unsubscribes. A subscriber that raises is
        unsubscribed."""
        if not callable(subscriber):
            raise TypeError(f"a subscriber is a function of a step's batches, got {subscriber!r}")
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber) if subscriber in self._subscribers else None

    def post(self) -> None:
        """Pass what was flushed since the last post to the subscribers."""
        if not self._unposted:
            return
        batches, self._unposted = self._unposted, []
        for subscriber in list(self._subscribers):
            try:
                subscriber(batches)
            except Exception as error:  # a user's function may raise anything, and the step must go on
                if subscriber in self._subscribers:  # it may have unsubscribed itself
                    self._subscribers.remove(subscriber)
                warnings.warn(f"{subscriber!r} raised {error!r} and is no longer subscribed", stacklevel=2)

    def __iter__(self) -> Iterator[Event]:
        for batch in self.batches():  # a copy: reader and writer may be different threads
            yield from read(batch)

    def batches(self) -> list[Batch]:
        """The kept batches as they were written; faster than event objects. Callable from any thread."""
        return list(self._batches)

    def events(self, *kinds: str | type[Event]) -> list[Event]:
        """The events of these kinds in order; without arguments, all events."""
        names = {kind if isinstance(kind, str) else kind.__name__ for kind in kinds}
        for name in names - EVENTS.keys():
            raise ValueError(f"unknown event {name!r}; {closest(name, EVENTS)}")
        return [event for event in self if not names or type(event).__name__ in names]

    def frame(self, kind: str | type[Event] | None = None) -> pandas.DataFrame:
        """A DataFrame with one row per event; for a single kind, with that kind's columns only. Needs labkit[lab]."""
        chosen = self.events(*([] if kind is None else [kind]))
        records = [{"event": type(event).__name__, **event.__dict__} for event in chosen]
        kinds = EVENTS if kind is None else [kind if isinstance(kind, str) else kind.__name__]
        columns = dict.fromkeys(["step", "now", "event", *(name for one in kinds for name in NAMES[one])])
        frame = table([[record.get(name) for name in columns] for record in records], list(columns))
        frame.insert(1, "time", frame.pop("now") / 1e9)
        return frame

    def why(self, request: str | Request) -> Why:
        """Why a request waited: the limit that held it in each step, and for which request it was preempted."""
        waits = self._trimmed.copy()
        for batch in self.batches():
            waits.apply(batch)
        id = getattr(request, "id", request)
        if not isinstance(id, str):
            raise TypeError(f"why takes a request or its id, got {request!r}")
        return waits.why(id)

    def mark(self) -> int:
        """The current end of the log, for `rewind`."""
        return self._size + self.num_trimmed

    def rewind(self, mark: int) -> None:
        """Cut the log back to a mark, and tell the subscribers."""
        if mark < self.num_trimmed:
            raise ValueError("the log was trimmed past that point: give EventLog a larger keep")
        while self._batches and self.mark() > mark:
            batch = self._batches.pop()
            self._size -= size_of(batch)
        self._pending.clear()
        last = self._batches[-1] if self._batches else Batch(0, 0, (), None)
        if self._subscribers:
            self._unposted = [Batch(last.step, last.now, (("Rewound",),), None)]
            self.post()

    def save(self, file: str | PathLike[str] | IO[str]) -> None:
        """One JSON object a line. The same events give the same bytes."""
        if isinstance(file, (str, PathLike)):
            with open(file, "w", encoding="utf-8", newline="\n") as opened:
                return self.save(opened)
        file.write(json.dumps({"labkit_log": 1, "trimmed": self.num_trimmed}) + "\n")
        for event in self:
            file.write(json.dumps({"event": type(event).__name__, **event.__dict__}, separators=(",", ":")) + "\n")
        return None

    def perfetto(self, file: str | PathLike[str] | IO[str]) -> None:
        """Save the run as a trace: open the file in ui.perfetto.dev or chrome://tracing.

        >>> engine.log.perfetto("run.json")
        """
        from labkit.core.events.perfetto import write

        if isinstance(file, (str, PathLike)):
            with open(file, "w", encoding="utf-8", newline="\n") as opened:
                return write(self.batches(), opened)
        return write(self.batches(), file)

    @classmethod
    def load(cls, file: str | PathLike[str] | IO[str]) -> EventLog:
        """A saved log; works with every view and summary."""
        if isinstance(file, (str, PathLike)):
            with open(file, encoding="utf-8") as opened:
                try:
                    return cls.load(opened)
                except ValueError as error:
                    raise ValueError(f"{file}: {error}") from None
        log = cls(keep=None)
        log.num_trimmed = _read_header(file.readline())
        moment: tuple[int, int] | None = None
        for number, line in enumerate(file, start=2):
            try:
                step, now, event = parse(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} is not an event: {error}") from error
            if moment is not None and moment != (step, now):
                log.flush(*moment)
            moment = (step, now)
            if event[0] == "Step":
                log.flush(step, now, event[1:])
                moment = None
            else:
                log.add(event)
        if moment is not None:
            log.flush(*moment)
        return log


def _read_header(line: str) -> int:
    """How many events were trimmed before this log was saved."""
    try:
        header = json.loads(line)
        if header["labkit_log"] == 1:
            return whole("trimmed", header["trimmed"], least=0)
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError("this is not a labkit event log: its first line is no log header")


class NoLog(EventLog):
    """Keeps nothing and tells nobody, so that long simulations spend no time on events."""

    records = False

    def __init__(self) -> None:
        super().__init__(keep=1)
        self.add = _ignore

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.add = _ignore

    def __repr__(self) -> str:
        return "NoLog()"

    def flush(self, step: int, now: int, row: tuple[int, ...] | None = None) -> None:
        pass

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        raise ValueError("a NoLog has no events to subscribe to: use an EventLog")


def _ignore(event: tuple[Any, ...]) -> None:
    pass
