"""What to buy: how many of which machine, in groups of which size, meet an objective at a rate, and why others do not.

Each row simulates one replica that gets its share of the requests, as under a random router; a better router needs no
more replicas. Step times are those of `AnalyticCost`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import labkit.study.tables as tables
from labkit.bench.workload import Workload, arriving
from labkit.core.options import check_names, real, whole
from labkit.study.analytic import AnalyticCost
from labkit.study.clusters.replica import OPTIONS
from labkit.study.clusters.results import check_slo
from labkit.study.machines import Efficiency, Machine
from labkit.study.parallel import each
from labkit.study.shapes import ModelShape
from labkit.study.simulation import simulate
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

MOST_REPLICAS = 1024
BUDGET = 8192
LONELY = 1e5  # so many replicas that every request is alone
FEW = 32  # requests that tell whether one alone is fast enough
FIGURES = ("ttft_p90", "tpot_p90", "e2e_p90", "batch", "output_tokens_per_s", "hit_rate", "preemptions")


@dataclass(frozen=True)
class Size:
    """One candidate. With a `reason` it does not meet the objective; the figures are then those of its best try."""

    machine: str
    tp: int
    rows: int
    kv_tokens: int | None = None  # that fit beside the weights
    replicas: int | None = None
    reason: str | None = None
    attained: float | None = None  # the share of requests that meet the objective
    ttft_p90: float | None = None  # seconds
    tpot_p90: float | None = None
    e2e_p90: float | None = None
    batch: float | None = None  # mean rows of a step
    output_tokens_per_s: float | None = None  # of one replica
    hit_rate: float | None = None
    preemptions: float | None = None

    @property
    def gpus(self) -> int | None:
        return None if self.replicas is None else self.replicas * self.tp

    @property
    def label(self) -> str:
        return f"{self.machine}, tp={self.tp}, rows={self.rows}"

    def margins(self, slo: Mapping[str, float]) -> dict[str, float | None]:
        """How far the 90th percentile stays below each limit, as a share of it."""
        found = {}
        for name, most in slo.items():
            value = getattr(self, f"{name}_p90")
            found[f"{name}_margin"] = None if value is None or self.replicas is None else 1 - value / most
        return found


class Sizing:
    """The candidates, those that need the fewest GPUs first, then those that do not meet the objective."""

    def __init__(self, sizes: Sequence[Size], *, model: str, workload: str, rate: float, slo: dict[str, float]) -> None:
        self.sizes = tuple(sorted(sizes, key=lambda size: (size.gpus is None, size.gpus or 0)))
        self.model, self.workload, self.rate, self.slo = model, workload, rate, slo

    @property
    def feasible(self) -> tuple[Size, ...]:
        return tuple(size for size in self.sizes if size.replicas is not None)

    @property
    def best(self) -> Size | None:
        """The candidate with the fewest GPUs, if any meets the objective."""
        return self.sizes[0] if self.feasible else None

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        if (best := self.best) is None:
            found = "none of them meets the objective"
        else:
            found = f"fewest GPUs: {best.gpus} ({best.replicas} x {best.label})"
        return f"Sizing({len(self)} candidates for {self.model} at {self.rate:g}/s: {found})"

    def frame(self) -> pandas.DataFrame:
        """One row per candidate: machine, tp, rows, replicas, gpus, margins below the objective, figures (seconds), and
        the reason if it does not meet the objective."""
        pd = tables.pandas()
        rows = []
        for size in self.sizes:
            row = asdict(size)
            first = {name: row.pop(name) for name in ("machine", "tp", "rows", "replicas")}
            reason = row.pop("reason")
            rows.append({**first, "gpus": size.gpus, **size.margins(self.slo), **row, "reason": reason})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """A plotly figure: GPUs of each candidate that meets the objective, with its margins."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("plot() needs plotly: pip install 'labkit[lab]'") from error
        figure = go.Figure()
        figure.update_layout(**charts.LAYOUT, height=120 + 26 * len(self.sizes), margin={"l": 160, "r": 20, "t": 40})
        figure.update_layout(title=self._title(), xaxis_title="GPUs", yaxis={"autorange": "reversed"}, showlegend=False)
        names = list(dict.fromkeys(size.machine for size in self.sizes))
        figure.add_trace(
            go.Bar(
                orientation="h",
                y=[size.label for size in self.sizes],
                x=[size.gpus or 0 for size in self.sizes],
                marker_color=[style.HUES[names.index(size.machine) % len(style.HUES)] for size in self.sizes],
                text=[size.reason or self._told(size) for size in self.sizes],
                textposition="auto",
            )
        )
        return figure

    def _title(self) -> str:
        limits = ", ".join(f"{name} <= {style.seconds(most)}" for name, most in self.slo.items())
        return f"{self.model}, {self.workload} at {self.rate:g}/s, {limits}"

    def _told(self, size: Size) -> str:
        margins = size.margins(self.slo).items()
        return ", ".join(f"{name.split('_')[0]} {value:.0%} below" for name, value in margins if value is not None)

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(size.machine for size in self.sizes))
        bars = [
            charts.Bar(size.label, size.gpus or 0, color=style.HUES[names.index(size.machine) % len(style.HUES)])
            for size in self.feasible
        ]
        head = ["", "replicas", "GPUs", *(f"{name} p90" for name in self.slo), "batch", "KV tokens", "hit rate"]
        rows = [
            [
                size.label, str(size.replicas), str(size.gpus),
                *(style.seconds(getattr(size, f"{name}_p90") or 0.0) for name in self.slo),
                charts.show(size.batch or 0.0), f"{size.kv_tokens or 0:,}", f"{size.hit_rate or 0.0:.0%}",
            ]
            for size in self.feasible
        ]  # fmt: skip
        parts = [style.title(repr(self)), style.note(self._title())]
        if bars:
            parts += [style.title("GPUs"), charts.bars(bars), style.text_table(head, rows)]
        parts += [style.note(f"{size.label}: {size.reason}", bad=True) for size in self.sizes if size.reason]
        return style.page(*parts)


