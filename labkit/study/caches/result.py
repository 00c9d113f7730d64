"""The result of a cache study: tables, figures, a picture. Knows nothing of how it was computed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import labkit.study.tables as tables
from labkit.core.options import closest
from labkit.study.caches.stack import Distances
from labkit.study.traces.trace import Excluded
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

KEPT_POINTS = 300  # of the curve over all sizes
RATES = ("block_hit_rate", "token_hit_rate", "request_hit_rate", "percent_of_clairvoyant", "saved_flops_share",
         "jain_index")  # fmt: skip


class PrefixStudy:
    """Hits of prefix caches over a trace: `rows` has one for each policy and capacity, `frame()` is their table.

    `plot()` draws hit rates over capacities, `miss_ratio()` the LRU curve over all sizes, `heatmap()` how far apart
    blocks are reused. `tenants()`, `reuse()` and `idle()` are further tables.
    """

    def __init__(
        self, name: str, block_size: int, rows: list[dict[str, Any]], tenants: list[dict[str, Any]],
        distances: Distances, idle: NDArray[np.int64], excluded: Excluded,
    ) -> None:  # fmt: skip
        self.name, self.block_size, self.rows = name, block_size, rows
        self.distances, self.excluded = distances, excluded
        self._tenants, self._idle = tenants, idle
        best = {row["capacity"]: row["block_hit_rate"] for row in rows if row["policy"] == "clairvoyant"}
        for row, counts in zip(rows, idle, strict=True):
            bound = best.get(row["capacity"], math.nan)
            row["percent_of_clairvoyant"] = 100 * row["block_hit_rate"] / bound if bound else math.nan
            row["idle_p50"] = _median_idle(counts)

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(row["policy"] for row in self.rows))

    @property
    def capacities(self) -> list[float]:
        return list(dict.fromkeys(row["capacity"] for row in self.rows))

    def __repr__(self) -> str:
        policies, sizes = len(self.policies), len(self.capacities)
        requests, blocks = (max(row[name] for row in self.rows) for name in ("requests", "blocks"))
        left = f"; {self.excluded}" if self.excluded else ""
        return (
            f"PrefixStudy({policies} {'policy' if policies == 1 else 'policies'} x {sizes} "
            f"{'capacity' if sizes == 1 else 'capacities'} over {self.name}: {requests:,} requests, "
            f"{blocks:,} blocks of {self.block_size} tokens{left})"
        )

    # -- tables --------------------------------------------------------------------------------------------------

    def frame(self) -> pandas.DataFrame:
        """One row for each policy and capacity.

        `system_prompt_hits`, `session_hits` and `cross_user_hits` are the hit blocks by cause: blocks that at least
        three sessions have used so far, this one included; of the others, those that this session used before; and
        those that only another session used. A request without a session is one of its own. `jain_index` is that of
        the tenants' token hit rates. `idle_p50` is the median of the seconds between a block's last use and its
        eviction, within a factor of two. `too_long` counts requests longer than the cache, `excluded` requests of the
        trace that could not be read.
        """
        return tables.pandas().DataFrame(self.rows)

    def tenants(self) -> pandas.DataFrame:
        """One row for each policy, capacity and tenant."""
        if not self._tenants:
            raise ValueError(f"{self.name} names no tenants")
        return tables.pandas().DataFrame(self._tenants)

    def reuse(self) -> pandas.DataFrame:
        """How many blocks were used again, by distance (different blocks used since, itself included) and by place in
        the prompt (in blocks): from `distance` and `depth` to just below twice as much."""
        far, deep = self.distances.heat.nonzero()
        columns = {"distance": 2**far, "depth": 2**deep - 1, "blocks": self.distances.heat[far, deep]}
        return tables.pandas().DataFrame(columns)

    def idle(self) -> pandas.DataFrame:
        """Evicted blocks by the seconds since their last use: from `seconds` to just below twice as much; 0 is less
        than a millisecond."""
        lines = [
            {"policy": row["policy"], "capacity": row["capacity"], "seconds": _seconds(b), "evicted": int(counts[b])}
            for row, counts in zip(self.rows, self._idle, strict=True)
            for b in counts.nonzero()[0].tolist()
        ]
        return tables.pandas().DataFrame(lines, columns=["policy", "capacity", "seconds", "evicted"])

    def curve(self) -> pandas.DataFrame:
        """Block hit rate of LRU caches of every size, thinned to some hundred sizes. It ends where more blocks hit
        nothing more."""
        sizes, rates = self._curve()
        return tables.pandas().DataFrame({"capacity": sizes, "block_hit_rate": rates})

    def _curve(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        hits = self.distances.hits()
        total = int(self.distances.distances.sum()) + self.distances.cold
        if len(hits) < 2:
            return np.array([1]), np.zeros(1)
        sizes = np.unique(np.geomspace(1, len(hits) - 1, KEPT_POINTS).round().astype(np.int64))
        return sizes, hits[sizes] / total

    def text(self, column: str = "block_hit_rate") -> str:
        """One column as lines of text: a line for each policy, a column for each capacity."""
        self._check_column(column)
        width = max(len(column), *(len(policy) for policy in self.policies))
        lines = [" ".join([f"{column:<{width}}", *(f"{size:>9,}" for size in self.capacities)])]
        for policy in self.policies:
            values = [row[column] for row in self.rows if row["policy"] == policy]
            lines.append(" ".join([f"{policy:<{width}}", *(f"{value:>9.4f}" for value in values)]))
        return "\n".join(lines)

    # -- pictures ------------------------------------------------------------------------------------------------

    def plot(self, y: str = "block_hit_rate") -> Figure:
        """A plotly figure of a column over the capacity, a line for each policy. Unbounded caches are dotted lines."""
        self._check_column(y)
        go, figure = _figure(f"{self.name}", "capacity [blocks]", y)
        for i, policy in enumerate(self.policies):
            color = style.HUES[i % len(style.HUES)]
            points = [(row["capacity"], row[y]) for row in self.rows if row["policy"] == policy]
            xs, ys = zip(*([p for p in points if p[0] != math.inf] or [(None, None)]), strict=True)
            figure.add_trace(go.Scatter(x=xs, y=ys, name=policy, line_color=color, mode="lines+markers"))
            for _, unbounded in (p for p in points if p[0] == math.inf):
                figure.add_hline(y=unbounded, line_dash="dot", line_color=color, line_width=1)
        return figure

    def miss_ratio(self) -> Figure:
        """A plotly figure of the share of blocks that miss: LRU at every size as a line, the study's caches as dots."""
        go, figure = _figure(self.name, "capacity [blocks]", "block miss ratio")
        sizes, rates = self._curve()
        figure.add_trace(go.Scatter(x=sizes, y=1 - rates, name="lru, all sizes", line_color=style.HUES[0]))
        for i, policy in enumerate(self.policies):
            found = [row for row in self.rows if row["policy"] == policy and row["capacity"] != math.inf]
            figure.add_trace(
                go.Scatter(
                    x=[row["capacity"] for row in found],
                    y=[1 - row["block_hit_rate"] for row in found],
                    name=policy,
                    mode="markers",
                    marker_color=style.HUES[i % len(style.HUES)],
                )
            )
        return figure

    def heatmap(self) -> Figure:
        """A plotly figure of reuse: how many different blocks lie between two uses of a block, over the block's place
        in its prompt. Darker is more blocks. A cache of that many blocks hits everything to the left."""
        go, figure = _figure(self.name, "reuse distance [blocks]", "depth in the prompt [blocks]")
        far, deep = (np.flatnonzero(self.distances.heat.any(axis)) for axis in (1, 0))
        if len(far):
            counts = self.distances.heat[: far[-1] + 1, : deep[-1] + 1].T
            shown = np.where(counts > 0, counts, 0)
            figure.add_trace(
                go.Heatmap(
                    z=np.log10(np.maximum(shown, 0.5)),
                    x=[f"{2**i:,}" for i in range(far[-1] + 1)],
                    y=[f"{2**i - 1:,}" for i in range(deep[-1] + 1)],
                    text=shown,
                    hovertemplate="distance from %{x}, depth from %{y}: %{text:,} blocks<extra></extra>",
                    colorscale=[[0, charts.CLEAR], [1, style.HUES[0]]],
                    showscale=False,
                )
            )
        figure.update_xaxes(type="category")
        figure.update_yaxes(type="category")
        return figure

    def _check_column(self, name: str) -> None:
        if name not in self.rows[0] or isinstance(self.rows[0][name], str):
            numbers = [key for key, value in self.rows[0].items() if not isinstance(value, str)]
            raise ValueError(f"there is no column of numbers {name!r}; {closest(name, numbers)}")

    def _repr_html_(self) -> str:
        parts = [style.title(repr(self))]
        if self.excluded:
            parts.append(style.note(str(self.excluded), bad=True))
        if long := max(row["too_long"] for row in self.rows):
            parts.append(style.note(f"up to {long:,} requests are longer than a cache", bad=True))
        curves, keys = [], []
        for i, policy in enumerate(self.policies):
            color = style.HUES[i % len(style.HUES)]
            points = [r for r in self.rows if r["policy"] == policy and r["capacity"] != math.inf]
            keys.append(style.key(policy, color))
            curves.append(
                charts.Curve(
                    policy, color, [0, *(r["capacity"] for r in points)], [0, *(r["block_hit_rate"] for r in points)]
                )
            )
        if len(self.capacities) > 1:
            parts += [style.legend(keys), charts.curves(curves, "capacity [blocks]", "block hit rate")]
        names = [name for name in RATES if any(math.isfinite(row.get(name, math.nan)) for row in self.rows)]
        lines = [
            [row["policy"], f"{row['capacity']:,}", *(charts.show(row[name]) for name in names)] for row in self.rows
        ]
        parts.append(style.text_table(["policy", "capacity", *(name.replace("_", " ") for name in names)], lines))
        return style.page(*parts)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError("figures need plotly: pip install 'labkit[lab]'") from error
    figure = go.Figure()
    figure.update_layout(**charts.LAYOUT, height=380, margin={"l": 60, "r": 20, "t": 40, "b": 50})
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, showlegend=True)
    figure.update_xaxes(type="log")
    return go, figure


def _seconds(b: int) -> float:
    """Where a bin of idle times begins."""
    return 0.0 if b == 0 else 2.0 ** (b - 11)


def _median_idle(counts: NDArray[np.int64]) -> float:
    total = int(counts.sum())
    if not total:
        return math.nan
    b = int((np.cumsum(counts) * 2 >= total).argmax())
    return _seconds(b) * math.sqrt(2)
