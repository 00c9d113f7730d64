"""Shapes as inline SVG: cells, bars, areas, lines, a time axis. Labels are plain text and are escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from labkit.widgets.style import COLORS, DARK, seconds

WIDTH = 860

Series = tuple[str, str, Sequence[float]]  # label, colour's name, values
Part = tuple[str, float, str]  # label, amount, colour


def svg(width: float, height: float, *parts: str, alt: str = "") -> str:
    """A picture of this size that shrinks to the available width."""
    name = f' aria-label="{escape(alt)}"' if alt else ""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img"{name}>'
        f"{''.join(parts)}</svg>"
    )


def rect(x: float, y: float, width: float, height: float, color: str, title: str = "", more: str = "") -> str:
    hover = f"<title>{escape(title)}</title>" if title else ""
    if color == "none":
        more += ' stroke="currentColor" stroke-opacity=".3"'
        x, y, width, height = x + 0.5, y + 0.5, width - 1, height - 1
    over = f">{hover}</rect>" if hover else "/>"
    return f'<rect x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}" fill="{color}"{more}{over}'


def text(x: float, y: float, label: str, look: str = "") -> str:
    """Text. `look`: s small, q quiet, w white, b black, c centred, e right-aligned."""
    which = f' class="{look}"' if look else ""
    return f'<text x="{x:.5g}" y="{y:.5g}"{which}>{escape(label)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, more: str = 'stroke="currentColor" stroke-opacity=".15"') -> str:
    return f'<line x1="{x1:.5g}" y1="{y1:.5g}" x2="{x2:.5g}" y2="{y2:.5g}" {more}/>'


def ink(color: str) -> str:
    """The `look` of text that is readable on this colour."""
    return "w" if color in DARK else "b" if color != "none" else ""


def bar(parts: Sequence[Part], width: float = WIDTH, height: float = 18, total: float | None = None, x: float = 0.0,
        y: float = 0.0) -> str:  # fmt: skip
    """Amounts side by side, labelled if there is room; what is left of `total` is an outline."""
    whole = max(total if total is not None else 0, sum(amount for _, amount, _ in parts)) or 1.0
    shapes = []
    if total is not None:
        shapes.append(rect(x, y, width, height, "none", more=' rx="2"'))
    for label, amount, color in parts:
        wide = width * amount / whole
        if wide <= 0:
            continue
        shapes.append(rect(x, y, max(wide, 0.7), height, color, f"{label}: {amount:,.6g}"))
        if wide > 6.2 * len(label) + 8 and height >= 12:
            shapes.append(text(x + wide / 2, y + height / 2 + 4, label, f"c {ink(color)}"))
        x += wide
    return "".join(shapes)


def spark(values: Sequence[float], color: str, width: float = 200, height: float = 28, top: float | None = None) -> str:
    """A small area chart without axes."""
    if not values:
        return svg(width, height)
    high, n = max(top if top is not None else max(values), 1e-12), len(values)
    step = width / n
    points = [f"0,{height}"]
    for i, value in enumerate(values):
        y = height - (height - 2) * value / high
        points.append(f"{i * step:.1f},{y:.1f} {(i + 1) * step:.1f},{y:.1f}")
    points.append(f"{width},{height}")
    return svg(width, height, f'<polygon points="{" ".join(points)}" fill="{color}" fill-opacity=".85"/>')


def time_axis(end: float, left: float, width: float, bottom: float, top: float = 0.0, begin: float = 0.0) -> str:
    """Round times between `begin` and `end` (seconds) below a picture, with thin vertical lines."""
    span = max(end - begin, 1e-12)
    step = round_up(span / 6)
    shapes, tick = [], -(-begin // step) * step
    while tick <= end + step * 1e-6:
        x = left + width * (tick - begin) / span
        look = "c" if x < left + width - 12 else "e"
        shapes.append(line(x, top, x, bottom) + text(x, bottom + 13, seconds(round(tick, 12)), f"q {look}"))
        tick += step
    return "".join(shapes)


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ..."""
    scale = 1.0
    while scale > value:
        scale /= 10
    while scale * 10 <= value:
        scale *= 10
    return next(scale * step for step in (1, 2, 5, 10) if value <= step * scale * (1 + 1e-9))


def stacked(
    series: Sequence[Series], at: Sequence[float], height: float = 200, most: int = 1200, begin: float = 0.0
) -> str:
    """Stacked areas over time (seconds, from `begin` on), as SVG; long runs are thinned out."""
    if not at:
        return "<p>no step was taken</p>"
    if len(at) > most:
        every = -(-len(at) // most)
        at, series = at[::every], [(label, color, values[::every]) for label, color, values in series]
    left, right, bottom = 56, 8, 26
    totals = [sum(values) for values in zip(*(values for _, _, values in series), strict=True)]
    top, end = _quarters_up(max(totals)), max(at[-1], 1e-9)

    def x(time: float) -> float:
        return round(left + (WIDTH - left - right) * (time - begin) / max(end - begin, 1e-9), 1)

    def y(value: float) -> float:
        return round(height - bottom - (height - bottom - 8) * value / top, 1)

    floor = [0.0] * len(at)
    shapes = [
        line(left, y(top * i / 4), WIDTH - right, y(top * i / 4))
        + text(left - 6, y(top * i / 4) + 4, f"{top * i / 4:g}", "e")
        for i in range(5)
    ]
    for _, color, values in series:
        ceiling = [low + value for low, value in zip(floor, values, strict=True)]
        there = [f"{x(t)},{y(v)}" for t, v in zip(at, ceiling, strict=True)]
        back = [f"{x(t)},{y(v)}" for t, v in zip(at, floor, strict=True)][::-1]
        shapes.append(f'<polygon points="{" ".join(there + back)}" fill="{COLORS[color]}" fill-opacity=".85"/>')
        floor = ceiling
    return svg(WIDTH, height, *shapes, time_axis(end, left, WIDTH - left - right, height - bottom, 8, begin))


def _quarters_up(value: float) -> float:
    """The next of 4, 8, 12, 16, 20, 28, 40, 80, ..., so that a quarter of it is a round number."""
    scale = 1.0
    while True:
        for step in (4, 8, 12, 16, 20, 28, 40):
            if value <= step * scale:
                return step * scale
        scale *= 10
