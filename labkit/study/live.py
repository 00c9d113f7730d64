"""Live curves of a running experiment, one per setting. Reads histories; never touches an engine.

A daemon thread reads the history at most five times a second and sends what is new as one message. A figure's data are
lost when a notebook is opened again, so closing leaves a static copy beside it.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from labkit.bench.workload import Workload
from labkit.core.options import choose
from labkit.study.history import CURVES, History, rolling, thin
from labkit.widgets import charts, style

EVERY = 0.2  # seconds between two updates, longer if an update is slow
MOST_POINTS = 600


class LiveCurves:
    """Created once per experiment and reused for its next run, because a page never frees widgets."""

    def __init__(self, names: list[str], curve: str) -> None:
        choose("curve", curve, CURVES)
        self.names, self.curve = names, curve
        self.lock = threading.Lock()
        self.num_updates = 0
        self.figure = _figure(names, curve)
        self._points = {name: (np.zeros(0, np.float32), np.zeros(0, np.float32)) for name in names}
        self._now: tuple[str, History, int, int] | None = None
        self._drawn = -1  # steps of the current history already drawn
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> LiveCurves:
        """Show the figure as this cell's output and start following."""
        from IPython.display import display

        nothing = np.zeros(0, np.float32)
        self._points = dict.fromkeys(self.names, (nothing, nothing))
        with self.figure.batch_update():
            for trace in self.figure.data:
                trace.x = trace.y = nothing
        show: Any = display  # IPython's has no types
        show(self.figure)
        self._stop.clear()
        self._thread = threading.Thread(target=self._follow, name="labkit-live-curves", daemon=True)
        self._thread.start()
        return self

    def watch(self, name: str, history: History, workload: Workload) -> None:
        """Follow this setting from here on, and draw the previous one to its end."""
        num_output = sum(ask.num_output for ask in workload.asks)
        num_prompt = sum(workload.lengths()) - num_output
        with self.lock:
            self._update()
            self._now, self._drawn = (name, history, num_prompt, num_output), -1

    def close(self) -> None:
        """Draw the end, stop following, and leave a static picture."""
        from IPython.display import HTML, display

        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)
        with self.lock:
            self._update()
            self._now = None
        show: Any = display
        show(HTML(self.picture()))  # type: ignore[no-untyped-call]

    def picture(self) -> str:
        """The current curves as a static picture."""
        lines = [
            charts.Curve(name, _color(i), xs.tolist(), ys.tolist())
            for i, (name, (xs, ys)) in enumerate(self._points.items())
            if len(xs)
        ]
        return style.page(
            style.title(f"{self.curve} of the last tenth of the tokens" if self.curve in RATES else self.curve),
            style.legend(style.key(line.label, line.color) for line in lines),
            charts.curves(lines, "seconds", ""),
        )

    def _follow(self) -> None:
        pause = EVERY
        while not self._stop.wait(pause):
            begin = time.perf_counter()
            with self.lock:
                self._update()
            pause = max(EVERY, 4 * (time.perf_counter() - begin))

    def _update(self) -> None:
        if self._now is None:
            return
        name, history, num_prompt, num_output = self._now
        if history.num_steps == self._drawn:
            return
        self._drawn = history.num_steps
        xs, ys = thin(*rolling(history.columns(), self.curve, num_prompt, num_output), most=MOST_POINTS)
        self._points[name] = (xs, ys)
        with self.figure.batch_update():
            trace = self.figure.data[self.names.index(name)]
            trace.x, trace.y = xs, ys
        self.num_updates += 1


RATES = ("hit_rate", "output_tokens_per_s")


def _figure(names: list[str], curve: str) -> Any:
    try:
        import anywidget  # noqa: F401  plotly makes its figure of it
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(f"a live figure needs {error.name}: pip install 'labkit[lab]'") from error
    empty = np.zeros(0, np.float32)
    traces = [go.Scatter(x=empty, y=empty, name=name, line_color=_color(i)) for i, name in enumerate(names)]
    figure = go.FigureWidget(traces)
    figure.update_layout(**charts.LAYOUT, height=340, margin={"l": 60, "r": 20, "t": 20, "b": 45})
    figure.update_layout(showlegend=True, xaxis_title="seconds", yaxis_title=curve)
    return figure


def _color(i: int) -> str:
    return style.HUES[i % len(style.HUES)]
