"""The roofline of measured variants: flop/s over flop/byte, under the limits of this machine."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from labkit_kernels import show
from labkit_kernels.bench import Report

from labkit.core.frames import table
from labkit.widgets.plot import Plot, around, decades, power, shape_at, short_number
from labkit.widgets.style import HUES

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

SHAPES = {"float32": "square", "bfloat16": "circle", "float16": "diamond"}


@dataclass(frozen=True)
class Limits:
    """The peak rates measured on this machine."""

    device: str
    bytes_per_second: dict[str, float]  # memory, cache -> reading or copying
    flops_per_second: dict[str, float]  # dtype -> multiplying matrices


@dataclass(frozen=True)
class Point:
    """One variant on one case. `intensity` is flops per byte that must move."""

    variant: str
    case: str
    dtype: str
    intensity: float
    flops_per_second: float
    bytes_per_second: float
    seconds: float
    fraction: float | None  # share of the limit; None if the bench was faster than the limit
    roof: str  # which limit: cache, memory or compute


@dataclass(frozen=True)
class Roofline:
    """Points below this machine's limits. Under the slope a call is bound by memory, under the flat part by
    arithmetic."""

    op: str
    limits: Limits
    points: tuple[Point, ...]

    def frame(self) -> pandas.DataFrame:
        return table((astuple(one) for one in self.points), list(Point.__dataclass_fields__))

    @property
    def best(self) -> Point:
        return max(self.points, key=lambda point: point.fraction or 0.0)

    def __repr__(self) -> str:
        return f"Roofline({self.op} on {self.limits.device}: {len(self.points)} points)"

    def _repr_html_(self) -> str:
        best = self.best
        note = f"{best.variant} comes nearest: {_share(best)} at {best.case}, {best.dtype}"
        return show.page(f"roofline of {self.op} on {self.limits.device}", note, self.svg(), self._key())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The plotly figure if plotly is available, else an SVG picture."""
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        try:
            figure = self.figure()
        except ImportError:
            return bundle
        return bundle | {"application/vnd.plotly.v1+json": figure.to_plotly_json() | {"config": {"displaylogo": False}}}

    # -- geometry ------------------------------------------------------------------------------------------------

    @property
    def colors(self) -> dict[str, str]:
        names = dict.fromkeys(point.variant for point in self.points)
        return {name: HUES[i % len(HUES)] for i, name in enumerate(names)}

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ranges of both axes, wide enough for the points and the corners of the roofs."""
        peak, slope = max(self.limits.flops_per_second.values()), min(self.limits.bytes_per_second.values())
        xs = [point.intensity for point in self.points]
        x = around([min(xs) / 2, max(*xs, peak / slope) * 2])
        return x, around([min(point.flops_per_second for point in self.points), peak])

    def roofs(self) -> list[tuple[str, bool, list[tuple[float, float]]]]:
        """(name, whether it is flat, its end points) within the ranges."""
        (left, right), (low, _) = self.ranges()
        peak = max(self.limits.flops_per_second.values())
        found = []
        for name, slope in self.limits.bytes_per_second.items():
            start = max(left, low / slope)
            label = f"{name} {short_number(slope)}B/s"
            found.append((label, False, [(start, start * slope), (peak / slope, peak)]))
        fast = max(self.limits.bytes_per_second.values())
        for name, top in self.limits.flops_per_second.items():
            found.append((f"{name} {short_number(top)}FLOP/s", True, [(max(left, top / fast), top), (right, top)]))
        return found

    # -- pictures ------------------------------------------------------------------------------------------------

    def svg(self) -> str:
        x, y = self.ranges()
        plot = Plot(760, 380, x, y, log_x=True, right=20)
        plot.ticks_y("flops a second", lambda value: short_number(value).strip())
        plot.ticks_x("flops a byte", [(value, power(value)) for value in decades(*x)])
        for label, flat, ends in self.roofs():
            plot.line(ends, dash="" if flat else "5 3")
            (x1, y1), (x2, y2) = ((plot.at_x(a), plot.at_y(b)) for a, b in ends)
            if flat:
                plot.text(plot.right, y2 - 5, label, anchor="end")
            else:
                turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
                x3, y3 = x1 + 0.97 * (x2 - x1), y1 + 0.97 * (y2 - y1)  # near the corner, where few points lie
                plot.text(round(x3, 1), round(y3 - 6, 1), label, anchor="end", turn=turn)
        for point in self.points:
            shape = SHAPES.get(point.dtype, "circle")
            plot.mark(point.intensity, point.flops_per_second, self.colors[point.variant], shape, _title(point))
        return plot.svg(f"{self!r}: flops a second over flops a byte")

    def _key(self) -> str:
        """The legend: colours for variants, shapes for dtypes."""

        def sample(color: str, shape: str) -> str:
            return f'<svg width="14" height="14" style="vertical-align:-2px">{shape_at(7, 7, color, shape)}</svg>'

        names = [f"{sample(color, 'circle')} {escape(name)}" for name, color in self.colors.items()]
        dtypes = dict.fromkeys(point.dtype for point in self.points)
        names += [f"{sample('none', SHAPES.get(dtype, 'circle'))} {dtype}" for dtype in dtypes]
        spans = "".join(f"<span>{name}</span>" for name in names)
        return f'<div class="head" style="gap:.2em 1.4em;margin-left:62px">{spans}</div>'

    def figure(self) -> go.Figure:
        """The same as a plotly figure that you can zoom."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("the figure needs plotly: pip install 'labkit[lab]'") from error
        return go.Figure(self.traces(), self.layout())

    def traces(self) -> list[dict[str, Any]]:
        """One trace per roof, one per variant."""
        found: list[dict[str, Any]] = []
        for label, flat, ends in self.roofs():
            line = {"color": "#888888", "width": 1.5, "dash": "solid" if flat else "dash"}
            xs, ys = zip(*ends, strict=True)
            found.append({"type": "scatter", "mode": "lines", "x": xs, "y": ys, "name": label, "line": line})
        for name, color in self.colors.items():
            own = [point for point in self.points if point.variant == name]
            symbols = [SHAPES.get(point.dtype, "circle") for point in own]
            found.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [point.intensity for point in own],
                    "y": [point.flops_per_second for point in own],
                    "name": name,
                    "text": [_title(point) for point in own],
                    "hoverinfo": "text",
                    "marker": {"color": color, "size": 10, "symbol": symbols, "line": {"width": 1, "color": "#888888"}},
                }
            )
        return found

    def layout(self) -> dict[str, Any]:
        grid = {"type": "log", "gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "exponentformat": "power"}
        return {
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "#888888"},
            "height": 420,
            "margin": {"l": 70, "r": 20, "t": 36, "b": 50},
            "title": {"text": f"{self.op} on {self.limits.device}", "font": {"size": 14}},
            "xaxis": grid | {"title": {"text": "flops a byte"}},
            "yaxis": grid | {"title": {"text": "flops a second"}},
        }


def _title(point: Point) -> str:
    return (
        f"{point.variant}, {point.case}, {point.dtype}: {point.seconds * 1e6:.3g} us, "
        f"{short_number(point.flops_per_second)}FLOP/s, {short_number(point.bytes_per_second)}B/s, "
        f"{_share(point)}"
    )


def _share(point: Point) -> str:
    return "no limit known" if point.fraction is None else f"{point.fraction:.0%} of the {point.roof} roof"


def roofline(op: str, report: Report, limits: Limits) -> Roofline:
    """The points of a bench report."""
    points = [
        Point(
            row.variant,
            row.case,
            row.dtype,
            row.flops_per_second / row.bytes_per_second,
            row.flops_per_second,
            row.bytes_per_second,
            row.median,
            row.fraction,
            row.roof,
        )
        for row in report
        if row.status == "ok" and row.flops_per_second and row.bytes_per_second
    ]
    if not points:
        why = "it moves bytes and computes nothing" if report.count("ok") else "nothing could be timed"
        raise ValueError(f"there is no roofline of {op}: {why}; bench() says what there is")
    return Roofline(op, limits, tuple(points))
