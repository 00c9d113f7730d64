"""A run as columns for live figures: one entry a step and one row a request of the batch, built from events.

The engine's thread only appends batches to a deque. The drawing thread calls `catch_up`, which processes them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from labkit.core.events.log import EventLog
from labkit.core.events.types import NAMES, Batch
from labkit.widgets.timeline import Segment, Timeline

COLUMNS = tuple(NAMES["Step"][2:])  # a Step event's own numbers
COUNTED = ("Finished", "Preempted")
KEEP = 4096  # steps
STRETCHES = 48  # stretches of a window, for rates and percentiles: a single step is too short for them
IDLE = 0.02  # a gap between steps longer than this share of the window is idle time


@dataclass(frozen=True)
class Window:
    """Some steps, reduced to about `points` points: a point is the mean of its steps, or their last value where that is
    better.

    Where the engine was idle there is one more point, at the end of the idle time: no tokens, and the blocks and
    requests of before.
    """

    time: np.ndarray  # s, of each point's last step
    step: np.ndarray
    columns: dict[str, np.ndarray]
    pace: Pace

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True)
class Pace:
    """Speed over a few dozen stretches of the window, none of them across an idle time; nan where there is no value."""

    time: np.ndarray  # s, of each stretch's end
    seconds: np.ndarray  # that it took, without idle time before it
    tokens: np.ndarray  # output tokens
    ttft: np.ndarray  # [stretches, 2]: p50 and p90 of requests that got their first token there
    itl: np.ndarray  # [stretches, 2]: p50 and p90 of the time between two tokens of a decoding request
    breaks: np.ndarray  # s: when idle times ended; no line crosses them


class Rank(NamedTuple):
    """A process that computes a part of the model; `busy` and `waited` are shares of its time."""

    rank: int
    stage: int
    layers: int
    weight_bytes: int
    kv_bytes: int
    busy: float
    waited: float


class Feed:
    """Columns of the latest `keep` steps, and a timeline of the requests.

    >>> feed = Feed(engine.log)
    >>> engine.step()
    >>> feed.catch_up()
    1
    """

    def __init__(self, log: EventLog, keep: int = KEEP) -> None:
        self.log = log
        self.keep = keep
        self.timeline = Timeline(keep=20_000)
        self.inbox: deque[Batch] = deque()
        self._forget()
        self._unsubscribe = log.subscribe(self.inbox.extend)  # the only work in the engine's thread
        self._begin(log.batches())

    def __repr__(self) -> str:
        return f"Feed({self.num_steps} steps, {len(self.inbox)} batches waiting)"

    def close(self) -> None:
        """Stop listening; what was processed stays."""
        self._unsubscribe()

    def _forget(self) -> None:
        self.num_steps = 0  # processed so far; the latest `keep` are here
        self.counts: Counter[str] = Counter()  # events by name
        self.block_size = 16
        # a step's number, its time, a Step event's columns, and COUNTED until then
        self._steps = np.zeros((self.keep, 2 + len(COLUMNS) + len(COUNTED)), np.int64)
        self._first_tokens: deque[tuple[int, float]] = deque(maxlen=self.keep)  # (ns, s since submission)
        self._submitted: dict[str, int] = {}
        self._row_of: dict[str, int] = {}
        self._tokens = np.zeros(8, np.int64)  # computed so far, by row
        self._rate = np.zeros(8, np.int64)  # computed in a step, by row
        self._cached = np.zeros(8, np.int64)  # of which these were found in the cache
        self._rows: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=self.keep)  # (tokens, cached) after each step
        self._changes: list[tuple[int, int, int]] = []  # (from this step on, row, tokens a step)
        self._loads: deque[tuple[int, ...]] = deque(maxlen=self.keep)  # (ns, RankLoad's own columns)
        self._forks: list[tuple[int, int]] = []  # (row, its parent's), in the step that is being folded
        self._known: set[int] = set()

    def _begin(self, batches: list[Batch]) -> None:
        """Process what the log already holds; some of it may also still be posted to this feed."""
        self._apply(batches)
        self._known = {id(batch) for batch in batches[-64:]}

    # -- processing ----------------------------------------------------------------------------------------------

    def catch_up(self) -> int:
        """Process new events; returns how many steps they were."""
        before = self.num_steps
        batches = []
        while self.inbox:
            batches.append(self.inbox.popleft())
        self._apply(batches)
        return self.num_steps - before if self.num_steps >= before else self.num_steps

    def _apply(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            if self._known:
                if id(batch) in self._known:
                    continue
                self._known.clear()
            self.timeline.apply(batch)
            for event in batch.events:
                self.counts[event[0]] += 1
                handler = _HANDLERS.get(event[0])
                if handler is not None:
                    handler(self, batch, *event[1:])
            if batch.row is not None:
                self._step(batch)

    def _step(self, batch: Batch) -> None:
        assert batch.row is not None
        for change in self._changes:
            if change[0] <= batch.step:
                self._rate[change[1]] = change[2]
        self._changes = [change for change in self._changes if change[0] > batch.step]
        self._tokens += self._rate
        for row, parent in self._forks:
            self._tokens[row] = self._cached[row] = self._tokens[parent]
        self._forks.clear()
        self._rows.append((self._tokens.copy(), self._cached.copy()))
        line = self._steps[self.num_steps % self.keep]
        line[:] = batch.step, batch.now, *batch.row, *(self.counts[name] for name in COUNTED)
        self.num_steps += 1

    def _place(self, request: str, row: int) -> None:
        if row >= len(self._tokens):
            wide = max(row + 1, 2 * len(self._tokens))
            self._tokens, self._rate, self._cached = (
                np.concatenate([a, np.zeros(wide - len(a), np.int64)]) for a in (self._tokens, self._rate, self._cached)
            )
        self._row_of[request] = row

    def _submit(self, batch: Batch, request: str, *_: object) -> None:
        self._submitted[request] = batch.now

    def _admit(self, batch: Batch, request: str, row: int, num_cached: int, *_: object) -> None:
        self._place(request, row)
        self._tokens[row] = self._cached[row] = num_cached
        self._rate[row] = 0

    def _fork(self, batch: Batch, request: str, parent: str, row: int) -> None:
        """A fork has as many tokens as its parent after this step, and decodes from the next one on."""
        self._place(request, row)
        self._rate[row] = 0
        self._forks.append((row, self._row_of.get(parent, row)))
        self._changes.append((batch.step + 1, row, 1))

    def _schedule(self, batch: Batch, request: str, num_tokens: int) -> None:
        ends_a_step = batch.row is not None  # its prompt is done, and it drew a token
        if ends_a_step and (begun := self._submitted.pop(request, None)) is not None:
            self._first_tokens.append((batch.now, (batch.now - begun) / 1e9))
        if (row := self._row_of.get(request)) is not None:
            self._changes.append((batch.step + ends_a_step, row, num_tokens))

    def _draft(self, batch: Batch, request: str, _drafts: int, num_accepted: int) -> None:
        if (row := self._row_of.get(request)) is not None:
            self._tokens[row] += num_accepted

    def _hold(self, batch: Batch, request: str, *_: object) -> None:
        if (row := self._row_of.get(request)) is not None:
            self._changes.append((batch.step, row, 0))

    def _leave(self, batch: Batch, request: str, *_: object) -> None:
        self._submitted.pop(request, None)
        self._vacate(request)

    def _preempt(self, batch: Batch, request: str, *_: object) -> None:
        self._vacate(request)

    def _vacate(self, request: str) -> None:
        if (row := self._row_of.pop(request, None)) is not None:
            self._tokens[row] = self._rate[row] = self._cached[row] = 0
            self._changes = [change for change in self._changes if change[1] != row]

    def _store(
        self, batch: Batch, _digests: bytes, _parents: bytes, blocks: tuple[int, ...], tokens: bytes, _medium: str
    ) -> None:
        self.block_size = len(tokens) // 4 // len(blocks)

    def _load(self, batch: Batch, *columns: int) -> None:
        self._loads.append((batch.now, *columns))

    def _rewind(self, batch: Batch) -> None:
        self._forget()
        self.timeline = Timeline(keep=20_000)
        self.inbox.clear()
        self._begin(self.log.batches())

    # -- reading -------------------------------------------------------------------------------------------------

    def latest(self, upto: int | None = None) -> dict[str, int]:
        """A Step event's columns and COUNTED, of the last step or of the step after which `upto` steps had been
        processed."""
        at = self.num_steps if upto is None else upto
        names = (*COLUMNS, *COUNTED)
        if not self._first < at <= self.num_steps:
            return dict.fromkeys(names, 0)
        return dict(zip(names, self._steps[(at - 1) % self.keep, 2:].tolist(), strict=True))

    @property
    def _first(self) -> int:
        """Steps before this one are forgotten."""
        return max(0, self.num_steps - self.keep)

    @property
    def first(self) -> int:
        """The first step that is kept."""
        return min(self._first + 1, self.num_steps)

    def now(self, upto: int | None = None) -> int:
        """The time after that step, in ns."""
        at = self.num_steps if upto is None else upto
        return int(self._steps[(at - 1) % self.keep, 1]) if at > self._first else 0

    def table(self, upto: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(tokens computed, of which cached) by row, after that step."""
        at = self.num_steps if upto is None else upto
        if not self._first < at <= self.num_steps:
            return self._tokens[:0], self._cached[:0]
        return self._rows[at - self._first - 1]

    def ranks(self, upto: int | None = None) -> list[Rank]:
        """What each rank held and did around that step; empty where one process computes."""
        now = None if upto is None else self.now(upto)
        latest: dict[int, list[tuple[int, ...]]] = {}
        for load in self._loads:
            if now is None or load[0] <= now:
                latest[load[1]] = [*latest.get(load[1], [])[-1:], load]
        found = []
        for rank, seen in sorted(latest.items()):
            first, last = seen[0], seen[-1]
            span = last[0] - first[0]
            busy, waited = (max(0.0, (last[i] - first[i]) / span) if span > 0 else 0.0 for i in (6, 7))
            found.append(Rank(rank, last[2], last[3], last[4], last[5], busy, waited))
        return found

    def segments(self, upto: int | None = None) -> list[Segment]:
        """The timeline as it stood after that step."""
        found = self.timeline.segments()
        if upto is None or upto >= self.num_steps:
            return found
        now = self.now(upto)
        return [
            segment if segment.end <= now else segment._replace(end=now, is_open=True)
            for segment in found
            if segment.begin <= now
        ]

    def window(self, upto: int | None = None, steps: int = 1200, points: int = 300) -> Window:
        """The last `steps` steps before that one."""
        end = self.num_steps if upto is None else max(min(upto, self.num_steps), self._first)
        begin = max(self._first, end - steps)
        lines = self._steps[np.arange(begin, end) % self.keep]
        if not len(lines):
            nothing, pairs = np.zeros(0, np.float32), np.zeros((0, 2), np.float32)
            pace = Pace(nothing, nothing, nothing, pairs, pairs, nothing)
            return Window(nothing, lines[:, 0], dict.fromkeys(COLUMNS, nothing), pace)
        begins = lines[:, 1] - lines[:, 2 + COLUMNS.index("duration")]
        before = int(self._steps[(begin - 1) % self.keep, 1]) if begin > self._first else begins[0]
        idle = np.maximum(begins - np.concatenate([[before], lines[:-1, 1]]), 0)
        idle[idle <= IDLE * (lines[-1, 1] - before)] = 0
        gaps = np.flatnonzero(idle)
        cuts, last = _cut(len(lines), points, gaps)
        after = np.searchsorted(cuts, gaps[gaps > 0])  # the points that an idle time precedes
        columns = {}
        for i, name in enumerate(COLUMNS):
            values = self._fold(name, lines[:, i + 2], cuts, last)
            columns[name] = np.insert(values, after, 0 if name.endswith("tokens") else values[after - 1])
        time = np.insert(lines[last, 1], after, begins[cuts[after]])
        step = np.insert(lines[last, 0], after, lines[last[after - 1], 0])
        return Window((time / 1e9).astype(np.float32), step, columns, self._pace(lines, before, idle))

    def _pace(self, lines: np.ndarray, before: int, idle: np.ndarray) -> Pace:
        """The pace of these steps. The first began at `before` (ns); `idle` (ns) is the idle time before each."""
        gaps = np.flatnonzero(idle)
        cuts, last = _cut(len(lines), STRETCHES, gaps)
        now, stretch = lines[:, 1], np.searchsorted(cuts, np.arange(len(lines)), side="right") - 1
        took = np.diff(now, prepend=before) - idle
        tokens = np.add.reduceat(lines[:, 2 + COLUMNS.index("output_tokens")], cuts)
        decodes = lines[:, 2 + COLUMNS.index("decode_tokens")] > 0
        at = np.array([moment for moment, _ in self._first_tokens], np.int64)
        waited = np.array([s for _, s in self._first_tokens])
        inside = (at > before) & (at <= now[-1])
        return Pace(
            (now[last] / 1e9).astype(np.float32),
            (np.add.reduceat(took, cuts) / 1e9).astype(np.float32),
            tokens.astype(np.float32),
            _quantiles(np.searchsorted(now[last], at[inside]), waited[inside], len(cuts)),
            _quantiles(stretch[decodes], took[decodes] / 1e9, len(cuts)),
            ((now - took)[gaps] / 1e9).astype(np.float32),
        )

    @staticmethod
    def _fold(name: str, values: np.ndarray, cuts: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Combine steps into points: token counts become a mean per step, blocks and rows keep their last value."""
        if not name.endswith("tokens"):
            return values[last].astype(np.float32)
        return (np.add.reduceat(values, cuts) / (last - cuts + 1)).astype(np.float32)


def _cut(num: int, most: int, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """About this many equal pieces, none across a gap: the start and the last index of each."""
    cuts = np.union1d(np.arange(0, num, max(1, -(-num // most))), gaps)
    return cuts, np.append(cuts[1:], num) - 1


def _quantiles(group: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    """[groups, 2]: median and p90 of each group's values; nan without any."""
    found = np.full((num_groups, 2), np.nan, np.float32)
    order = np.lexsort((values, group))
    group, values = group[order], values[order]
    begin = np.searchsorted(group, np.arange(num_groups))
    count = np.searchsorted(group, np.arange(num_groups), side="right") - begin
    some = count > 0
    for i, q in enumerate((0.5, 0.9)):
        found[some, i] = values[begin[some] + np.floor(q * (count[some] - 1) + 0.5).astype(np.int64)]
    return found


_HANDLERS = {
    "Submitted": Feed._submit,
    "Admitted": Feed._admit,
    "Resumed": Feed._admit,
    "Forked": Feed._fork,
    "Scheduled": Feed._schedule,
    "Drafted": Feed._draft,
    "Held": Feed._hold,
    "Preempted": Feed._preempt,
    "Finished": Feed._leave,
    "Aborted": Feed._leave,
    "Rejected": Feed._leave,
    "Stored": Feed._store,
    "RankLoad": Feed._load,
    "Rewound": Feed._rewind,
}
