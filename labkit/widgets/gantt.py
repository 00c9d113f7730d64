"""A timeline picture: one line per request over one time axis; hovering says why."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from labkit.widgets import svg
from labkit.widgets.style import SEGMENT_COLOR, key, legend, plural, seconds
from labkit.widgets.timeline import ENDS, Segment

MOST_LINES, MOST_SHAPES = 48, 1100
LEFT, RIGHT = 96, 8
SHOWN = ("queued", "prefill", "decode", "held", "preempted", "swapped", "recompute")
PITCH, THICK = 15, 11
_END_SIGN = {"finished": "\u25cf", "aborted": "\u2715", "rejected": "\u2715"}


def by_request(segments: Sequence[Segment]) -> dict[str, list[Segment]]:
    found: dict[str, list[Segment]] = {}
    for segment in segments:
        found.setdefault(segment.request, []).append(segment)
    return found


def choose(segments: Sequence[Segment], most: int = MOST_LINES) -> tuple[list[str], str]:
    """The requests that get a line, and a sentence on those left out. Of many requests, it takes those that were
    preempted or held most often, and a regular sample of the rest."""
    requests = by_request(segments)
    names = list(requests)
    if len(names) <= most:
        return names, ""
    trouble = {name: sum(s.kind in ("preempted", "swapped", "held") for s in its) for name, its in requests.items()}
    worst = sorted((name for name in names if trouble[name]), key=lambda name: -trouble[name])[: most // 2]
    others = [name for name in names if not trouble[name] or name not in worst]
    every = len(others) / (most - len(worst))
    chosen = {*worst, *(others[int(i * every)] for i in range(most - len(worst)))}
    kept = [name for name in names if name in chosen]
    whom = f"{len(kept) - len(worst)} at even distances" + f", and {len(worst)} of those preempted or held" * bool(
        worst
    )
    return kept, f"{len(kept)} of {plural(len(names), 'request')}: {whom}"


def gantt(
    segments: Sequence[Segment],
    names: Sequence[str],
    begin: int | None = None,
    end: int | None = None,
    mark: tuple[int, str] | None = None,
) -> str:
    """One line per request, and a marked moment. If there are too many segments to draw, the shortest are left out, and
    the picture says so."""
    requests = by_request(segments)
    shown = [segment for name in names for segment in requests.get(name, ())]
    if not shown:
        return '<p class="q">no request so far</p>'
    begin = min(segment.begin for segment in shown) if begin is None else begin
    end = max(segment.end for segment in shown) if end is None else end
    span, wide = max(end - begin, 1), svg.WIDTH - LEFT - RIGHT
    long = [segment for segment in shown if segment.kind not in ENDS]
    least = sorted((s.end - s.begin for s in long), reverse=True)[MOST_SHAPES] if len(long) > MOST_SHAPES else -1
    bottom = len(names) * PITCH + 2
    shapes = [svg.time_axis(end / 1e9, LEFT, wide, bottom, 0, begin / 1e9)]
    for line, name in enumerate(names):
        y = line * PITCH + 2
        label = name if len(name) <= 14 else name[:13] + "\u2026"
        shapes.append(svg.text(LEFT - 6, y + 9, label, "e"))
        for segment in requests.get(name, ()):
            x = LEFT + wide * (segment.begin - begin) / span
            if segment.kind in ENDS:
                shapes.append(_end(x, y, segment))
            elif segment.end - segment.begin > least:
                across = max(wide * (segment.end - segment.begin) / span, 0.6)
                inset = 3 if segment.kind == "queued" else 0
                color = SEGMENT_COLOR[segment.kind]
                shapes.append(svg.rect(x, y + inset, across, THICK - 2 * inset, color, said(segment)))
    if mark is not None:
        shapes.append(_moment(LEFT + wide * (mark[0] - begin) / span, bottom, mark[1]))
    num_short = sum(s.end - s.begin <= least for s in long)
    rest = f'<p class="q">the {num_short:,} shortest segments are not drawn</p>' if num_short else ""
    return svg.svg(svg.WIDTH, bottom + 18, *shapes) + rest


def _moment(x: float, bottom: float, label: str) -> str:
    """A dashed vertical line."""
    look = 'stroke="currentColor" stroke-dasharray="4 3"'
    return f"<g><title>{escape(label)}</title>{svg.line(x, 0, x, bottom + 4, look)}</g>"


def _end(x: float, y: float, segment: Segment) -> str:
    title = f"<title>{escape(said(segment))}</title>"
    if segment.kind == "finished":
        return f'<circle cx="{x:.5g}" cy="{y + 5.5:.5g}" r="2.6" fill="currentColor">{title}</circle>'
    return (
        f'<path d="M{x - 3:.5g} {y + 2.5:.5g}l6 6m0 -6l-6 6" stroke="{SEGMENT_COLOR[segment.kind]}" stroke-width="2" '
        f'fill="none">{title}</path>'
    )


def said(segment: Segment) -> str:
    """The hover text."""
    at = f"{segment.begin / 1e9:.6g} s"
    if segment.kind in ENDS:
        return f"{segment.request}: {segment.kind} at {at}, {segment.why}"[:300]
    over = " so far" if segment.is_open else ""
    why = f": {segment.why}" if segment.why else ""
    return f"{segment.request}: {segment.kind} from {at}, {seconds(segment.seconds)}{over}{why}"[:300]


def keys(segments: Sequence[Segment]) -> str:
    """A legend of the kinds that occur, with the total time of all requests in each."""
    spent = dict.fromkeys(SHOWN, 0.0)
    for segment in segments:
        if segment.kind in spent:
            spent[segment.kind] += segment.seconds
    entries = [key(kind, SEGMENT_COLOR[kind], seconds(total)) for kind, total in spent.items() if total]
    for kind, sign in _END_SIGN.items():
        number = sum(segment.kind == kind for segment in segments)
        if number:
            entries.append(f'<span class="key">{sign} {kind} <b>{number:,}</b></span>')
    return legend(entries)
