"""Compares the event logs of two runs: where they first differ, and what that cost each request."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.core.events.log import EventLog
from labkit.core.events.types import NAMES, Event, Finished, Preempted, Submitted
from labkit.core.frames import table
from labkit.core.shown import Shown

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Diff(Shown):
    """`first` is the index of the first event that differs, with both sides (None if one log has ended there). `kpis`
    holds figures of the whole runs: name -> (in a, in b), None if a log does not have it."""

    first: int | None
    a: Event | None
    b: Event | None
    requests: tuple[tuple[str, float | None, float | None, int, int], ...]
    kpis: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    logs: tuple[EventLog, EventLog] | None = field(default=None, repr=False, compare=False)

    @property
    def same(self) -> bool:
        return self.first is None

    def frame(self) -> pandas.DataFrame:
        """One row per request: seconds from submission to end and preemptions, in a and in b."""
        columns = ["request", "seconds_a", "seconds_b", "preempted_a", "preempted_b"]
        frame = table(self.requests, columns)
        frame["change"] = frame.seconds_b - frame.seconds_a
        return frame

    def __repr__(self) -> str:
        if self.same:
            return "Diff(same)"
        changed = [(name, b - a) for name, a, b, _, _ in self.requests if a is not None and b is not None and a != b]
        lines = [f"Diff(first at event {self.first}; {len(changed)} of {len(self.requests)} requests changed)"]
        lines += [f"  a: {self.a}", f"  b: {self.b}"]
        for name, change in sorted(changed, key=lambda item: -abs(item[1]))[:5]:
            lines.append(f"  {name}: {abs(change):.6f} s {'slower' if change > 0 else 'faster'} in b")
        return "\n".join(lines)


def diff(a: Any, b: Any) -> Diff:
    """Compare two logs of the same requests under different settings; an engine stands for its log.

    >>> diff(engine.log, other.log).kpis["makespan"]
    (1.25, 1.1)
    """
    logs = _log_of("a", a), _log_of("b", b)
    events_a, events_b = list(logs[0]), list(logs[1])
    first: int | None = None
    left: Event | None = None
    right: Event | None = None
    for i, (left, right) in enumerate(zip_longest(events_a, events_b)):
        if left != right:
            first = i
            break
    spans_a, spans_b = _requests(events_a), _requests(events_b)
    rows = []
    for name in {**spans_a, **spans_b}:
        seconds_a, preempted_a = spans_a.get(name, (None, 0))
        seconds_b, preempted_b = spans_b.get(name, (None, 0))
        rows.append((name, seconds_a, seconds_b, preempted_a, preempted_b))
    kpis_a, kpis_b = kpis(logs[0]), kpis(logs[1])
    both = {name: (kpis_a[name], kpis_b[name]) for name in kpis_a}
    if first is None:
        left = right = None
    return Diff(first, left, right, tuple(rows), both, logs)


def _log_of(name: str, given: Any) -> EventLog:
    log = given if isinstance(given, EventLog) else getattr(given, "log", None)
    if not isinstance(log, EventLog):
        raise TypeError(f"diff compares two event logs, or the engines they belong to; {name} is {given!r}")
    return log


def kpis(log: EventLog) -> dict[str, float | None]:
    """A run's figures in seconds, from its log alone: total time, percentiles of time to first token (TTFT) and to the
    end (E2E), preemptions, the share of prompt tokens that hit the prefix cache, steps."""
    since: dict[str, int] = {}
    prompts: dict[str, int] = {}
    first: dict[str, int] = {}
    whole: list[float] = []
    num_preempted = num_steps = num_cached = num_admitted = num_output = 0
    batches = log.batches()
    for batch in batches:
        for kind, *columns in batch.events:
            if kind == "Submitted":
                since[columns[0]], prompts[columns[0]] = batch.now, columns[1]
            elif kind == "Scheduled" and batch.row is not None:  # at a step's end: a prefill drew its first token
                first.setdefault(columns[0], batch.now)
            elif kind == "Admitted":
                num_cached += columns[2]
                num_admitted += prompts.get(columns[0], 0)
            elif kind == "Preempted":
                num_preempted += 1
            elif kind == "Finished" and columns[0] in since:
                whole.append((batch.now - since[columns[0]]) / 1e9)
        if batch.row is not None:
            num_steps += 1
            num_output += batch.row[_OUTPUT_TOKENS]
    firsts = [(now - since[name]) / 1e9 for name, now in first.items() if name in since]
    seconds = (batches[-1].now - batches[0].now) / 1e9 if batches else None
    return {
        "makespan": seconds,
        "output tokens/s": num_output / seconds if seconds else None,
        "TTFT p50": _percentile(firsts, 50),
        "TTFT p99": _percentile(firsts, 99),
        "E2E p50": _percentile(whole, 50),
        "E2E p99": _percentile(whole, 99),
        "preemptions": num_preempted,
        "prefix hit rate": num_cached / num_admitted if num_admitted else None,
        "steps": num_steps,
        "finished": len(whole),
    }


_OUTPUT_TOKENS = NAMES["Step"].index("output_tokens") - 2  # a row begins after step and now


def _percentile(values: list[float], q: int) -> float | None:
    return float(np.percentile(values, q)) if values else None


def _requests(events: list[Event]) -> dict[str, tuple[float | None, int]]:
    """request -> (seconds from submission to its end, preemptions)."""
    since: dict[str, int] = {}
    found: dict[str, tuple[float | None, int]] = {}
    for event in events:
        if isinstance(event, Submitted):
            since[event.request] = event.now
            found[event.request] = (None, 0)
        elif isinstance(event, Preempted):
            seconds, preempted = found.get(event.request, (None, 0))
            found[event.request] = (seconds, preempted + 1)
        elif isinstance(event, Finished) and event.request in since:
            found[event.request] = ((event.now - since[event.request]) / 1e9, found[event.request][1])
    return found
