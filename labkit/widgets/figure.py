"""The dashboard's figure: six panels. Every trace is created once; each update sends whole windows.

A figure widget sends its whole program to the page (5 MB), so there is one figure with several panels. Arrays are
float32 or uint8 and travel as bytes. Axes and text are half grey, readable on light and dark pages.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from labkit.widgets.feed import Feed, Pace
from labkit.widgets.style import COLORS, SEGMENT_COLOR, seconds
from labkit.widgets.timeline import WAITS, Segment

INK, FAINT = "#808080", "rgba(128,128,128,0.22)"
MOST_LANES, MOST_BARS = 16, 400
MOST_ROWS, MOST_BLOCKS = 48, 96
BARS = ("queued", "prefill", "decode", "held", "preempted", "swapped", "recompute")
CELLS = (  # a value of the heatmap, its colour
    ("nothing", "rgba(128,128,128,0.07)"),
    ("cached", COLORS["orange"]),
    ("prefilled or decoded", COLORS["blue"]),
    ("being filled", COLORS["sky"]),
)
AREAS = {  # trace -> (panel, column, colour)
    "used": (1, "used_blocks", COLORS["blue"]),
    "cached": (1, "cached_blocks", COLORS["orange"]),
    "free": (1, "free_blocks", "rgba(128,128,128,0.18)"),
    "decode": (2, "decode_tokens", COLORS["blue"]),
    "prefill": (2, "prefill_tokens", COLORS["green"]),
    "from cache": (2, "cached_tokens", COLORS["orange"]),
    "running": (3, "running", COLORS["blue"]),
    "swapped": (3, "swapped", COLORS["purple"]),
    "waiting": (3, "waiting", COLORS["red"]),
}
LINES = (  # trace, colour, dash; all but the first against the right axis
    ("tokens/s", COLORS["blue"], "solid"),
    ("first token p50", COLORS["green"], "solid"),
    ("first token p90", COLORS["green"], "dot"),
    ("between tokens p50", COLORS["orange"], "solid"),
    ("between tokens p90", COLORS["orange"], "dot"),
)
TITLES = (
    ("KV blocks", (("used", "blue"), ("cached", "orange"), ("free", "grey"))),
    ("Tokens a step", (("decode", "blue"), ("prefill", "green"), ("from cache", "orange"))),
    ("Requests", (("running", "blue"), ("swapped", "purple"), ("waiting", "red"))),
    ("Speed", (("tokens/s", "blue"), ("first token", "green"), ("between tokens", "orange"))),
    ("Block tables", (("from cache", "orange"), ("filled", "blue"), ("filling", "sky"))),
    ("Timeline", tuple((kind, kind) for kind in ("queued", "prefill", "decode", "preempted", "swapped"))),
)


def build() -> Any:
    """A figure widget with all its traces, empty."""
    try:
        import anywidget  # noqa: F401  plotly makes its figure of it
        import pandas  # noqa: F401  plotly asks whether it is there, and must not find it half imported by another thread
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ImportError(f"a dashboard needs {error.name}: pip install 'labkit[lab]'") from error
    grid = make_subplots(
        rows=3,
        cols=2,
        specs=[[{}, {}], [{}, {"secondary_y": True}], [{}, {}]],
        row_heights=[0.29, 0.29, 0.42],
        horizontal_spacing=0.11,
        vertical_spacing=0.115,
        subplot_titles=[_title(*title) for title in TITLES],
    )
    for name, (panel, _, color) in AREAS.items():
        grid.add_trace(_area(go, name, panel, color), row=(panel + 1) // 2, col=2 - panel % 2)
    for name, color, dash in LINES:
        grid.add_trace(_line(go, name, color, dash), row=2, col=2, secondary_y=name != "tokens/s")
    grid.add_trace(_tables(go), row=3, col=1)
    for kind in BARS:
        grid.add_trace(_bars(go, kind), row=3, col=2)
    figure = go.FigureWidget(grid)
    figure._config = {**figure._config, "displayModeBar": False, "displaylogo": False, "responsive": True}
    _lay_out(figure)
    return figure


_EMPTY = np.zeros(0, np.float32)


def _area(go: Any, name: str, panel: int, color: str) -> Any:
    return go.Scatter(
        name=name, meta=name, x=_EMPTY, y=_EMPTY, mode="lines", line={"width": 0, "color": color, "shape": "vh"},
        fillcolor=color, stackgroup=str(panel), hovertemplate="%{y:.4~g} " + name + "<extra></extra>",
    )  # fmt: skip


def _line(go: Any, name: str, color: str, dash: str) -> Any:
    value = "%{y:.4~g} " if name == "tokens/s" else "%{y:.3~s}s "
    return go.Scatter(
        name=name, meta=name, x=_EMPTY, y=_EMPTY, mode="lines", connectgaps=False,
        hovertemplate=f"{value}{name}<extra></extra>", line={"width": 1.6, "color": color, "dash": dash},
    )  # fmt: skip


def _tables(go: Any) -> Any:
    return go.Heatmap(
        name="tables", meta="tables", z=np.zeros((1, 1), np.uint8), zmin=0, zmax=len(CELLS) - 1, showscale=False,
        xgap=1, ygap=1, colorscale=_steps([color for _, color in CELLS]),
        hovertemplate="line %{y}, block %{x}<extra></extra>",
    )  # fmt: skip


def _bars(go: Any, kind: str) -> Any:
    return go.Bar(
        name=kind, meta=f"{kind} bar", x=_EMPTY, y=_EMPTY, base=_EMPTY, orientation="h", width=0.78,
        marker={"color": _bar_color(kind)}, hovertext=(), hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip


def _title(words: str, keys: Sequence[tuple[str, str]]) -> str:
    """A panel's title, which is also its legend."""
    shown = "  ".join(
        f"<span style='color:{COLORS.get(color) or _bar_color(color)}'>\u25a0</span> {name}" for name, color in keys
    )
    return f"<b>{words}</b>   <span style='font-size:11px'>{shown}</span>"


