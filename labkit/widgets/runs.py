"""A whole run, one line per request, and what its requests spent their time on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.core import frames
from labkit.core.shown import Shown
from labkit.widgets import svg
from labkit.widgets.gantt import by_request, choose, gantt, keys
from labkit.widgets.style import key, legend, limit_color, plural, seconds, short, view
from labkit.widgets.timeline import Segment, segments

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class RunStory(Shown):
    """A run, request by request; see `run`."""

    segments: tuple[Segment, ...]

    @property
    def requests(self) -> list[str]:
        return list(by_request(self.segments))

    def spent(self) -> dict[str, float]:
        """kind -> seconds that all requests together spent in it."""
        found: dict[str, float] = {}
        for segment in self.segments:
            if segment.seconds:
                found[segment.kind] = found.get(segment.kind, 0.0) + segment.seconds
        return found

    def held_by(self) -> dict[str, float]:
        """limit -> seconds for which it held requests, summed over requests."""
        found: dict[str, float] = {}
        for segment in self.segments:
            for limit, ns in segment.limits:
                found[limit] = found.get(limit, 0.0) + ns / 1e9
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def frame(self) -> pandas.DataFrame:
        """One row per segment."""
        return frames.table(
            [
                (s.request, s.kind, s.begin / 1e9, s.end / 1e9, s.seconds, s.step, s.why, s.is_open)
                for s in self.segments
            ],
            columns=["request", "kind", "begin", "end", "seconds", "step", "why", "open"],
        )

    def __repr__(self) -> str:
        if not self.segments:
            return "a run without requests"
        span = (max(s.end for s in self.segments) - min(s.begin for s in self.segments)) / 1e9
        spent = ", ".join(f"{kind} {seconds(value)}" for kind, value in self.spent().items())
        held = ", ".join(f"{limit} {seconds(value)}" for limit, value in self.held_by().items())
        lines = [f"{plural(len(self.requests), 'request')} in {seconds(span)}", f"  spent: {spent}"]
        return "\n".join(lines + ([f"  held by: {held}"] if held else []))


def run(log: Any) -> RunStory:
    """A whole run, one line per request: queued, prefill, decode, held, preempted, swapped; hovering says why.

    >>> lk.explain.run(engine)
    7 requests in 185 ms
      spent: prefill 28 ms, decode 441 ms, queued 240 ms, ...
    """
    return RunStory(tuple(segments(log)))


def run_view(story: RunStory) -> str:
    names, note = choose(story.segments)
    if not names:
        return view("Run", "<p>No request so far.</p>")
    span = (max(s.end for s in story.segments) - min(s.begin for s in story.segments)) / 1e9
    held = [(limit, value, limit_color(limit)) for limit, value in story.held_by().items()]
    by = legend(key(f"held by {limit}", color, seconds(value)) for limit, value, color in held)
    bar = svg.svg(svg.WIDTH, 10, svg.bar(held, svg.WIDTH, 10)) if len(held) > 1 else ""
    about = f"{plural(len(story.requests), 'request')} in {seconds(span)}"
    rest = f'<p class="q">{short(note, 200)}</p>' if note else ""
    return view("Run", keys(story.segments), gantt(story.segments, names), rest, by, bar, about=about)
