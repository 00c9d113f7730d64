"""The result of an experiment: a table, figures and a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import labkit.study.tables as tables
from labkit.core.options import check_names, closest
from labkit.study.history import CURVES
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

VERSION = 1  # of the file that `save` writes
SHOWN = ("hit_rate", "output_tokens_per_s", "ttft_p90", "preemptions")  # shown in a picture if they differ
MOST_BARS = 30
UNITS = {"makespan": "s", "ttft": "s", "tpot": "s", "e2e": "s"}


@dataclass(frozen=True)
class Run:
    """One setting, served once. `setting` holds the labels of its values."""

    setting: dict[str, Any]
    seed: int
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    requests: dict[str, list[Any]] = field(default_factory=dict)  # columns, an entry a request
    curves: dict[str, list[float | None]] = field(default_factory=dict)  # columns, an entry a moment

    @property
    def label(self) -> str:
        return ", ".join(str(value) for value in self.setting.values()) or "the setting"


class Study:
    """The runs of an experiment, in the order in which they were served.

    `frame()` has one row per run, `requests()` one per request, `curves()` one per moment; `plot(x, y, by=)` is a
    figure.

    >>> import labkit as lk
    >>> lk.Experiment(lk.workloads.poisson(20), {"rows": [2, 8]}).run()
    Study(2 settings of Poisson, 4/s: 20 requests on SimRunner)
    """

    def __init__(
        self, runs: Iterable[Run], *, names: Sequence[str], workload: str, runner: str, num_planned: int
    ) -> None:
        self.runs = tuple(runs)
        self.names, self.workload, self.runner, self.num_planned = tuple(names), workload, runner, num_planned

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def failed(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.error is not None)

    @property
    def metrics(self) -> list[str]:
        """The names of the measured columns."""
        return list(dict.fromkeys(name for run in self.runs for name in run.metrics))

    def __repr__(self) -> str:
        seeds = len({run.seed for run in self.runs})
        settings = len(self._by_label())
        what = f"{settings} setting{'s' * (settings != 1)}" + (f" x {seeds} seeds" if seeds > 1 else "")
        failed = f"; {len(self.failed)} failed" if self.failed else ""
        left = self.num_planned - len(self.runs)
        stopped = f"; stopped with {left} of {self.num_planned} runs to go" if left else ""
        return f"Study({what} of {self.workload} on {self.runner}{failed}{stopped})"

    # -- tables --------------------------------------------------------------------------------------------------

    def frame(self) -> pandas.DataFrame:
        """One row per run: the setting, its seed, the measurements (times in seconds), and the error if it failed."""
        pd = tables.pandas()
        rows = [{**run.setting, "seed": run.seed, **run.metrics, "error": run.error} for run in self.runs]
        return pd.DataFrame(rows, columns=[*self.names, "seed", *self.metrics, "error"])

    def requests(self) -> pandas.DataFrame:
        """One row per request and run."""
        return self._long("requests")

    def curves(self) -> pandas.DataFrame:
        """One row per moment and run: `now` in seconds, and figures over the last tenth of the tokens."""
        return self._long("curves")

    def _long(self, which: str) -> pandas.DataFrame:
        pd = tables.pandas()
        frames = []
        for run in self.runs:
            columns = getattr(run, which)
            if columns:
                frames.append(pd.DataFrame({**run.setting, "seed": run.seed, **columns}))
        if not frames:
            raise ValueError(f"{self!r} has no {which}: every run failed")
        return pd.concat(frames, ignore_index=True)

    # -- pictures ------------------------------------------------------------------------------------------------

    def plot(self, x: str, y: str = "output_tokens_per_s", *, by: str | Sequence[str] | None = None) -> Figure:
        """A plotly figure of a measurement over a setting, with one colour per value of `by` (default: all other
        settings that vary). x="time" draws the curves of `curves()`. With several seeds it shows the mean and the
        extremes."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("plot() needs plotly: pip install 'labkit[lab]'") from error
        by = [by] if isinstance(by, str) else [name for name in self.names if name != x] if by is None else list(by)
        check_names("Study.plot(by=)", by, self.names)
        figure = go.Figure()
        figure.update_layout(**charts.LAYOUT, height=380, margin={"l": 60, "r": 20, "t": 40, "b": 50})
        figure.update_layout(
            title=self.workload, xaxis_title=x, yaxis_title=_with_unit(y), legend_title=", ".join(by), showlegend=True
        )
        if x == "time":
            if y not in CURVES:
                raise ValueError(f"there is no curve {y!r}; {closest(y, CURVES)}")
            figure.update_xaxes(title="seconds")
            seen: dict[str, str] = {}  # label -> its colour; seeds of one setting share it
            for run in self.runs:
                name = _label(run, by)
                if run.curves:
                    first, color = name not in seen, seen.setdefault(name, _color(len(seen)))
                    figure.add_trace(
                        go.Scatter(
                            x=run.curves["now"],
                            y=run.curves[y],
                            name=name,
                            line_color=color,
                            legendgroup=name,
                            showlegend=first,
                        )
                    )
            return figure
        if x not in self.names:
            raise ValueError(f"x must be a setting of the grid or 'time', got {x!r}; {closest(x, self.names)}")
        if y not in self.metrics:
            raise ValueError(f"y must be a measured column, got {y!r}; {closest(y, self.metrics)}")
        if hidden := [name for name in self.names if name not in (x, *by) and len(set(self._values(name))) > 1]:
            raise ValueError(f"{', '.join(hidden)} varies as well: add it to by=")
        groups: dict[str, dict[Any, list[float]]] = {}
        for run in self.runs:
            if run.error is None and y in run.metrics:
                groups.setdefault(_label(run, by), {}).setdefault(run.setting[x], []).append(run.metrics[y])
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self._values(x))
        for i, (name, points) in enumerate(groups.items()):
            figure.add_trace(_trace(go, name, points, _color(i), numbers))
        return figure

    def _values(self, name: str) -> list[Any]:
        return list(dict.fromkeys(run.setting[name] for run in self.runs))

    def _by_label(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.label, []).append(run)
        return found

    def _repr_html_(self) -> str:
        parts = [style.title(repr(self))]
        groups = self._by_label()
        if self.names:
            parts.append(style.note("bars are labelled: " + ", ".join(self.names)))
        parts += [style.note(f"{run.label}: {run.error}", bad=True) for run in self.failed]
        parts.append(
            style.side_by_side(
                *(
                    style.title(_with_unit(name)) + charts.bars(self._bars(name, groups))
                    for name in self._worth_showing()
                )
            )
        )
        if len(groups) > MOST_BARS:
            parts.append(style.note(f"the first {MOST_BARS} of {len(groups)} settings; frame() has them all"))
        head = [*self.names, "seed", *self.metrics]
        rows = [
            [*(str(value) for value in run.setting.values()), str(run.seed)]
            + [charts.show(run.metrics[name]) if name in run.metrics else "" for name in self.metrics]
            for run in self.runs
        ]
        parts.append(f"<details><summary>all numbers</summary>{style.text_table(head, rows)}</details>")
        return style.page(*parts)

    def _worth_showing(self) -> list[str]:
        """Metrics that the user added, and of the usual ones those that differ; the first if none does."""
        own = [name for name in self.metrics if name not in USUAL]
        usual = [name for name in SHOWN if len({run.metrics[name] for run in self.runs if name in run.metrics}) > 1]
        return own + usual or [name for name in SHOWN[1:2] if name in self.metrics]

    def _bars(self, name: str, groups: dict[str, list[Run]]) -> list[charts.Bar]:
        colors = self._values(self.names[-1]) if self.names else [None]
        found = []
        for label, runs in list(groups.items())[:MOST_BARS]:
            values = [value for run in runs if math.isfinite(value := run.metrics.get(name, math.nan))]
            color = _color(colors.index(runs[0].setting[self.names[-1]]) if self.names else 0)
            if values:
                found.append(charts.Bar(label, sum(values) / len(values), min(values), max(values), color))
            else:
                found.append(charts.Bar(label, math.nan, color=color))
        return found

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Save as JSON. Functions and objects in the grid are saved by name."""
        found = {
            "labkit_study": VERSION, "names": self.names, "workload": self.workload, "runner": self.runner,
            "num_planned": self.num_planned, "runs": [asdict(run) for run in self.runs],
        }  # fmt: skip
        Path(path).write_text(json.dumps(_plain(found), allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Study:
        """Load what `save` wrote."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(found, dict) or found.get("labkit_study") != VERSION:
            raise ValueError(f"{path} is not a study saved by Study.save, version {VERSION}")
        try:
            runs = [_run(run) for run in found["runs"]]
            named = {name: found[name] for name in ("names", "workload", "runner", "num_planned")}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is a study with missing data: {error}") from None
        return cls(runs, **named)


