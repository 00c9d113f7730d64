"""A server's metrics as the columns of a dashboard: one entry a poll where a run has one a step.

Has what `Feed` has for figures and panels. Requests and block tables are not in metrics, so these panels stay empty.
"""

from __future__ import annotations

from collections import Counter, deque
from types import SimpleNamespace
from typing import Any

import numpy as np

from labkit.widgets.feed import COLUMNS, COUNTED, Pace, Window
from labkit.widgets.scrape import Buckets, Poll, quantile, since
from labkit.widgets.timeline import Segment

KEEP = 4096  # polls
SMOOTH = 5.0  # seconds of a percentile: a single poll sees too few requests
PERCENT = 100  # blocks, where the server does not say how many it has


class PolledFeed:
    """Columns of the latest `keep` polls.

    >>> feed = PolledFeed()
    >>> feed.inbox.append(poll_of(text, now=0))
    >>> feed.catch_up()
    1
    """

    def __init__(self, keep: int = KEEP) -> None:
        self.keep = keep
        self.inbox: deque[Poll] = deque()
        self.num_steps = 0
        self.block_size = 16
        self.counts: Counter[str] = Counter()
        self.timeline = SimpleNamespace(now=0)
        self._recent: deque[Poll] = deque()  # of the last SMOOTH seconds
        self._lines: deque[dict[str, float]] = deque(maxlen=keep)

    def __repr__(self) -> str:
        return f"PolledFeed({self.num_steps} polls)"

    def close(self) -> None:
        pass

    def ranks(self, upto: int | None = None) -> list[Any]:
        """Metrics say nothing of ranks."""
        return []

    # -- processing ----------------------------------------------------------------------------------------------

    def catch_up(self) -> int:
        before = self.num_steps
        while self.inbox:
            self._apply(self.inbox.popleft())
        return self.num_steps - before

    def _apply(self, poll: Poll) -> None:
        last = self._recent[-1] if self._recent else poll
        grown = {name: _grown(value, last.counters.get(name, value)) for name, value in poll.counters.items()}
        while len(self._recent) > 1 and poll.now - self._recent[1].now >= SMOOTH * 1e9:
            self._recent.popleft()
        first = self._recent[0] if self._recent else poll
        self._recent.append(poll)
        self.counts.update(poll=1)
        self.timeline.now = poll.now
        self.block_size = poll.block_size or self.block_size
        self.num_steps += 1
        line = _columns(poll, grown, (poll.now - last.now) / 1e9)
        for name in ("ttft", "itl"):
            between: Buckets = since(poll.histograms.get(name, ()), first.histograms.get(name, ()))
            line |= {f"{name}{q}": quantile(between, q) for q in (0.5, 0.9)}
        self._lines.append(line)

    # -- reading, as of a Feed -----------------------------------------------------------------------------------

    @property
    def _first(self) -> int:
        return self.num_steps - len(self._lines)

    @property
    def first(self) -> int:
        return min(self._first + 1, self.num_steps)

    def _at(self, upto: int | None) -> dict[str, float] | None:
        at = self.num_steps if upto is None else upto
        return self._lines[at - self._first - 1] if self._first < at <= self.num_steps else None

    def latest(self, upto: int | None = None) -> dict[str, int]:
        line = self._at(upto) or {}
        return {name: round(line.get(name, 0)) for name in (*COLUMNS, *COUNTED)}

    def now(self, upto: int | None = None) -> int:
        line = self._at(upto)
        return 0 if line is None else int(line["now"])

    def table(self, upto: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        nothing = np.zeros(0, np.int64)
        return nothing, nothing

    def segments(self, upto: int | None = None) -> list[Segment]:
        return []

    def window(self, upto: int | None = None, steps: int = 1200, points: int = 300) -> Window:
        end = self.num_steps if upto is None else max(min(upto, self.num_steps), self._first)
        begin = max(self._first, end - steps)
        chosen = np.unique(np.linspace(begin, end - 1, min(points, end - begin)).round().astype(int)).tolist()
        lines = list(self._lines)
        shown = [lines[i - self._first] for i in chosen]
        whole = lines[begin - self._first : end - self._first]

        def column(name: str, of: list[dict[str, float]]) -> np.ndarray:
            return np.array([line.get(name, 0.0) for line in of], np.float32)

        def pairs(name: str) -> np.ndarray:
            return np.array([[line[f"{name}{q}"] for q in (0.5, 0.9)] for line in shown], np.float32).reshape(-1, 2)

        time = column("now", shown) / 1e9
        seconds, tokens = _stretches(chosen, begin, column("seconds", whole), column("tokens", whole))
        pace = Pace(time, seconds, tokens, pairs("ttft"), pairs("itl"), np.zeros(0, np.float32))
        return Window(time, np.array(chosen, np.int64) + 1, {name: column(name, shown) for name in COLUMNS}, pace)


def _stretches(chosen: list[int], begin: int, *columns: np.ndarray) -> list[np.ndarray]:
    """Sums of the polls up to each chosen one since the one before it."""
    if not chosen:
        return list(columns)
    starts = [0, *(i - begin + 1 for i in chosen[:-1])]
    return [np.add.reduceat(values, starts).astype(np.float32) for values in columns]


def _grown(now: float, before: float) -> float:
    """How far a counter moved. A server that was started again counts from zero."""
    return now - before if now >= before else now


def _columns(poll: Poll, grown: dict[str, float], seconds: float) -> dict[str, float]:
    blocks = poll.num_blocks or PERCENT
    used = blocks * min(1.0, max(0.0, poll.gauges.get("usage", 0.0)))
    steps = grown.get("steps", 0.0) or 1.0
    cached = min(grown.get("cached", 0.0), grown.get("prompt", 0.0))
    return {
        "now": float(poll.now), "seconds": seconds, "tokens": grown.get("generation", 0.0),
        "used_blocks": used, "free_blocks": blocks - used, "num_rows": poll.gauges.get("running", 0.0),
        "prefill_tokens": (grown.get("prompt", 0.0) - cached) / steps, "cached_tokens": cached / steps,
        "decode_tokens": grown.get("generation", 0.0) / steps, "output_tokens": grown.get("generation", 0.0) / steps,
        "running": poll.gauges.get("running", 0.0), "waiting": poll.gauges.get("waiting", 0.0),
        "swapped": poll.gauges.get("swapped", 0.0), "duration": seconds * 1e9 / steps,
        "draft_tokens": grown.get("drafted", 0.0), "accepted_tokens": grown.get("accepted", 0.0),  # between the polls
        "Preempted": poll.counters.get("preempted", 0.0), "Finished": poll.counters.get("finished", 0.0),
    }  # fmt: skip
