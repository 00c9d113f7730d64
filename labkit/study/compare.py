"""Named settings on the same draws of a workload, against the first of them: `lk.compare`. Differences are paired by
draw and have intervals; one whose interval holds zero is called noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import labkit.study.tables as tables
from labkit.bench.workload import Workload
from labkit.core.options import check_names, real, whole
from labkit.study.experiment import Experiment
from labkit.study.statistics import interval
from labkit.study.study import Run, Study
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

Columns = Mapping[str, Sequence[Any]]
SHOWN = ("output_tokens_per_s", "ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90", "e2e_p50", "e2e_p90", "hit_rate",
         "preemptions")  # fmt: skip
MORE_IS_BETTER = frozenset(("output_tokens_per_s", "hit_rate"))
LESS_IS_BETTER = frozenset(name for name in SHOWN if name not in MORE_IS_BETTER) | {"makespan", "ttft_p99", "e2e_p99"}


def compare(
    settings: Mapping[str, Any],
    workload: Workload,
    *,
    repeat: int = 5,
    metrics: Mapping[str, Callable[[Columns], float]] | None = None,
    confidence: float = 0.95,
    model: str | None = None,
    runner: Any = None,
    **shared: Any,
) -> Comparison:
    """Serve `repeat` draws of a workload under each of the `settings`, and compare all with the first.

    A setting is a dict of options as in `Experiment` (`{"order": mine, "victim": mine.victim}`), or only an order (a
    name or a policy), or None for the defaults. `shared` are options of all. The same draw is served under every
    setting, and the differences are those between two runs of one draw; a policy object is copied for each run. It is a
    simulation unless you give a `model`; models are served in turns, the order of every second draw reversed, so that a
    machine that slows down is not taken for a policy. `metrics` adds yours: functions of the requests' columns (`ttft`,
    `e2e`, `num_output`, .. and the names in the requests' `extra`) that give a number.

    >>> import labkit as lk
    >>> mix = lk.workloads.bursty(60, rate=30)
    >>> lk.compare({"fcfs": None, "sjf": "sjf"}, mix, repeat=3, rows=4).verdicts("ttft_p50")
    {'sjf': 'better'}
    """
    if not isinstance(settings, Mapping) or len(settings) < 2:
        raise TypeError(f'compare takes at least two settings, {{"fcfs": None, "mine": mine}}, got {settings!r}')
    own = dict(metrics or {})
    for name, function in own.items():
        if not callable(function):
            raise TypeError(f"metrics[{name!r}] must be a function of the requests' columns, got {function!r}")
    real("confidence", confidence, least=0.0, most=0.9999, open_left=True)
    repeat = whole("repeat", repeat, least=1)
    experiments = {}
    for name, one in settings.items():
        options = {**shared, **_options(str(name), one)}
        experiments[str(name)] = Experiment(workload, repeats=repeat, model=model, runner=runner, **options)
    runs: dict[str, list[Run]] = {name: [] for name in experiments}
    for seed in range(repeat):
        names = list(experiments) if seed % 2 == 0 or model is None else list(experiments)[::-1]
        for name in names:
            runs[name].append(_measured(experiments[name].once({"setting": name}, seed), own))
    if failed := [run for some in runs.values() for run in some if run.error is not None]:
        warnings.warn(f"{len(failed)} runs failed, {failed[0].label}: {failed[0].error}", stacklevel=2)
    first = next(iter(experiments.values()))
    study = Study(
        [run for some in runs.values() for run in some], names=["setting"], workload=first.workload_name,
        runner=first.runner_name, num_planned=repeat * len(runs),
    )  # fmt: skip
    return Comparison(study, list(runs), list(own), confidence)


def _options(name: str, setting: Any) -> dict[str, Any]:
    if setting is None:
        return {}
    if isinstance(setting, Mapping):
        return dict(setting)
    if isinstance(setting, str) or callable(setting):
        return {"order": setting}
    raise TypeError(f"setting {name!r} is a dict of options, an order or None, got {setting!r}")


def _measured(run: Run, own: Mapping[str, Callable[[Columns], float]]) -> Run:
    """The run with the user's metrics; an error of one becomes the run's."""
    if run.error is not None:
        return run
    try:
        found = {name: float(function(run.requests)) for name, function in own.items()}
    except Exception as error:  # a user's function may raise anything, and the other runs count
        return replace(run, error=f"metric: {type(error).__name__}: {error}", metrics={})
    return replace(run, metrics={**run.metrics, **found})


@dataclass(frozen=True)
class Difference:
    """A setting against the first, in one metric: means over the draws, and the interval of the mean paired difference.
    `low` and `high` are None with one draw. `verdict` is "better", "worse" (or "higher", "lower" where neither is
    known), "noise", "same", or "one run"."""

    metric: str
    setting: str
    base: float
    mean: float
    low: float | None
    high: float | None
    num: int
    verdict: str

    @property
    def change(self) -> float:
        return self.mean - self.base

    @property
    def above(self) -> float:
        """From the change to the upper end of its interval."""
        return 0.0 if self.high is None else self.high - self.change

    @property
    def below(self) -> float:
        return 0.0 if self.low is None else self.change - self.low

    def percent(self, value: float) -> float:
        return 100 * value / abs(self.base) if self.base else math.nan

    def __str__(self) -> str:
        if self.verdict in ("same", "none"):
            return self.verdict
        if self.low is None or self.high is None:
            return f"{self.percent(self.change):+.1f}%, {self.verdict}"
        return (
            f"{self.percent(self.change):+.1f}% [{self.percent(self.low):+.1f}, {self.percent(self.high):+.1f}] "
            f"{self.verdict}"
        )


class Comparison:
    """The result of `compare`: prints as a table. `frame()` has a row for each metric and setting, `plot()` is a figure
    of the differences, `study` has the runs.

    Every interval holds the true difference with probability `confidence` for itself: of twenty comparisons of equals,
    one is called a difference at 0.95.
    """

    def __init__(self, study: Study, settings: Sequence[str], own: Sequence[str], confidence: float) -> None:
        self.study, self.settings, self.confidence = study, tuple(settings), confidence
        self.own = tuple(own)
        self._values = {
            name: {run.seed: run.metrics for run in study.runs if run.setting["setting"] == name and run.error is None}
            for name in settings
        }
        self.differences = tuple(
            self._difference(metric, name) for metric in study.metrics for name in self.settings[1:]
        )

    def _difference(self, metric: str, name: str) -> Difference:
        base, other = self._values[self.settings[0]], self._values[name]
        pairs = [(base[i][metric], other[i][metric]) for i in base if i in other and metric in other[i]]
        pairs = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        if not pairs:
            return Difference(metric, name, math.nan, math.nan, None, None, 0, "none")
        changes = [b - a for a, b in pairs]
        mean_a, mean_b = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        low, high = interval(changes, self.confidence) if len(pairs) > 1 else (None, None)
        return Difference(
            metric, name, mean_a, mean_b, low, high, len(pairs), _verdict(metric, changes, low, high)
        )  # fmt: skip

    @property
    def shown(self) -> list[str]:
        """The user's metrics, and of the usual ones those in which settings differ."""
        differ = {one.metric for one in self.differences if one.verdict not in ("same", "none")}
        return [*self.own, *(name for name in SHOWN if name in differ)]

    def verdicts(self, metric: str) -> dict[str, str]:
        """What is said of each setting but the first."""
        check_names("Comparison.verdicts", [metric], self.study.metrics)
        return {one.setting: one.verdict for one in self.differences if one.metric == metric}

    def frame(self) -> pandas.DataFrame:
        """One row per metric and setting, in the metric's unit (times in seconds)."""
        rows = [
            {"metric": one.metric, "setting": one.setting, "base": one.base, "mean": one.mean, "change": one.change,
             "low": one.low, "high": one.high, "draws": one.num, "verdict": one.verdict}
            for one in self.differences
        ]  # fmt: skip
        return tables.pandas().DataFrame(rows)

    def _rows(self) -> list[list[str]]:
        by = {(one.metric, one.setting): one for one in self.differences}
        rows = []
        for metric in self.shown:
            first = by[metric, self.settings[1]]
            cells = [f"{charts.show(by[metric, name].mean)} ({by[metric, name]})" for name in self.settings[1:]]
            rows.append([metric, charts.show(first.base), *cells])
        return rows

    def _head(self) -> str:
        draws = len({run.seed for run in self.study.runs})
        how = (
            f"{self.confidence:.0%} intervals of {draws} paired differences" if draws > 1 else "one draw, no intervals"
        )
        where = f"{self.study.workload} on {self.study.runner}"
        return f"Comparison({where}: against {self.settings[0]!r}, {how})"

    def __repr__(self) -> str:
        rows = [["", *self.settings], *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        failed = [f"  {run.label} failed: {run.error}" for run in self.study.failed]
        return "\n".join([self._head(), *(f"  {line}" for line in lines), *failed])

    def _repr_html_(self) -> str:
        failed = [style.note(f"{run.label}: {run.error}", bad=True) for run in self.study.failed]
        return style.page(style.title(self._head()), style.text_table(["", *self.settings], self._rows()), *failed)

    def plot(self, metrics: Sequence[str] | None = None) -> Figure:
        """A plotly figure: the change of each metric in percent of the first setting, with its interval; noise is
        hollow."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("plot() needs plotly: pip install 'labkit[lab]'") from error
        chosen = self.shown if metrics is None else list(metrics)
        check_names("Comparison.plot", chosen, self.study.metrics)
        figure = go.Figure()
        figure.update_layout(**charts.LAYOUT, height=120 + 34 * len(chosen) * max(1, len(self.settings) - 1))
        for i, name in enumerate(self.settings[1:]):
            ones = [one for metric in chosen for one in self.differences if (one.metric, one.setting) == (metric, name)]
            ones = [one for one in ones if one.num and one.base]
            color = style.HUES[i % len(style.HUES)]
            figure.add_trace(
                go.Scatter(
                    x=[one.percent(one.change) for one in ones],
                    y=[f"{one.metric} · {name}" for one in ones],
                    error_x={
                        "array": [one.percent(one.above) for one in ones],
                        "arrayminus": [one.percent(one.below) for one in ones],
                        "symmetric": False,
                    },
                    mode="markers",
                    name=name,
                    marker={
                        "color": color,
                        "size": 10,
                        "symbol": ["circle-open" if one.verdict in ("noise", "same") else "circle" for one in ones],
                    },
                    text=[one.verdict for one in ones],
                    hovertemplate="%{x:+.1f}%: %{text}<extra></extra>",
                )
            )
        figure.add_vline(x=0, line_color=charts.GREY, line_dash="dot")
        figure.update_xaxes(title=f"change against {self.settings[0]!r} [%]")
        figure.update_yaxes(autorange="reversed", title="")
        return figure


def _verdict(metric: str, changes: Sequence[float], low: float | None, high: float | None) -> str:
    if not any(changes):
        return "same"
    if low is None or high is None:
        return "one run"
    if low <= 0 <= high:
        return "noise"
    if metric in MORE_IS_BETTER or metric in LESS_IS_BETTER:
        return "better" if (low > 0) == (metric in MORE_IS_BETTER) else "worse"
    return "higher" if low > 0 else "lower"
