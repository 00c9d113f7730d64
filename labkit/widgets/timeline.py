"""Turns an event log into segments: for each request, what state it was in from when to when.

`segments(log)` processes a whole log. `Timeline` does the same batch by batch while a run goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

from labkit.core.events.log import EventLog
from labkit.core.events.types import Batch

KINDS = (
    "queued",  # submitted, and without a row so far
    "prefill",  # computes its prompt
    "decode",  # computes a token a step
    "held",  # has a row but computes nothing: `why` names the limit
    "preempted",  # lost its row; its tokens are to be computed again
    "swapped",  # lost its row; its blocks are in host memory
    "recompute",  # computes what a preemption took
    "finished",
    "aborted",
    "rejected",
)
ENDS = frozenset(("finished", "aborted", "rejected"))
WAITS = frozenset(("queued", "preempted", "swapped"))


class Segment(NamedTuple):
    """`request` was in one state from `begin` to `end` (ns). An end such as "finished" is a segment of zero length."""

    request: str
    kind: str
    begin: int
    end: int  # of an open segment: the latest time that the log knows
    note: str
    step: int  # the step it began in
    limits: tuple[tuple[str, int], ...] = ()  # what held it, longest first: (limit, ns)
    is_open: bool = False

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e9

    @property
    def why(self) -> str:
        """The note, and what held the request for how long."""
        if not self.limits:
            return self.note
        held = "held by " + ", ".join(f"{limit} {ns / 1e9:.4g} s" for limit, ns in self.limits)
        return f"{self.note}; {held}" if self.note else held

    def __repr__(self) -> str:
        over = "..." if self.is_open else f"{self.end / 1e9:.6f} s"
        why = f": {self.why}" if self.why else ""
        return f"Segment({self.request!r} {self.kind} {self.begin / 1e9:.6f} to {over}{why})"


def log_of(given: Any) -> EventLog:
    """An event log, from a log, an engine, or a saved log's file."""
    if isinstance(given, (str, PathLike)):
        return EventLog.load(given)
    log = given if isinstance(given, EventLog) else getattr(given, "log", None)
    if not isinstance(log, EventLog):
        raise TypeError(f"an EventLog, an engine or the file of a saved log is needed, got {given!r}")
    return log


def id_of(request: Any) -> str:
    """A request's id, or the id itself."""
    id = getattr(request, "id", request)
    if not isinstance(id, str):
        raise TypeError(f"a request or its id is needed, got {request!r}")
    return id


def segments(log: Any, names: Iterable[str] | None = None) -> list[Segment]:
    """All segments of a log or an engine's log, by request in order of submission, then by time; only of the named
    requests, if any are named.

    >>> segments(engine.log)[0]
    Segment('r1' prefill 0.000000 to 0.001000 s: 81 prompt tokens, 0 from the cache)
    """
    found = Timeline(log_of(log)).segments()
    if names is None:
        return found
    wanted = set(names)
    return [segment for segment in found if segment.request in wanted]


@dataclass(slots=True)
class _Track:
    """The current state of one live request."""

    order: int
    kind: str
    begin: int
    step: int
    why: str = ""
    num_prompt: int | None = None
    spans: list[str] = field(default_factory=list)  # what its prompt holds besides text
    before: str = "decode"  # what it did before it was held
    waited: dict[str, int] = field(default_factory=dict)  # limit -> ns, in this segment
    base: dict[str, int] | None = None  # the queue clock when this segment began to follow it; None: it does not
    limit: str | None = None  # what holds it on its own
    since: int = 0
    drafted: int = 0  # guesses that were verified in this segment
    accepted: int = 0