def sizing(
    workload: Workload,
    *,
    model: Any,
    rate: float,
    slo: Mapping[str, float] | None = None,
    machines: Sequence[Any] = ("H100",),
    tp: Sequence[int] = (1, 2, 4, 8),
    rows: Sequence[int] = (256,),
    attain: float = 0.9,
    efficiency: Efficiency | None = None,
    utilization: float = 0.9,
    most: int = MOST_REPLICAS,
    workers: int | None = None,
    ray: bool | str = False,
    **options: Any,
) -> Sizing:
    """Which machines, tensor parallelism and rows meet the objective `slo` for a share `attain` of the requests, at
    `rate` requests a second? One row for each combination: the fewest replicas that do, or the reason why none do.

    `model` and `machines` are names or what `ModelShape.of` and `Machine.of` take. The workload's arrivals are
    stretched to the rate; without arrivals they are drawn at random. Options are those of `BlockManager` and
    `Scheduler`. Give it a few hundred requests at least: a short workload ends before a queue has grown.

    >>> import labkit as lk
    >>> mix = lk.workloads.poisson(100, prompt=(200, 800), output=(50, 150))
    >>> found = lk.study.sizing(mix, model="llama-3.1-8b", rate=20, machines=["H100", "L4"], tp=[1])
    >>> found.best.label, found.sizes[-1].machine
    ('H100, tp=1, rows=256', 'L4')
    """
    if not isinstance(workload, Workload):
        raise TypeError(f"workload must be a Workload, such as labkit.workloads.chats(), got {workload!r}")
    check_names("sizing", options, [name for name in OPTIONS if name not in ("rows", "max_num_seqs", "num_blocks")])
    objective = check_slo(slo)
    shape = ModelShape.of(model)
    candidates = [
        (Machine.of(machine), whole("tp", split, least=1), whole("rows", width, least=1))
        for machine, split, width in itertools.product(machines, tp, rows)
    ]
    if not candidates:
        raise ValueError("machines, tp and rows need one value each at least")
    asked = _Asked(
        workload=workload,
        shape=shape,
        rate=real("rate", rate, least=0.0, open_left=True),
        slo=objective,
        attain=real("attain", attain, least=0.0, most=1.0, open_left=True),
        efficiency=efficiency,
        utilization=real("utilization", utilization, least=0.0, most=1.0, open_left=True),
        most=whole("most", most, least=1),
        options=options,
    )

    def find(candidate: tuple[Machine, int, int]) -> Size:
        return _size(asked, *candidate)

    found = dict(each(find, candidates, workers=workers, ray=ray))
    sizes = [found[i] for i in range(len(candidates))]
    return Sizing(sizes, model=shape.name, workload=workload.name, rate=asked.rate, slo=objective)


