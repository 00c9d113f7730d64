"""Two runs side by side: figures, where they first differ, and two timelines over one axis."""

from __future__ import annotations

from labkit.core.events.diff import Diff
from labkit.widgets import svg
from labkit.widgets.gantt import choose, gantt, keys
from labkit.widgets.style import COLORS, legend, plural, seconds, section, short, table, view
from labkit.widgets.timeline import segments

BETTER_WHEN_LESS = frozenset(("makespan", "TTFT p50", "TTFT p99", "E2E p50", "E2E p99", "preemptions", "steps"))
MOST_LINES = 32


def diff(found: Diff) -> str:
    if found.same:
        return view("Diff", "<p>The two logs are the same, event by event.</p>", _figures(found))
    changed = sum(a != b for _, a, b, _, _ in found.requests)
    about = f"{changed:,} of {plural(len(found.requests), 'request')} changed"
    parted = (
        f"<p>They part at event {found.first:,}, where the dashed line stands:</p>"
        f'<pre class="x">a  {short(found.a, 200)}\nb  {short(found.b, 200)}</pre>'
    )
    return view("Diff", _figures(found), _timelines(found), _slower(found), parted, about=about)


def _figures(found: Diff) -> str:
    """Each figure in a and in b, and how they compare."""
    lines = []
    for name, (a, b) in found.kpis.items():
        if a is None and b is None:
            continue
        lines.append([name, _figure(name, a), _figure(name, b), _change(name, a, b)])
    return table(["", "a", "b", "b against a"], lines) if lines else ""


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "\u2013"
    if name.startswith(("TTFT", "E2E", "makespan")):
        return seconds(value)
    return (
        f"{value:.1%}"
        if name.endswith("rate")
        else f"{value:,.0f}"
        if value >= 100 or value % 1 == 0
        else f"{value:.3g}"
    )


def _change(name: str, a: float | None, b: float | None) -> str:
    """The relative change, coloured by whether it is better or worse."""
    if a is None or b is None or a == b:
        return "\u2013" if a is None or b is None else '<span class="q">same</span>'
    relative = f"{b / a - 1:+.1%}" if a else f"{b - a:+g}"
    said = f"{(b - a) * 100:+.1f} points" if name.endswith("rate") else relative
    good = (b < a) == (name in BETTER_WHEN_LESS)
    mark = "\u25b2" if b > a else "\u25bc"
    return f'<span style="color:{COLORS["green"] if good else COLORS["red"]}">{mark}</span> {said}'


def _timelines(found: Diff) -> str:
    """The same requests over the same axis, so that the two runs can be compared by eye."""
    if found.logs is None:
        return ""
    both = [segments(log) for log in found.logs]
    everyone = both[0] + both[1]
    if not everyone:
        return ""
    names, note = choose(everyone, MOST_LINES)
    begin, end = min(s.begin for s in everyone), max(s.end for s in everyone)
    parted = [event.now for event in (found.a, found.b) if event is not None]
    mark = (min(parted), "here the two runs part") if parted else None
    parts = []
    for name, mine in zip("ab", both, strict=True):
        parts.append(f"<p><b>{name}</b></p>{keys(mine)}{gantt(mine, names, begin, end, mark)}")
    return "".join(parts) + (f'<p class="q">{short(note, 200)}</p>' if note else "")


def _slower(found: Diff) -> str:
    """Which requests got slower or faster, the largest changes first."""
    changes = [(name, b - a) for name, a, b, _, _ in found.requests if a is not None and b is not None and a != b]
    changes.sort(key=lambda item: -abs(item[1]))
    if not changes:
        return ""
    most, wide, left = abs(changes[0][1]), 300, 430
    shapes = [svg.line(left, 0, left, 17 * len(changes[:12]), 'stroke="currentColor" stroke-opacity=".4"')]
    for line, (name, change) in enumerate(changes[:12]):
        across, y = wide * abs(change) / most, line * 17
        x = left if change > 0 else left - across
        color = COLORS["red"] if change > 0 else COLORS["green"]
        said = f"{seconds(abs(change))} {'slower' if change > 0 else 'faster'} in b"
        label = name if len(name) < 18 else name[:17] + "\u2026"
        shapes.append(svg.rect(x, y + 1, max(across, 1), 13, color, f"{name}: {said}"))
        beside = (left - 6, "e") if change > 0 else (left + 6, "")
        shapes.append(svg.text(beside[0], y + 12, f"{label}: {said}", beside[1]))
    more = f" <span class=q>the 12 largest of {len(changes):,}</span>" if len(changes) > 12 else ""
    picture = svg.svg(svg.WIDTH, 17 * len(changes[:12]), *shapes)
    return section(f"who got slower, who faster{more}", legend([]), picture, is_open=True)