USUAL = frozenset(
    ("requests", "rejected", "makespan", "output_tokens_per_s", "steps", "hit_rate", "evictions", "preemptions",
     "waste", "used_blocks",
     *(f"{name}_{which}" for name in ("ttft", "tpot", "e2e") for which in ("p50", "p90", "p99")))
)  # fmt: skip


def _run(saved: dict[str, Any]) -> Run:
    metrics = {name: math.nan if value is None else value for name, value in saved["metrics"].items()}
    return Run(**{**saved, "metrics": metrics})


def _with_unit(name: str) -> str:
    unit = UNITS.get(name.split("_")[0])
    return f"{name} [{unit}]" if unit else name


def _label(run: Run, by: Sequence[str]) -> str:
    return ", ".join(str(run.setting[name]) for name in by)


def _color(i: int) -> str:
    return style.HUES[i % len(style.HUES)]


def _trace(go: Any, name: str, points: dict[Any, list[float]], color: str, numbers: bool) -> Any:
    xs = sorted(points) if numbers else list(points)
    means = [sum(points[x]) / len(points[x]) for x in xs]
    reach = None
    if any(len(points[x]) > 1 for x in xs):
        reach = {
            "array": [max(points[x]) - mean for x, mean in zip(xs, means, strict=True)],
            "arrayminus": [mean - min(points[x]) for x, mean in zip(xs, means, strict=True)],
            "color": charts.GREY,
        }
    if numbers:
        return go.Scatter(x=xs, y=means, error_y=reach, name=name, line_color=color, mode="lines+markers")
    return go.Bar(x=[str(x) for x in xs], y=means, error_y=reach, name=name, marker_color=color)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; nan and infinity become None."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