class _QueueClock:
    """How long each limit has held the head of the queue, and with it everyone behind."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self.limit: str | None = None
        self.since = 0

    def change(self, now: int, limit: str | None) -> None:
        self.total = self.at(now)
        self.limit, self.since = limit, now

    def at(self, now: int) -> dict[str, int]:
        total = dict(self.total)
        if self.limit is not None:
            total[self.limit] = total.get(self.limit, 0) + now - self.since
        return total


class Timeline:
    """The running state. `apply(batch)` costs O(1) an event.

    With a `log` it starts with what the log holds, and processes the log again after a rewind. Without one, a rewind
    makes it forget everything. At most the latest `keep` closed segments are kept.

    >>> timeline = Timeline(engine.log)
    >>> stop = engine.log.subscribe(lambda batches: [timeline.apply(batch) for batch in batches])
    >>> timeline.segments()
    """

    def __init__(self, log: EventLog | None = None, keep: int | None = None) -> None:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"keep must be a positive whole number or None, got {keep!r}")
        self.log, self.keep = log, keep
        self._forget()
        if log is not None:
            self._fold(log)

    def __repr__(self) -> str:
        return f"Timeline({len(self._closed)} segments, {len(self._tracks)} live requests, {self.now / 1e9:.6f} s)"

    def _forget(self) -> None:
        self.now = 0
        self._closed: deque[tuple[int, Segment]] = deque(maxlen=self.keep)
        self._tracks: dict[str, _Track] = {}
        self._queue: set[str] = set()  # the requests that follow the queue clock
        self._clock = _QueueClock()
        self._head: tuple[str, str] | None = None  # the latest head that was held, and by what
        self._num_seen = 0
        self._ahead: dict[int, Batch] = {}

    def _fold(self, log: EventLog) -> None:
        batches = log.batches()
        for batch in batches:
            self._apply(batch)
        self._ahead = {id(batch): batch for batch in batches[-64:]}  # may be posted to us yet

    def apply(self, batch: Batch) -> None:
        """Process one batch."""
        if self._ahead:
            if id(batch) in self._ahead:
                return
            self._ahead.clear()
        self._apply(batch)

    def _apply(self, batch: Batch) -> None:
        self.now = max(self.now, batch.now)
        for event in batch.events:
            kind = event[0]
            if kind == "Scheduled":
                self._scheduled(batch, *event[1:])
            elif (handler := _HANDLERS.get(kind)) is not None:
                handler(self, batch, *event[1:])

    def segments(self) -> list[Segment]:
        """Closed and open segments, by request in order of submission, then by time."""
        found = [*self._closed, *((track.order, self._open(name, track)) for name, track in self._tracks.items())]
        found.sort(key=lambda item: item[0])  # stable: a request's own are in order already
        return [segment for _, segment in found]

    # -- segments open and close ---------------------------------------------------------------------------------

    def _track(self, name: str, batch: Batch, kind: str = "queued") -> _Track:
        """The live request of this name. If its beginning was trimmed from the log, it starts here."""
        track = self._tracks.get(name)
        if track is None:
            track = self._tracks[name] = _Track(self._num_seen, kind, batch.now, batch.step)
            self._num_seen += 1
            if kind in WAITS:
                self._follow(name, track, batch.now)
        return track

    def _turn(self, name: str, kind: str, batch: Batch, why: str = "") -> _Track:
        """From here on the request is in state `kind`."""
        track = self._track(name, batch)
        self._close(name, track, batch.now)
        track.kind, track.begin, track.step, track.why = kind, batch.now, batch.step, why
        if kind in WAITS:
            self._follow(name, track, batch.now)
        return track

    def _close(self, name: str, track: _Track, now: int) -> None:
        self._settle(name, track, now)
        if now > track.begin:
            self._closed.append((track.order, self._segment(name, track, now, track.waited)))
        track.waited = {}
        track.drafted = track.accepted = 0

    def _open(self, name: str, track: _Track) -> Segment:
        waited = dict(track.waited)
        _add(waited, self._running_wait(track, self.now))
        return self._segment(name, track, self.now, waited, is_open=True)

    def _segment(self, name: str, track: _Track, end: int, waited: dict[str, int], is_open: bool = False) -> Segment:
        limits: tuple[tuple[str, int], ...] = ()
        why = track.why
        if track.drafted:
            share = f"{track.accepted:,} of {track.drafted:,} drafted tokens accepted"
            why = f"{why}; {share}" if why else share
        if waited:
            limits = tuple(sorted((item for item in waited.items() if item[1] > 0), key=lambda item: -item[1]))
        return Segment(name, track.kind, track.begin, end, why, track.step, limits, is_open)

    def _end(self, name: str, kind: str, batch: Batch, why: str) -> None:
        track = self._track(name, batch, "decode")
        self._close(name, track, batch.now)
        self._closed.append((track.order, Segment(name, kind, batch.now, batch.now, why, batch.step)))
        del self._tracks[name]

    # -- what holds waiting requests -----------------------------------------------------------------------------

    def _follow(self, name: str, track: _Track, now: int) -> None:
        """The request is in the queue, so what holds the head of the queue holds it."""
        if not self._queue:  # the limit of an earlier head does not apply to this one, unless it is the same request
            again = self._head is not None and self._head[0] == name
            self._clock.change(now, self._head[1] if again and self._head is not None else None)
        self._queue.add(name)
        track.base, track.limit = self._clock.at(now), None

    def _running_wait(self, track: _Track, now: int) -> dict[str, int]:
        if track.limit is not None:
            return {track.limit: now - track.since}
        if track.base is not None:
            base = track.base
            return {limit: ns - base.get(limit, 0) for limit, ns in self._clock.at(now).items()}
        return {}

    def _settle(self, name: str, track: _Track, now: int) -> None:
        """Whatever has held it ends now."""
        _add(track.waited, self._running_wait(track, now))
        track.limit = track.base = None
        self._queue.discard(name)

    # -- events --------------------------------------------------------------------------------------------------

    def _submitted(self, batch: Batch, name: str, num_prompt: int, _most: int, _rank: int, parent: str | None) -> None:
        self._tracks.pop(name, None)
        track = self._track(name, batch)
        track.num_prompt = num_prompt
        if parent is not None:
            self._apart(name, track, "parent's prompt", batch.now)

    def _spanned(self, batch: Batch, name: str, kind: str, start: int, length: int, digest: str) -> None:
        track = self._track(name, batch)
        track.spans.append(f"{kind} {digest} at {start}-{start + length - 1}")
        if track.kind == "queued":
            track.why = _listed(track.spans)

    def _held(self, batch: Batch, name: str, limit: str, head: bool) -> None:
        if head:
            self._head = (name, limit)
            self._clock.change(batch.now, limit)
        track = self._track(name, batch)
        if track.kind not in WAITS:
            track.before = track.kind if track.kind != "held" else track.before
            self._turn(name, "held", batch, limit)
        elif head or limit == "order":
            if track.limit is not None:  # its own hold is over: the queue holds it again
                self._settle(name, track, batch.now)
                self._follow(name, track, batch.now)
        else:
            self._apart(name, track, limit, batch.now)

    def _apart(self, name: str, track: _Track, limit: str, now: int) -> None:
        self._settle(name, track, now)
        track.limit, track.since = limit, now

    def _admitted(self, batch: Batch, name: str, _row: int, num_cached: int, _lookup: str) -> None:
        track = self._track(name, batch)
        prompt = f"{track.num_prompt} prompt tokens, " if track.num_prompt is not None else ""
        listed = f", {_listed(track.spans)}" if track.spans else ""
        self._turn(name, "prefill", batch, f"{prompt}{num_cached} from the cache{listed}")

    def _resumed(self, batch: Batch, name: str, _row: int, num_kept: int) -> None:
        self._turn(name, "recompute", batch, f"{num_kept} tokens were still there")

    def _forked(self, batch: Batch, name: str, parent: str, _row: int) -> None:
        self._turn(name, "decode", batch, f"forked from {parent!r}")

    def _scheduled(self, batch: Batch, name: str, num_tokens: int) -> None:
        track = self._track(name, batch, "decode" if num_tokens == 1 else "prefill")
        if batch.row is not None and track.kind in (
            "prefill",
            "recompute",
        ):  # logged at the end of a step: it sampled a token
            self._turn(name, "decode", batch, "a token a step")
        elif track.kind == "held":
            self._turn(name, track.before, batch)

    def _drafted(self, batch: Batch, name: str, num_drafts: int, num_accepted: int) -> None:
        track = self._track(name, batch, "decode")
        track.drafted += num_drafts
        track.accepted += num_accepted

    def _preempted(self, batch: Batch, name: str, how: str, needed_by: str, num_tokens: int) -> None:
        whom = (
            f"for {needed_by!r}" if needed_by and needed_by != name else "for itself" if needed_by else "a step failed"
        )
        what = "to move back" if how == "swap" else "to compute again"
        self._turn(name, "preempted", batch, f"{whom}, {num_tokens} tokens {what}")

    def _swapped_out(self, batch: Batch, name: str, num_blocks: int) -> None:
        why = self._track(name, batch).why
        self._turn(name, "swapped", batch, why or f"{num_blocks} blocks in host memory")

    def _finished(self, batch: Batch, name: str, reason: str, num_output: int) -> None:
        self._end(name, "finished", batch, f"{reason}, {num_output} tokens")

    def _aborted(self, batch: Batch, name: str, num_output: int) -> None:
        self._end(name, "aborted", batch, f"{num_output} tokens")

    def _rejected(self, batch: Batch, name: str, reason: str) -> None:
        self._end(name, "rejected", batch, reason)

    def _rewound(self, batch: Batch) -> None:
        self._forget()
        if self.log is not None:
            self._fold(self.log)


def _listed(spans: list[str], most: int = 3) -> str:
    return ", ".join(spans[:most]) + (f", and {len(spans) - most} more" if len(spans) > most else "")


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for limit, ns in more.items():
        total[limit] = total.get(limit, 0) + ns


_HANDLERS: dict[str, Callable[..., Any]] = {
    "Submitted": Timeline._submitted,
    "Spanned": Timeline._spanned,
    "Held": Timeline._held,
    "Admitted": Timeline._admitted,
    "Resumed": Timeline._resumed,
    "Forked": Timeline._forked,
    "Drafted": Timeline._drafted,
    "Preempted": Timeline._preempted,
    "SwappedOut": Timeline._swapped_out,
    "Finished": Timeline._finished,
    "Aborted": Timeline._aborted,
    "Rejected": Timeline._rejected,
    "Rewound": Timeline._rewound,
}
