"""Plots as inline SVG: axes, lines, marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

STYLE = (
    "<style>.lkp{max-width:100%;height:auto;display:block;font-family:var(--jp-content-font-family,system-ui,sans-serif)}"
    ".lkp text{font-size:11.5px;fill:currentColor}.lkp .muted{opacity:.62}.lkp .title{font-weight:600}</style>"
)


class Plot:
    """A rectangle with two axes. Add lines and marks in data coordinates; `svg()` returns the picture."""

    def __init__(
        self, width: int, height: int, x: tuple[float, float], y: tuple[float, float], *, log_x: bool = False,
        left: int = 62, right: int = 16, top: int = 14, bottom: int = 40,
    ) -> None:  # fmt: skip
        """The vertical axis is logarithmic, the horizontal one if `log_x`."""
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = left, width - right, top, height - bottom
        self._x, self._y = x, y
        self.log_x = log_x
        self.parts: list[str] = []

    def at_x(self, value: float) -> float:
        return round(self.left + (self.right - self.left) * _share(value, self._x, self.log_x), 1)

    def at_y(self, value: float) -> float:
        return round(self.bottom - (self.bottom - self.top) * _share(value, self._y, True), 1)

    def ticks_y(self, label: str, form: Callable[[float], str]) -> None:
        for value in decades(*self._y):
            y = self.at_y(value)
            self._line(self.left, y, self.right, y, 0.14)
            self.text(self.left - 7, y + 4, form(value), anchor="end")
        middle = (self.top + self.bottom) / 2
        self.parts.append(
            f'<text class="muted" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">'
            f"{escape(label)}</text>"
        )

    def ticks_x(self, label: str, ticks: Sequence[tuple[float, str]]) -> None:
        for value, name in ticks:
            x = self.at_x(value)
            self._line(x, self.bottom, x, self.bottom + 4, 0.6)
            self.text(x, self.bottom + 17, name, anchor="middle")
        self._line(self.left, self.bottom, self.right, self.bottom, 0.6)
        self.text((self.left + self.right) / 2, self.height - 5, label, anchor="middle", kind="muted")

    def _line(self, x1: float, y1: float, x2: float, y2: float, opacity: float) -> None:
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" stroke-opacity="{opacity}"/>'
        )

    def line(self, points: Sequence[tuple[float, float]], color: str = "currentColor", dash: str = "") -> None:
        places = " ".join(f"{self.at_x(x)},{self.at_y(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="1.6"{dashed}/>')

    def mark(self, x: float, y: float, color: str, shape: str = "circle", title: str = "") -> None:
        """A mark; its title appears on hover."""
        cx, cy = self.at_x(x), self.at_y(y)
        self.parts.append(shape_at(cx, cy, color, shape, title))

    def box(self, x: float, wide: float, y: float, color: str, title: str) -> None:
        """A bar from the bottom up to y; `wide` is in pixels."""
        left, top = self.at_x(x) - wide / 2, self.at_y(y)
        self.parts.append(
            f'<rect x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{max(self.bottom - top, 1.5):.1f}" rx="1.5" '
            f'fill="{color}"><title>{escape(title)}</title></rect>'
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "", turn: float = 0.0) -> None:
        """Text at a position in pixels."""
        turned = f' transform="rotate({turn:.1f} {x} {y})"' if turn else ""
        named = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}"{named}{turned}>{escape(text)}</text>')

    def svg(self, label: str) -> str:
        return (
            f'{STYLE}<svg class="lkp" role="img" aria-label="{escape(label, quote=True)}" width="{self.width}" '
            f'viewBox="0 0 {self.width} {self.height}">{"".join(self.parts)}</svg>'
        )


def shape_at(cx: float, cy: float, color: str, shape: str, title: str = "") -> str:
    named = f"<title>{escape(title)}</title>" if title else ""
    style = f'fill="{color}" stroke="currentColor" stroke-opacity=".45" stroke-width=".8"'
    if shape == "square":
        return f'<rect x="{cx - 4.5}" y="{cy - 4.5}" width="9" height="9" {style}>{named}</rect>'
    if shape == "diamond":
        places = f"{cx},{cy - 6} {cx + 6},{cy} {cx},{cy + 6} {cx - 6},{cy}"
        return f'<polygon points="{places}" {style}>{named}</polygon>'
    return f'<circle cx="{cx}" cy="{cy}" r="5" {style}>{named}</circle>'


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    low, high = (math.log10(end) for end in ends) if log else ends
    value = math.log10(max(value, 1e-300)) if log else value
    return min(1.0, max(0.0, (value - low) / (high - low)))


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, at most seven of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, -(-(last - first) // 6))
    return [10.0**i for i in range(first, last + 1, step)]


def around(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten that enclose all of these numbers."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low) - 0.05), math.ceil(math.log10(high) + 0.05)
    return 10.0**first, 10.0 ** max(last, first + 1)


def short_number(value: float) -> str:
    """12 G, 3.4 M: for flops and bytes."""
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def power(value: float) -> str:
    """A power of ten with superscript digits."""
    digits = str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"