@dataclass(frozen=True)
class _Asked:
    workload: Workload
    shape: ModelShape
    rate: float
    slo: dict[str, float]
    attain: float
    efficiency: Efficiency | None
    utilization: float
    most: int
    options: dict[str, Any]

    def few(self) -> _Asked:
        """The same with the first few requests, which no later one continues."""
        return replace(self, workload=Workload(self.workload.name, self.workload.asks[:FEW]))

    def share(self, num_replicas: float) -> Workload:
        """The workload as one of so many replicas gets it."""
        arrivals = [ask.arrival for ask in self.workload.asks if ask.after is None]
        span = max(arrivals) - min(arrivals)
        rate = self.rate / num_replicas
        if not span:
            return arriving(self.workload, rate)
        stretch = (len(arrivals) - 1) / span / rate  # the same gaps, longer or shorter
        asks = tuple(
            replace(ask, arrival=ask.arrival * stretch) if ask.after is None else ask for ask in self.workload.asks
        )
        return Workload(self.workload.name, asks)


def _size(asked: _Asked, machine: Machine, tp: int, rows: int) -> Size:
    """The fewest replicas of this candidate: doubled until they are enough, then halved between."""
    size = Size(machine.name, tp, rows)
    budget = asked.options.get("budget", asked.options.get("max_num_batched_tokens", BUDGET))
    block_size = asked.options.get("block_size", 16)
    try:
        cost = AnalyticCost.of(asked.shape, machine, tp=tp, efficiency=asked.efficiency, block_size=block_size)
        num_blocks = cost.kv_blocks(utilization=asked.utilization, max_num_batched_tokens=budget)
    except ValueError as error:
        return replace(size, reason=str(error))
    size = replace(size, kv_tokens=num_blocks * block_size)
    longest, most = asked.workload.longest(), asked.shape.max_model_len
    if most is not None and longest > most:
        return replace(size, reason=f"the longest request has {longest} tokens, {asked.shape.name} at most {most}")
    if longest > num_blocks * block_size:
        return replace(
            size, reason=f"the longest request has {longest} tokens, and keys and values of {size.kv_tokens} fit"
        )

    def attempt(num_replicas: float, asked: _Asked = asked) -> Size:
        options = {"budget": budget, **asked.options, "num_blocks": num_blocks, "rows": rows}
        options.pop("max_num_batched_tokens", None)
        options = copy.deepcopy(options)  # an eviction policy serves one cache
        figures = simulate(asked.share(num_replicas), cost=cost, slo=asked.slo, **options).metrics
        num_good = round(figures["within_slo"] * figures["requests"])
        attained = num_good / (figures["requests"] + figures["rejected"])
        measured: dict[str, Any] = {name: figures.get(name) for name in FIGURES}
        found = replace(size, attained=attained, **measured)
        return replace(found, replicas=int(num_replicas)) if attained >= asked.attain else found

    alone = attempt(LONELY, asked.few())
    if alone.replicas is None:
        return replace(alone, reason=_too_slow(alone, asked.slo))
    found = _fewest(attempt, asked.most)
    if found.replicas is None:
        return replace(found, reason=f"{asked.most} replicas are not enough: {found.attained:.0%} meet the objective")
    return found


def _fewest(attempt: Callable[[float], Size], most: int) -> Size:
    high = 1
    found = attempt(high)
    if found.replicas is not None:
        return found
    low = high
    while found.replicas is None and high < most:
        low, high = high, min(2 * high, most)
        found = attempt(high)
    while found.replicas is not None and high - low > 1:
        middle = (low + high) // 2
        tried = attempt(middle)
        if tried.replicas is None:
            low = middle
        else:
            high, found = middle, tried
    return found


def _too_slow(alone: Size, slo: Mapping[str, float]) -> str:
    values = {name: getattr(alone, f"{name}_p90") or 0.0 for name in slo}
    missed = [
        f"{name} is {style.seconds(value)} (p90), the limit {style.seconds(slo[name])}"
        for name, value in values.items()
        if value > slo[name]
    ]
    return f"too slow even for one request at a time: {'; '.join(missed) or f'{alone.attained:.0%} meet all limits'}"
