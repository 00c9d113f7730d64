"""Two runs side by side: where their logs part, and what that cost each request. Reads logs; knows nothing of runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from .events import Event, Finished, Preempted, Submitted
from .log import EventLog

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Diff:
    """`first` is the index of the first event that differs, with both sides (None where one log has ended)."""

    first: int | None
    a: Event | None
    b: Event | None
    requests: tuple[tuple[str, float | None, float | None, int, int], ...]

    @property
    def same(self) -> bool:
        return self.first is None

    def frame(self) -> pandas.DataFrame:
        """One line a request: seconds from submission to its end and preemptions, in a and in b."""
        import pandas

        columns = ["request", "seconds_a", "seconds_b", "preempted_a", "preempted_b"]
        frame = pandas.DataFrame(self.requests, columns=columns)
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


def diff(a: EventLog, b: EventLog) -> Diff:
    """Compare two logs of the same requests under different settings."""
    events_a, events_b = list(a), list(b)
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
    return Diff(first, left if first is not None else None, right if first is not None else None, tuple(rows))


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
