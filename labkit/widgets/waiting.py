"""Why one request waited: what held it and when, and behind which request; as text, as a picture and as a table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.core import frames
from labkit.core.events.types import NAMES, Batch
from labkit.core.events.why import Why
from labkit.core.shown import Shown
from labkit.widgets import svg
from labkit.widgets.gantt import LEFT, RIGHT, gantt, keys
from labkit.widgets.logs import marker
from labkit.widgets.style import key, legend, limit_color, plural, seconds, section, short, table, view
from labkit.widgets.timeline import Segment, id_of, log_of, segments

if TYPE_CHECKING:
    import pandas

MEANING = {
    "blocks": "too few blocks were free",
    "rows": "every row was taken",
    "budget": "the step's tokens were given to others",
    "order": "others were before it",
    "prefix pending": "another row was computing the prefix that it shares",
    "adapter": "no slot was free for its adapter",
    "parent's prompt": "the prompt it is forked from was not computed",
}
MOST_LINES = 8  # of holds as text; the picture and the table have more
MOST_OTHERS = 8  # of those it was behind, with a line of their own
_DURATION = NAMES["Step"].index("duration") - 2  # a row begins after step and now


@dataclass(frozen=True)
class Hold:
    """Steps `first..last`, from `begin` to `end` (ns), in which `limit` held a request, or the one it was `behind`."""

    first: int
    last: int
    begin: int
    end: int
    limit: str
    behind: str | None

    @property
    def num_steps(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class WaitingStory(Shown):
    """Why one request waited; see `waiting`."""

    request: str
    why: Why
    holds: tuple[Hold, ...]
    timeline: tuple[Segment, ...]  # its own, and those of the requests it was behind

    @property
    def behind(self) -> list[str]:
        """The requests it was behind, in order."""
        return list(dict.fromkeys(hold.behind for hold in self.holds if hold.behind is not None))

    @property
    def seconds(self) -> float:
        return sum(hold.end - hold.begin for hold in self.holds) / 1e9

    def frame(self) -> pandas.DataFrame:
        """One row per hold: steps, seconds, limit, behind which request."""
        return frames.table(
            [
                (hold.first, hold.last, hold.num_steps, hold.begin / 1e9, hold.end / 1e9, hold.limit, hold.behind)
                for hold in self.holds
            ],
            columns=["first", "last", "steps", "begin", "end", "limit", "behind"],
        )

    def __repr__(self) -> str:
        why = self.why
        lines = [f"{self.request} waited {plural(why.num_waited, 'step')}, {seconds(self.seconds)}; it is {why.status}"]
        shown = len(self.holds) if len(self.holds) <= MOST_LINES else MOST_LINES - 2
        for hold in self.holds[:shown]:
            steps = f"step {hold.first}" if hold.first == hold.last else f"steps {hold.first}-{hold.last}"
            whom = f", behind {hold.behind!r}" if hold.behind is not None else ""
            meaning = f": {MEANING[hold.limit]}" if hold.limit in MEANING else ""
            lines.append(f"  {steps} ({seconds((hold.end - hold.begin) / 1e9)}): {hold.limit}{whom}{meaning}")
        if shown < len(self.holds):
            lines.append(f"  and {len(self.holds) - shown} more: see holds or frame()")
        lines += [f"  {preemption!r}" for preemption in why.preemptions[:MOST_LINES]]
        if limits := why.limits():
            most = max(limits, key=lambda limit: limits[limit])
            lines.append(f"  most of it by {most}: {limits[most]} of {plural(why.num_waited, 'step')}")
        return "\n".join(lines)


def waiting(log: Any, request: Any) -> WaitingStory:
    """Why this request waited, for a reader: every hold with its limit, its time and the request it was behind, and a
    picture. `log.why(id)` has the same waits as data, for loops and assertions.

    >>> lk.explain.waiting(engine, "r5")
    r5 waited 63 steps, 63 ms; it is finished
      steps 0-1 (2 ms): budget, behind 'r4': the step's tokens were given to others
      ...
    """
    log, id = log_of(log), id_of(request)
    why = log.why(id)
    clock = _Steps(log.batches())
    everyone = segments(log)
    mine = [segment for segment in everyone if segment.request == id]
    since = mine[0].begin if mine else 0
    holds = tuple(
        Hold(wait.first, wait.last, max(clock.begin(wait.first), since), clock.end(wait.last), wait.limit, wait.behind)
        for wait in why.waits
    )
    others = set(list(dict.fromkeys(hold.behind for hold in holds if hold.behind is not None))[:MOST_OTHERS])
    behind = [segment for segment in everyone if segment.request in others and segment.request != id]
    return WaitingStory(id, why, holds, (*mine, *behind))


class _Steps:
    """When each step began and ended, by the log. Steps that were trimmed count as early as the first that is left."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        rows = [(batch.step, batch.now, batch.now - batch.row[_DURATION]) for batch in batches if batch.row is not None]
        self.steps = [step for step, _, _ in rows]
        self.ends = [now for _, now, _ in rows]
        self.begins = [max(begin, before) for (_, _, begin), before in zip(rows, [0, *self.ends], strict=False)]
        self.latest = batches[-1].now if batches else 0

    def begin(self, step: int) -> int:
        at = bisect_left(self.steps, step)
        return self.begins[at] if at < len(self.begins) else self.latest

    def end(self, step: int) -> int:
        at = bisect_left(self.steps, step)
        return self.ends[at] if at < len(self.ends) else self.latest


