"""Views of an event log, and of why one request waited."""

from __future__ import annotations

from collections import Counter

from labkit.core.events.log import EventLog
from labkit.core.events.types import NAMES, Batch
from labkit.core.events.why import Why
from labkit.widgets import svg
from labkit.widgets.style import COLORS, HUES, key, legend, limit_color, plural, short, table, view

_COLUMN = {name: i for i, name in enumerate(NAMES["Step"][2:])}
COURSES = (  # curves of the last steps
    ("prefill tokens", "prefill_tokens", COLORS["green"]),
    ("decode tokens", "decode_tokens", COLORS["blue"]),
    ("waiting", "waiting", COLORS["red"]),
    ("used blocks", "used_blocks", COLORS["purple"]),
    ("cached blocks", "cached_blocks", COLORS["orange"]),
)
MOST_POINTS = 240


def log(found: EventLog) -> str:
    """Counts of each event, and curves of the last steps."""
    batches = found.batches()
    counts = counted(batches)
    trimmed = f", {found.num_trimmed:,} trimmed" if found.num_trimmed else ""
    about = f"{len(found):,} events, {plural(counts.get('Step', 0), 'step')}{trimmed}"
    if not counts:
        return view("EventLog", about="no event so far")
    return view("EventLog", _bars(counts), courses(batches), about=about)


def counted(batches: list[Batch]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for batch in batches:
        if batch.row is not None:
            counts["Step"] += 1
        for event in batch.events:
            counts[event[0]] += len(event[1]) // 32 if event[0] in ("Stored", "Removed") else 1
    return counts


def _bars(counts: Counter[str]) -> str:
    ranked, most = counts.most_common(), max(counts.values())
    half = -(-len(ranked) // 2)
    shapes = []
    for i, (name, number) in enumerate(ranked):
        x, y = 430 * (i // half), 17 * (i % half)
        wide = max(240 * number / most, 1)
        shapes.append(svg.text(x + 86, y + 11, name, "e"))
        shapes.append(svg.rect(x + 92, y + 1, wide, 13, COLORS["sky"]))
        shapes.append(svg.text(x + 98 + wide, y + 11, f"{number:,}", "q"))
    return svg.svg(svg.WIDTH, 17 * half, *shapes)


def courses(batches: list[Batch]) -> str:
    """Curves of the last steps, one per quantity, with its largest and latest value."""
    rows = [batch.row for batch in batches[-4 * MOST_POINTS :] if batch.row is not None][-MOST_POINTS:]
    if not rows:
        return ""
    lines = []
    for label, column, color in COURSES:
        values = [row[_COLUMN[column]] for row in rows]
        lines.append([label, svg.spark(values, color, 420, 24), f"{max(values):,}", f"{values[-1]:,}"])
    return table([f"the last {plural(len(rows), 'step')}", "", "most", "latest"], lines, align="ll")


def why(found: Why) -> str:
    """The steps in which it waited, each hold in the colour of its limit, and every preemption."""
    about = f"{found.status}, waited {plural(found.num_waited, 'step')}, preempted {len(found.preemptions)}\u00d7"
    if not found.waits and not found.preemptions:
        return view(f"Why {found.request!r}"[:90], "<p>It never waited.</p>", about=about)
    first = min([wait.first for wait in found.waits] + [preemption.step for preemption in found.preemptions])
    last = max([wait.last + 1 for wait in found.waits] + [preemption.step + 1 for preemption in found.preemptions])
    span, shapes = max(last - first, 1), []
    for wait in found.waits[:2000]:
        x, wide = svg.WIDTH * (wait.first - first) / span, svg.WIDTH * wait.num_steps / span
        shapes.append(svg.rect(x, 4, max(wide, 0.8), 22, limit_color(wait.limit), repr(wait)[:200]))
    for preemption in found.preemptions[:500]:
        x = svg.WIDTH * (preemption.step - first) / span
        shapes.append(f"<g><title>{short(repr(preemption), 200)}</title>{marker(x, 0, 30, 'currentColor')}</g>")
    shapes.append(svg.text(0, 42, f"step {first}", "q") + svg.text(svg.WIDTH, 42, f"step {last}", "q e"))
    limits = found.limits()
    keys = legend(
        [key(limit, limit_color(limit), plural(steps, "step")) for limit, steps in limits.items()]
        + ([f'<span class="q">\u25bc preempted {len(found.preemptions)}\u00d7</span>'] if found.preemptions else [])
    )
    said = [(wait.first, repr(wait)) for wait in found.waits] + [(p.step, repr(p)) for p in found.preemptions]
    words = "".join(f"<p>{short(text, 160)}</p>" for _, text in sorted(said, key=lambda item: item[0])[:12])
    rest = f'<p class="q">and {len(said) - 12} more</p>' if len(said) > 12 else ""
    return view(f"Why {found.request!r}"[:90], keys, svg.svg(svg.WIDTH, 46, *shapes), words, rest, about=about)


def marker(x: float, top: float, bottom: float, color: str) -> str:
    """A marked moment: a line with a head."""
    x = max(x, 4.0)
    return (
        f'<line x1="{x:.5g}" y1="{top:.5g}" x2="{x:.5g}" y2="{bottom:.5g}" stroke="{color}" stroke-width="1.5"/>'
        f'<path d="M{x - 4:.5g} {top:.5g}h8l-4 6z" fill="{color}"/>'
    )


def hue(i: int) -> str:
    return HUES[i % len(HUES)]
