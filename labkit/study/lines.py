"""Curves of numbers from a cell: one picture that is interactive where plotly is, and a static one elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from labkit.widgets import charts, style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PLOTLY = "application/vnd.plotly.v1+json"


class Lines:
    """Named curves `{name: (xs, ys)}`. At the end of a cell it is drawn by plotly; readers without JavaScript see the
    same curves as SVG. "a, b" and "a, c" have the same color, and "a, c" is dashed.

    >>> Lines({"lru": ([1, 2, 4], [0.1, 0.2, 0.3])}, x="capacity", y="hit rate")
    Lines(hit rate over capacity: lru)
    """

    def __init__(
        self, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str = "x", y: str = "y"
    ) -> None:
        if not curves:
            raise ValueError('there are no curves: give at least one, such as {"lru": (xs, ys)}')
        for name, (xs, ys) in curves.items():
            if len(xs) != len(ys):
                raise ValueError(f"curve {name!r} has {len(xs)} x and {len(ys)} y: give as many of both")
        self.x, self.y = x, y
        self.curves = {
            name: ([round(float(v), 6) for v in xs], [round(float(v), 6) for v in ys])
            for name, (xs, ys) in curves.items()
        }

    def __repr__(self) -> str:
        return f"Lines({self.y} over {self.x}: {', '.join(self.curves)})"

    def _looks(self) -> list[tuple[str, int]]:
        """Each curve's color, and which dash."""
        parts = [name.partition(", ")[::2] for name in self.curves]
        bases = list(dict.fromkeys(base for base, _ in parts))
        kinds = sorted(dict.fromkeys(kind for _, kind in parts), key=bool)  # without a second part: a full line
        if len(bases) == len(parts):
            kinds = [""]
        hues = [style.HUES[bases.index(base) % len(style.HUES)] for base, _ in parts]
        return [
            (hue, kinds.index(kind) % 3 if kind in kinds else 0) for hue, (_, kind) in zip(hues, parts, strict=True)
        ]

    def figure(self) -> Figure:
        """The plotly figure, to change or save."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("figure() needs plotly: pip install 'labkit[lab]'") from error
        figure = go.Figure()
        figure.update_layout(**charts.LAYOUT, height=340, margin={"l": 60, "r": 20, "t": 20, "b": 50})
        figure.update_layout(xaxis_title=self.x, yaxis_title=self.y, showlegend=True)
        for (name, (xs, ys)), (hue, dash) in zip(self.curves.items(), self._looks(), strict=True):
            mode = "lines+markers" if len(xs) <= 20 else "lines"
            line = {"color": hue, "dash": ("solid", "dash", "dot")[dash]}
            figure.add_trace(go.Scatter(x=xs, y=ys, name=name, mode=mode, line=line))
        return figure

    def _repr_html_(self) -> str:
        drawn = [
            charts.Curve(name, hue, xs, ys, ("", "7 4", "2 3")[dash])
            for (name, (xs, ys)), (hue, dash) in zip(self.curves.items(), self._looks(), strict=True)
        ]
        keys = [style.key(curve.label, curve.color) for curve in drawn]
        return style.page(style.legend(keys), charts.curves(drawn, self.x, self.y))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        with suppress(ImportError):  # the static picture is enough
            bundle[PLOTLY] = json.loads(self.figure().to_json())
        return bundle