def waiting_view(story: WaitingStory) -> str:
    """Timelines of the request, what held it, and the requests it was behind, over one axis."""
    about = f"{plural(story.why.num_waited, 'step')}, {seconds(story.seconds)}; {story.why.status}"
    if not story.holds and not story.why.preemptions:
        return view(f"Why {story.request!r} waited"[:90], "<p>It never waited.</p>", about=about)
    mine = [segment for segment in story.timeline if segment.request == story.request]
    begin = min([s.begin for s in mine] + [hold.begin for hold in story.holds])
    end = max([s.end for s in mine] + [hold.end for hold in story.holds])
    names = [story.request, *story.behind[:MOST_OTHERS]]
    clipped = [
        s._replace(begin=max(s.begin, begin), end=min(s.end, end))
        for s in story.timeline
        if s.end >= begin and s.begin <= end
    ]
    limits = story.why.limits()
    entries = [key(limit, limit_color(limit), plural(steps, "step")) for limit, steps in limits.items()]
    if story.why.preemptions:
        entries.append(f'<span class="q">\u25bc preempted {len(story.why.preemptions)}\u00d7</span>')
    return view(
        f"Why {story.request!r} waited"[:90],
        legend(entries),
        _lane(story, begin, end),
        '<p class="q">what it did, and those it was behind</p>' if story.behind else '<p class="q">what it did</p>',
        keys(mine),
        gantt(clipped, names, begin, end),
        section("hold by hold", _holds(story)),
        about=about,
    )


def _lane(story: WaitingStory, begin: int, end: int) -> str:
    """The holds in the colours of their limits, with the request it was behind if there is room."""
    span, wide = max(end - begin, 1), svg.WIDTH - LEFT - RIGHT
    shapes = [svg.text(LEFT - 6, 24, "held by", "e")]
    for hold in story.holds[:1500]:
        x, across = LEFT + wide * (hold.begin - begin) / span, max(wide * (hold.end - hold.begin) / span, 0.6)
        whom = f", behind {hold.behind!r}" if hold.behind is not None else ""
        color = limit_color(hold.limit)
        said = f"steps {hold.first}-{hold.last}: {hold.limit}{whom}"[:200]
        shapes.append(svg.rect(x, 10, across, 20, color, said, ' stroke="currentColor" stroke-opacity=".25"'))
        label = f"{hold.limit}{f' behind {hold.behind}' if hold.behind is not None else ''}"[:40]
        for text in (label, hold.limit):
            if across > 6.3 * len(text) + 8:
                shapes.append(svg.text(x + across / 2, 24, text, f"c {svg.ink(color)}"))
                break
    lost = [s.begin for s in story.timeline if s.request == story.request and s.kind in ("preempted", "swapped")]
    shapes += [marker(LEFT + wide * (at - begin) / span, 2, 34, "currentColor") for at in lost]
    return svg.svg(svg.WIDTH, 36, *shapes)


def _holds(story: WaitingStory) -> str:
    lines = [
        [
            f"{hold.first}\u2013{hold.last}",
            seconds((hold.end - hold.begin) / 1e9),
            short(hold.limit, 30),
            short(repr(hold.behind), 40) if hold.behind is not None else "",
            short(MEANING.get(hold.limit, ""), 60),
        ]
        for hold in story.holds[:60]
    ]
    lines += [
        [str(lost.step), "", "preempted", short(lost.needed_by, 40), short(repr(lost), 120)]
        for lost in story.why.preemptions[:60]
    ]
    return table(["steps", "time", "limit", "behind, or for", ""], lines, "lrlll")
