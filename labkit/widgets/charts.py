"""Small charts as inline SVG: bars, curves, dots, columns. Also sets the style of plotly figures to match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from labkit.widgets.style import HUES

GREY, CLEAR = "#808080", "rgba(0,0,0,0)"  # readable on white and on black; no background
AXIS = {"linecolor": GREY, "tickcolor": GREY, "gridcolor": "rgba(128,128,128,.2)", "zeroline": False}
LAYOUT = {  # of a plotly figure, for a light page and a dark one
    "template": "simple_white", "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "font": {"color": GREY, "size": 13},
    "xaxis": AXIS, "yaxis": {**AXIS, "showgrid": True, "rangemode": "tozero"},
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    low: float | None = None  # the ends of a whisker
    high: float | None = None
    color: str = HUES[0]


@dataclass(frozen=True)
class Curve:
    label: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]
    dash: str = ""  # as in SVG's stroke-dasharray


def bars(rows: Sequence[Bar], width: int = 430, most: float = 0.0) -> str:
    """Horizontal bars with their values; a whisker shows an interval. `most` is the value of a full-length bar."""
    longest = max((len(row.label) for row in rows), default=0)
    left = min(width * 0.45, 16 + 7 * longest)
    room = width - left - 60
    there = [max(row.value, row.high or 0.0) for row in rows if math.isfinite(row.value)]
    most = most or max(there, default=0.0) or 1.0
    shapes = []
    for i, row in enumerate(rows):
        y = 19 * i
        label = row.label if 7 * len(row.label) < left else row.label[: int(left / 7) - 2] + "…"
        shapes.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}'
            f"<title>{escape(row.label)}</title></text>"
        )
        if not math.isfinite(row.value):
            shapes.append(f'<text x="{left}" y="{y + 13}" class="dim">none</text>')
            continue
        long = max(room * max(row.value, 0.0) / most, 1.0)
        end = long
        shapes.append(f'<rect x="{left}" y="{y + 2}" width="{long:.1f}" height="14" rx="2" fill="{row.color}"/>')
        if row.low is not None and row.high is not None and row.high > row.low:
            x, end = left + room * row.low / most, max(long, room * row.high / most)
            shapes.append(
                f'<path d="M{x:.1f} {y + 9}H{left + room * row.high / most:.1f}M{x:.1f} {y + 5}v8'
                f'M{left + room * row.high / most:.1f} {y + 5}v8" stroke="currentColor" fill="none"/>'
            )
        shapes.append(f'<text x="{left + end + 6:.1f}" y="{y + 13}">{show(row.value)}</text>')
    return f'<svg viewBox="0 0 {width} {19 * len(rows) + 2}" role="img">{"".join(shapes)}</svg>'


def curves(
    lines: Sequence[Curve], x_name: str = "", y_name: str = "", width: int = 860, height: int = 240, most: float = 0.0
) -> str:
    """Lines over one pair of axes that start at zero; `most` fixes the upper end of y."""
    left, bottom, top = 56, 34, 20
    end = round_up(max((x for line in lines for x in line.xs if math.isfinite(x)), default=1.0))
    high = most or round_up(max((y for line in lines for y in line.ys if math.isfinite(y)), default=1.0))

    def at(x: float, y: float) -> str:
        across, up = (width - left - 14) * x / end, (height - bottom - top) * min(y / high, 1.02)
        return f"{left + across:.1f},{height - bottom - up:.1f}"

    shapes = []
    for i in range(5):
        x, y = at(0, high * i / 4).split(",")
        shapes.append(
            f'<line x1="{x}" x2="{width - 14}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".15"/>'
            f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{show(high * i / 4)}</text>'
            f'<text x="{at(end * i / 4, 0).split(",")[0]}" y="{height - bottom + 16}" text-anchor="middle">'
            f"{show(end * i / 4)}</text>"
        )
    for line in lines:
        dash = f'stroke-dasharray="{line.dash}" ' if line.dash else ""
        for piece in _pieces(line):
            places = " ".join(at(x, y) for x, y in piece)
            shapes.append(
                f'<polyline points="{places}" fill="none" stroke="{line.color}" stroke-width="1.8" '
                f'{dash}stroke-linejoin="round"><title>{escape(line.label)}</title></polyline>'
            )
    shapes.append(
        f'<text x="{left - 48}" y="11" class="dim">{escape(y_name)}</text>'
        f'<text x="{width - 14}" y="{height - 2}" text-anchor="end" class="dim">{escape(x_name)}</text>'
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'


def dots(pairs: Sequence[tuple[float, float]], x_name: str, y_name: str, width: int = 430, height: int = 300) -> str:
    """Points whose two numbers should be equal, and the diagonal."""
    left, bottom, top = 48, 36, 20
    most = round_up(max((max(pair) for pair in pairs), default=1.0))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 14) * x / most, height - bottom - (height - bottom - top) * y / most

    shapes = []
    for i in range(5):
        x, y = at(most * i / 4, most * i / 4)
        shapes.append(
            f'<line x1="{left}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            f'stroke-opacity=".15"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{show(most * i / 4)}</text>'
            f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{show(most * i / 4)}</text>'
        )
    (x1, y1), (x2, y2) = at(0, 0), at(most, most)
    shapes.append(
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" stroke-opacity=".5" '
        f'stroke-dasharray="4 3"/><text x="0" y="11" class="dim">{escape(y_name)}</text>'
        f'<text x="{width - 14}" y="{height - 3}" text-anchor="end" class="dim">{escape(x_name)}</text>'
    )
    places = "".join("M{:.1f} {:.1f}h0".format(*at(*pair)) for pair in pairs)
    shapes.append(
        f'<path d="{places}" stroke="{HUES[0]}" stroke-opacity=".45" stroke-width="4" stroke-linecap="round"/>'
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'


def columns(
    counts: Sequence[float], first: float, last: float, name: str, color: str, width: int = 270, height: int = 110
) -> str:
    """A histogram: columns from `first` to `last`. An SVG group, `width` wide."""
    most = max(counts, default=0.0) or 1.0
    wide, floor = width / max(len(counts), 1), height - 20
    shapes = [
        f'<rect x="{i * wide:.1f}" y="{floor - (floor - 20) * count / most:.1f}" width="{max(wide - 1, 0.5):.1f}" '
        f'height="{(floor - 20) * count / most:.1f}" fill="{color}"/>'
        for i, count in enumerate(counts)
        if count
    ]
    return (
        f'<text x="0" y="11">{escape(name)}</text>{"".join(shapes)}'
        f'<line x1="0" x2="{width}" y1="{floor}" y2="{floor}" stroke="currentColor" stroke-opacity=".4"/>'
        f'<text x="0" y="{height - 5}" class="dim">{show(first)}</text>'
        f'<text x="{width}" y="{height - 5}" text-anchor="end" class="dim">{show(last)}</text>'
    )


def beside(groups: Sequence[str], width: int = 270, gap: int = 25, height: int = 110) -> str:
    """SVG groups side by side."""
    each = "".join(f'<g transform="translate({i * (width + gap)},0)">{group}</g>' for i, group in enumerate(groups))
    return f'<svg viewBox="0 0 {len(groups) * (width + gap) - gap} {height}" role="img">{each}</svg>'


def show(value: float) -> str:
    """A number in few characters: 1,234 / 56.7 / 0.123 / 4.5e-06."""
    if not math.isfinite(value):
        return "none"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}"


def round_up(value: float) -> float:
    """The next of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12, ...: a quarter of it is a short number."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    return next(step * scale for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if value <= step * scale * (1 + 1e-9))


def _pieces(curve: Curve) -> list[list[tuple[float, float]]]:
    """The parts of a curve between points without a value."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.xs, curve.ys, strict=True):
        if math.isfinite(y):
            found[-1].append((float(x), float(y)))
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]