def _bar_color(kind: str) -> str:
    return SEGMENT_COLOR[kind]


def _steps(colors: Sequence[str]) -> list[tuple[float, str]]:
    """A colour scale with discrete colours."""
    n = len(colors)
    return [(edge / n, color) for i, color in enumerate(colors) for edge in (i, i + 1)]


def _lay_out(figure: Any) -> None:
    axis = {
        "showgrid": True, "gridcolor": FAINT, "zeroline": False, "linecolor": FAINT, "ticks": "", "automargin": False,
        "tickfont": {"size": 11}, "fixedrange": False,
    }  # fmt: skip
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, rangemode="tozero")
    for row, col in ((1, 1), (1, 2), (2, 1), (2, 2)):
        figure.update_xaxes(ticksuffix=" s", nticks=7, row=row, col=col)
    figure.update_xaxes(ticksuffix=" s", nticks=7, row=3, col=2)
    figure.update_xaxes(
        title={"text": "logical block", "font": {"size": 11}, "standoff": 4}, showgrid=False, row=3, col=1
    )
    figure.update_yaxes(title={"text": "row", "font": {"size": 11}, "standoff": 2}, showgrid=False, row=3, col=1,
                        autorange="reversed", rangemode="normal", tickfont={"size": 10})  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"size": 10}, rangemode="normal", row=3, col=2)
    ticks = [digit * 10.0**power for power in range(-5, 4) for digit in (1, 2, 5)]
    figure.update_yaxes(type="log", showgrid=False, tickvals=ticks, ticktext=[seconds(tick) for tick in ticks],
                        rangemode="normal", secondary_y=True, row=2, col=2)  # fmt: skip
    figure.update_layout(
        template="none", height=660, autosize=True, showlegend=False, barmode="overlay", bargap=0,
        margin={"l": 52, "r": 52, "t": 34, "b": 38}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK}, hovermode="x", uirevision="kept",
        hoverlabel={"font": {"size": 12}, "align": "left"}, transition={"duration": 0},
    )  # fmt: skip
    for note in figure.layout.annotations:  # titles are on the left, above their panel
        note.update(xanchor="left", x=note.x - 0.2225, yshift=2, font={"size": 13, "color": INK})


def update(figure: Any, feed: Feed, upto: int | None = None) -> None:
    """Update all panels to this step, in one message."""
    window = feed.window(upto)
    names, bars = lanes(feed.segments(upto), float(window.time[0]) if len(window) else 0.0)
    with figure.batch_update():
        traces = {trace.meta: trace for trace in figure.data}
        for name, (_, column, _) in AREAS.items():
            traces[name].update(x=window.time, y=window.columns[column])
        _speed(traces, window.pace)
        z = cells(feed, upto)
        traces["tables"].z = z
        for kind, found in bars.items():
            traces[f"{kind} bar"].update(
                x=np.array([segment.seconds for _, segment in found], np.float32),
                base=np.array([segment.begin / 1e9 for _, segment in found], np.float32),
                y=np.array([lane for lane, _ in found], np.float32),
                hovertext=[_says(segment) for _, segment in found],
            )
        if len(window):
            begin, end = float(window.time[0]), float(window.time[-1])
            for axis in ("xaxis", "xaxis2", "xaxis3", "xaxis4"):
                figure.layout[axis].range = (begin, max(end, begin + 1e-3))
            since = min((segment.begin / 1e9 for found in bars.values() for _, segment in found), default=begin)
            figure.layout.xaxis6.range = (since, max(end, since + 1e-3))
        rows = taken_rows(feed, upto)
        figure.layout.yaxis6.update(tickmode="array", tickvals=list(range(len(rows))), ticktext=list(map(str, rows)))
        lanes_shown = {"tickvals": list(range(len(names))), "ticktext": list(map(_short, names))}
        figure.layout.yaxis7.update(tickmode="array", range=(max(len(names), 8) - 0.4, -0.6), **lanes_shown)


