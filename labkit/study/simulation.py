"""Serves a workload or a trace on a simulated machine: the real scheduler and block manager on a virtual clock."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import labkit.study.tables as tables
from labkit.bench.workload import Workload
from labkit.core.blocks.manager import BlockManager
from labkit.core.events.log import EventLog, NoLog
from labkit.core.options import check_names, choose
from labkit.core.params import SamplingParams
from labkit.core.request import Request
from labkit.core.scheduling.ahead import FastForward
from labkit.core.scheduling.scheduler import RejectedError, Scheduler
from labkit.engine.checks import layout_of
from labkit.runner.cost import StepCost
from labkit.runner.sim import SimRunner
from labkit.study.analytic import AnalyticCost
from labkit.study.history import CURVES, History, rolling, thin
from labkit.study.incoming import Arrivals, Incoming
from labkit.study.machines import Efficiency
from labkit.study.served import Served
from labkit.study.settings import NUM_BLOCKS, OF_BLOCKS, OF_SCHEDULER, SHORT
from labkit.study.steps.native import AWAITED, DONE, ENDLESS, IDLE, NEED, STOPPED, NativeSteps
from labkit.study.study import Run, Study
from labkit.study.traces.trace import Trace
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

LOOK_EVERY = 8  # steps between two points of the curves
TAKEN = 256  # requests handed to C++ at once
BUDGET = 8192  # tokens of a step, where a machine is named
PARAMS: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}


def simulate(
    workload: Workload | Trace | Iterable[Any],
    *,
    model: Any = "llama-3.1-8b",
    machine: Any = "H100",
    tp: int = 1,
    pp: int = 1,
    efficiency: Efficiency | None = None,
    cost: StepCost | None = None,
    utilization: float = 0.9,
    slo: Mapping[str, float] | None = None,
    requests: bool | str | Path = True,
    log: EventLog | None = None,
    seed: int = 0,
    **settings: Any,
) -> Simulation:
    """Simulate serving `workload` with `model` on `machine`, named as in `AnalyticCost.of`, or with another `cost`.

    Further settings are those of `BlockManager` and `Scheduler` (`budget` and `rows` for short); there are as many
    blocks as fit the machine's memory, unless you set `num_blocks`. `slo={"ttft": 0.5, "tpot": 0.05}` adds the goodput.
    `requests` keeps a row for each request in memory, writes them to a CSV file of that name, or with False keeps only
    percentiles: then memory does not grow with the workload, which may be a generator of `Ask`s. With `log` every event
    is recorded.

    >>> import labkit as lk
    >>> lk.study.simulate(lk.workloads.poisson(100, rate=20), model="llama-3.1-8b", machine="H100")
    Simulation(Poisson, 20/s: 100 requests on AnalyticCost(llama-3.1-8b on H100): ttft p50 31.3 ms, 1,190 tokens/s)
    """
    check_names("simulate", settings, (*SHORT, *OF_BLOCKS, *OF_SCHEDULER))
    options = {SHORT.get(name, name): value for name, value in settings.items()}
    if cost is None:
        size = options.get("block_size", 16)
        cost = AnalyticCost.of(model, machine, tp=tp, pp=pp, efficiency=efficiency, block_size=size)
        options.setdefault("max_num_batched_tokens", BUDGET)
        fitting = {"utilization": utilization, "max_num_batched_tokens": options["max_num_batched_tokens"]}
        if "num_blocks" not in options:
            options["num_blocks"] = cost.kv_blocks(**fitting)
    options.setdefault("num_blocks", NUM_BLOCKS)
    runner = SimRunner(cost=cost, seed=seed)
    options.setdefault("swap_cost", runner.swap_cost)
    options.setdefault("recompute_cost", runner.recompute_cost)
    blocks = BlockManager(**{name: options.pop(name) for name in OF_BLOCKS if name in options})
    scheduler = Scheduler(blocks, log=NoLog() if log is None else log, **options)
    simulator = Simulator(scheduler, runner, Served(requests, slo))
    begin = time.perf_counter()
    simulator.run(Arrivals(workload, runner.vocab_size))
    name = getattr(workload, "name", "requests")
    return Simulation(name, cost, simulator, time.perf_counter() - begin)


class Simulator:
    """Feeds arrivals to a scheduler and takes its steps. At every moment each request is in one place: `check`."""

    def __init__(self, scheduler: Scheduler, runner: SimRunner, served: Served) -> None:
        self.scheduler, self.runner, self.served = scheduler, runner, served
        self.forward = FastForward(scheduler, runner)
        self.history = History()
        self.index_of: dict[str, int] = {}  # of live requests
        self.num_injected = self.num_prompt = 0
        self.now = 0  # ns
        self.most_used = 0  # blocks
        self.rows = 0  # of all steps together
        self.busy = self.waiting = self.used = 0.0  # seconds of steps, of steps with a queue, blocks * seconds
        self._params: dict[int, SamplingParams] = {}
        self._mark = (0, 0, 0, 0)  # prompt, cached and output tokens and the step, when the last point was drawn
        blocks = scheduler.blocks
        runner.open(layout_of(scheduler, runner))
        blocks.attach()

    def run(self, arrivals: Arrivals, most_native: int = ENDLESS) -> None:
        """Serve all of them: in C++ where it can, and after `most_native` steps in Python."""
        served = self.served
        fed: dict[tuple[bool, int], Incoming] = {}
        try:
            is_over = False
            if most_native:
                native = NativeSteps.of(self.scheduler, self.runner, LOOK_EVERY, lambda i: self._fed(fed, i))
                is_over = native is not None and self._run_native(native, arrivals, most_native, fed)
            while True:
                upcoming = arrivals.next_time()
                while upcoming is not None and round(upcoming * 1e9) <= self.now:
                    self._inject(arrivals.pop())
                    upcoming = arrivals.next_time()
                before = self.now
                found = None if is_over else self.forward.step(before) or self.forward.usual(before)
                is_over = False
                if found is None and upcoming is None:
                    found = self.forward.usual(before, last=True)
                if found is None:
                    if upcoming is None:
                        break
                    self.now = max(before, round(upcoming * 1e9))
                    continue
                self.now, ended = found
                for request in ended:
                    index = self.index_of.pop(request.id)
                    served.add(index, request)
                    arrivals.ended(index, request)
                    del self.scheduler.ended[request.id]  # the scheduler would remember thousands
                self._look((self.now - before) / 1e9)
            self.forward.settle()
            if self.scheduler.has_work:
                raise RuntimeError(f"{self.scheduler.num_waiting} requests wait and none can run: {self.scheduler!r}")
            self._point()
            self.check()
            self.scheduler.check_idle()
        finally:
            served.close()

    def _run_native(
        self, native: NativeSteps, arrivals: Arrivals, most_steps: int, fed: dict[tuple[bool, int], Incoming]
    ) -> bool:
        """Steps in C++, and what they found in `served` and `history`. `fed` is what may not have arrived yet, by (is
        it a turn, its index). Returns whether nothing was left to compute."""
        num_fed, code = 0, NEED
        while True:
            if code == NEED:
                given = arrivals.take(TAKEN)
                for gone in [key for key in fed if not key[0]]:
                    del fed[gone]
                fed |= {(False, one.index): one for one in given}
                self._feed(native, arrivals, given, num_fed, exhausted=len(given) < TAKEN)
                num_fed += len(given)
            code = native.run(most_steps)
            ended, points, answers = native.take()
            self.served.add_all(*ended.T)
            for now, step, queried, hit, output, used, waiting, running in points.tolist():
                self._draw(now, step, (queried, hit, output), used, waiting, running)
            if code == AWAITED:
                for i, tokens in answers.items():
                    turns = arrivals.turns(int(ended[i, 0]), tokens, int(ended[i, 4]))
                    self._feed(native, arrivals, turns)
                    fed |= {(True, one.index): one for one in turns}
            if code in (DONE, STOPPED, IDLE):
                break
        handover = native.hand_over()
        handover.apply(self._params_of)
        numbers = handover.numbers
        self.now, self.most_used, self.rows = numbers["now"], numbers["most_used"], numbers["rows"]
        self.busy, self.used, self.waiting = numbers["busy"], numbers["used_time"], numbers["waiting_time"]
        self.num_injected, self.num_prompt = numbers["num_submitted"], numbers["num_prompt"]
        self.index_of = handover.index_of
        late = [(turn, fed[turn, index]) for index, turn in handover.upcoming]
        arrivals.give_back([one for turn, one in late if not turn], [one for turn, one in late if turn])
        self.check()
        return code in (DONE, IDLE)

    def _fed(self, fed: dict[tuple[bool, int], Incoming], index: int) -> Request:
        given = fed.get((False, index)) or fed[True, index]
        return self._request(given)

    def _feed(
        self, native: NativeSteps, arrivals: Arrivals, given: list[Incoming], first: int | None = None,
        exhausted: bool = False,
    ) -> None:  # fmt: skip
        """`first` is the place of the first one in the stream; None: they follow an answer."""
        outputs = [one.num_output for one in given]
        for num in set(outputs):
            self._params_of(num)
        awaited = [arrivals.goes_on(one.index) for one in given]
        native.add(given, outputs, awaited, first or 0, first is None, exhausted)

    def _params_of(self, num_output: int) -> SamplingParams:
        params = self._params.get(num_output)
        if params is None:
            params = self._params[num_output] = SamplingParams(max_tokens=num_output, **PARAMS)
        return params

    def _inject(self, given: Incoming | None) -> None:
        assert given is not None
        request = self._request(given)
        self.num_injected += 1
        self.num_prompt += len(given.prompt)
        try:
            self.scheduler.submit(request, self.now)
        except RejectedError:
            return
        self.index_of[request.id] = given.index

    def _request(self, given: Incoming) -> Request:
        params = self._params_of(given.num_output)
        if given.extra:
            params = replace(params, extra_args=given.extra)
        session, parent, hint = given.turn or (None, None, None)
        return Request(
            f"r{given.index}", given.prompt, params, arrival=max(round(given.arrival * 1e9), 0),
            priority=given.priority, session=session, parent_session=parent, hint=hint,
        )  # fmt: skip

    def _look(self, seconds: float) -> None:
        scheduler = self.scheduler
        used = scheduler.blocks.num_used
        self.busy += seconds
        self.rows += self.forward.num_rows
        self.used += used * seconds
        if used > self.most_used:
            self.most_used = used
        if scheduler.queue:
            self.waiting += seconds
        if scheduler.step - self._mark[3] >= LOOK_EVERY:
            self._point()
        self.check()

    def check(self) -> None:
        """Every request that came is finished, running, queued, swapped, rejected or aborted."""
        s = self.scheduler
        there = s.num_running + s.num_waiting + s.num_swapped
        gone = s.num_finished + s.num_aborted + s.num_rejected
        assert self.num_injected == there + gone, f"{self.num_injected} came, {there} are there, {gone} have ended"
        assert len(self.index_of) == there, f"{len(self.index_of)} are live, the scheduler has {there}"

    def _point(self) -> None:
        s, blocks = self.scheduler, self.scheduler.blocks
        counts = (blocks.num_queried_tokens, blocks.num_hit_tokens, self.served.num_output)
        self._draw(self.now, s.step, counts, blocks.num_used, s.num_waiting, s.num_running)

    def _draw(self, now: int, step: int, counts: tuple[int, int, int], used: int, waiting: int, running: int) -> None:
        """A point of the curves; `counts` are queried, cached and output tokens so far."""
        prompt, cached, output = (new - old for new, old in zip(counts, self._mark[:3], strict=True))
        self.history.add(
            now, prompt=prompt, cached=cached, output=output, used_blocks=used, waiting=waiting, running=running
        )
        self._mark = (*counts, step)

    def metrics(self) -> dict[str, float]:
        s, blocks = self.scheduler, self.scheduler.blocks
        asked = blocks.num_queried_tokens
        busy = self.busy or 1.0
        return {
            "requests": self.served.num,
            "rejected": s.num_rejected,
            **self.served.metrics(),
            "steps": s.step,
            "batch": self.rows / s.step if s.step else 0.0,
            "hit_rate": blocks.num_hit_tokens / asked if asked else 0.0,
            "evictions": blocks.num_evicted,
            "preemptions": s.num_preempted,
            "used_blocks": self.used / busy,
            "kv_pressure": self.used / busy / blocks.num_blocks,
            "kv_pressure_max": self.most_used / blocks.num_blocks,
            "time_with_queue": self.waiting / busy,
        }


class Simulation:
    """The result of `simulate`. `metrics` are numbers by name, `frame()` has one row per request, `study` is the same
    as a `Study` of one run, for its curves, figures and files."""

    def __init__(self, workload: str, cost: StepCost, simulator: Simulator, took: float) -> None:
        self.cost = cost
        self.scheduler = simulator.scheduler
        self.log = simulator.scheduler.log
        self.metrics = simulator.metrics()
        self.seconds = took  # of real time
        served = simulator.served
        columns = {name: column.tolist() for name, column in (served.columns or {}).items()}
        curves = _curves(simulator.history, simulator.num_prompt, served.num_output)
        run = Run({}, simulator.runner.seed, None, self.metrics, columns, curves)
        named = f"{workload}: {simulator.num_injected:,} requests"
        self.study = Study([run], names=[], workload=named, runner=repr(cost), num_planned=1)

    def __repr__(self) -> str:
        m = self.metrics
        rejected = f", {m['rejected']:,} rejected" if m["rejected"] else ""
        return (
            f"Simulation({self.study.workload} on {self.study.runner}: ttft p50 {m['ttft_p50'] * 1e3:.3g} ms, "
            f"{m['output_tokens_per_s']:,.0f} tokens/s{rejected})"
        )

    def frame(self) -> pandas.DataFrame:
        """One row per request, in order of arrival; times in seconds."""
        columns = self.study.runs[0].requests
        if not columns:
            raise ValueError("no rows were kept: simulate(requests=True) keeps them")
        return tables.pandas().DataFrame(columns).sort_values("request", ignore_index=True)

    def plot(self, y: str = "ttft") -> Figure:
        """A plotly figure: the share of requests below each "ttft", "tpot", "e2e" or "waited"; or over time
        "used_blocks", "waiting", "running", "hit_rate" or "output_tokens_per_s"."""
        if y in CURVES:
            return self.study.plot("time", y)
        choose("y", y, dict.fromkeys(("ttft", "tpot", "e2e", "waited", *CURVES)))
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("plot() needs plotly: pip install 'labkit[lab]'") from error
        values = self.frame()[y].dropna().sort_values().to_numpy()
        xs, ys = thin(values, (1 + np.arange(len(values))) / max(len(values), 1), most=1000)
        figure = go.Figure(go.Scatter(x=xs, y=ys, mode="lines", line_shape="hv"))
        figure.update_layout(**charts.LAYOUT, height=380, title=self.study.workload)
        return figure.update_layout(xaxis_title=f"{y} [s]", yaxis_title="share of requests", showlegend=False)

    def _repr_html_(self) -> str:
        rows = [(name, charts.show(value)) for name, value in self.metrics.items()]
        half = -(-len(rows) // 2)
        head = ("", "")
        return style.page(
            style.title(repr(self)),
            style.side_by_side(style.text_table(head, rows[:half]), style.text_table(head, rows[half:])),
        )


def _curves(history: History, num_prompt: int, num_output: int) -> dict[str, list[float | None]]:
    columns = history.columns()
    found: dict[str, list[float | None]] = {}
    for name in CURVES:
        xs, ys = thin(*rolling(columns, name, num_prompt, num_output), most=200)
        found["now"] = [round(x, 6) for x in xs.tolist()]
        found[name] = [round(y, 5) if y == y else None for y in ys.tolist()]
    return found