def refresh_traits(figure: Any) -> None:
    """Set the figure's traits to the current data for pages that open it from here on. No message is sent, because open
    pages have the data already."""
    figure._trait_values["_widget_data"] = copy.deepcopy(figure._data)
    figure._trait_values["_widget_layout"] = copy.deepcopy(figure._layout)


def fit(figure: Any) -> None:
    """Fit the figure to its current width. A page that opened it before it had a width, or was resized, notices this
    when anything of the layout changes."""
    figure.layout.meta = (figure.layout.meta or 0) + 1


def repeat(figure: Any) -> None:
    """Send all that is shown once more, for a page that missed the last update because it was still loading plotly, or
    because a busy server dropped messages."""
    same: dict[tuple[str, ...], list[int]] = {}
    for i, data in enumerate(figure._data):
        same.setdefault(tuple(name for name in ("x", "y", "z", "base", "hovertext") if name in data), []).append(i)
    axes = {f"{name}.range": figure.layout[name].range for name in figure._layout if name.startswith("xaxis")}
    for names, traces in same.items():
        figure._send_update_msg({name: [figure._data[i][name] for i in traces] for name in names}, axes, traces)


def _speed(traces: dict[str, Any], pace: Pace) -> None:
    rate = (pace.tokens / np.maximum(pace.seconds, 1e-9)).astype(np.float32)
    _broken(traces["tokens/s"], pace.time, rate, pace.breaks)
    for what, values in (("first token", pace.ttft), ("between tokens", pace.itl)):
        for i, name in enumerate(("p50", "p90")):
            _broken(traces[f"{what} {name}"], pace.time, values[:, i], pace.breaks)


def _broken(trace: Any, x: np.ndarray, y: np.ndarray, breaks: np.ndarray) -> None:
    """A line through the points, interrupted where an idle time begins."""
    there = ~np.isnan(y)
    x, y = x[there], y[there]
    at = np.searchsorted(x, breaks)
    trace.update(x=np.insert(x, at, breaks), y=np.insert(y, at, np.nan))


def taken_rows(feed: Feed, upto: int | None = None) -> list[int]:
    """The rows of the batch that hold tokens, up to the number that fits."""
    found: list[int] = np.flatnonzero(feed.table(upto)[0])[:MOST_ROWS].tolist()
    return found


def cells(feed: Feed, upto: int | None = None) -> np.ndarray:
    """uint8 [rows, blocks]: what each logical block of each row holds; long tables are cut."""
    tokens, cached = (counts[taken_rows(feed, upto)] for counts in feed.table(upto))
    size = feed.block_size
    blocks = -(-tokens // size)
    wide = min(MOST_BLOCKS, max(16, int(blocks.max(initial=0))))
    at = np.arange(wide)[None, :]
    z = np.zeros((max(len(tokens), 1), wide), np.uint8)
    held = z[: len(tokens)]
    held[at < blocks[:, None]] = 2
    held[at < (cached // size)[:, None]] = 1
    held[(at == blocks[:, None] - 1) & (tokens % size != 0)[:, None]] = 3
    return z


Bars = list[tuple[int, Segment]]  # (lane, what is drawn on it)


def lanes(segments: Sequence[Segment], since: float) -> tuple[list[str], dict[str, Bars]]:
    """Running requests and the latest others that existed after `since` (s), one lane each; their segments by kind."""
    recent = [segment for segment in segments if segment.end / 1e9 >= since]
    order = list(dict.fromkeys(segment.request for segment in recent))
    running = {segment.request for segment in recent if segment.is_open and segment.kind not in WAITS}
    others = [name for name in order if name not in running]
    shown = {*list(running)[:MOST_LANES], *others[len(others) - max(0, MOST_LANES - len(running)) :]}
    names = [name for name in order if name in shown]
    lane_of = {name: i for i, name in enumerate(names)}
    bars: dict[str, Bars] = {kind: [] for kind in BARS}
    for segment in [segment for segment in recent if segment.request in lane_of][-MOST_BARS:]:
        if segment.kind in bars:
            bars[segment.kind].append((lane_of[segment.request], segment))
    return names, bars


def _says(segment: Segment) -> str:
    return f"<b>{_plain(segment.request)}</b> {segment.kind}, {segment.seconds:.3g} s<br>{_plain(segment.why)}"


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _short(name: str) -> str:
    return _plain(name if len(name) <= 8 else name[:7] + "\u2026")
