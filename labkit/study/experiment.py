"""Serves the same workload under every setting of a grid."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from labkit.bench.workload import Workload
from labkit.core.events.log import EventLog
from labkit.core.options import flag, real, whole
from labkit.core.params import SamplingParams
from labkit.engine.engine import Engine
from labkit.study.history import CURVES, History, rolling, thin
from labkit.study.parallel import each
from labkit.study.serving import serve
from labkit.study.settings import (
    Setting,
    check_grid,
    check_runner,
    make_engine,
    settings_of,
    valid_names,
)
from labkit.study.study import USUAL, Run, Study

Metric = Callable[[EventLog], float]
F = TypeVar("F", bound=Metric)
KEPT_POINTS = 200  # of each curve in a study: enough for a picture, little in a file


class Experiment:
    """A workload and a grid: a dict of names to lists of values. Every combination is served.

    Names are options of `BlockManager`, `Scheduler` and `SimRunner` (`budget` and `rows` for short), "runner" and
    "workload"; with a model, those of `Engine`. Without `model` it is a simulation on a virtual clock, with
    `SimRunner()` unless you pass another `runner`. `model` is a folder, a name or "embedded", and runs in real time.
    Pass options that are the same for all settings by name. `repeats` draws the workload again from that many seeds.

    >>> import labkit as lk
    >>> exp = lk.Experiment(lk.workloads.chats(8), {"eviction": ["lru", "lfu"], "num_blocks": [64, 128]}, rows=8)
    >>> @exp.metric
    ... def stored(log):
    ...     return len(log.events("Stored"))
    >>> exp.run(progress=False).frame()[["eviction", "num_blocks", "stored"]].shape
    (4, 3)
    """

    def __init__(
        self,
        workload: Workload,
        grid: Mapping[str, Sequence[Any]] | None = None,
        *,
        model: str | None = None,
        runner: Any = None,
        repeats: int = 1,
        **fixed: Any,
    ) -> None:
        if not isinstance(workload, Workload):
            raise TypeError(f"workload must be a Workload, such as labkit.workloads.chats(), got {workload!r}")
        grid = {} if grid is None else grid
        has_model = model is not None or "model" in (grid if isinstance(grid, Mapping) else ())
        if has_model and (runner is not None or "runner" in grid):
            raise TypeError("a model brings its own runner: give model= or runner=, not both")
        check_runner(runner)
        check_grid(grid, fixed, valid_names(runner, has_model))
        self.workload, self.grid, self.fixed = workload, dict(grid), fixed
        self.model, self.runner = model, runner
        self.repeats = whole("repeats", repeats, least=1)
        for one in self._workloads():
            if not isinstance(one, Workload):
                raise TypeError(f"grid['workload'] holds Workloads, got {one!r}")
            if self.repeats > 1 and one.again is None and not has_model:
                raise ValueError(f"{one!r} was not drawn from a seed: every repeat on a simulator would be the same")
        self.metrics: dict[str, Metric] = {}
        self._live: Any = None

    def __repr__(self) -> str:
        grid = " x ".join(f"{len(values)} {name}" for name, values in self.grid.items()) or "one setting"
        seeds = f" x {self.repeats} seeds" if self.repeats > 1 else ""
        return f"Experiment({grid}{seeds} of {self.workload_name} on {self.runner_name})"

    def __len__(self) -> int:
        """The number of runs."""
        return len(settings_of(self.grid)) * self.repeats

    def metric(self, function: F) -> F:
        """Decorator that adds a metric: a function of a run's event log that returns a number."""
        name = getattr(function, "__name__", "")
        if not callable(function) or not name.isidentifier():
            raise TypeError(f"a metric is a named function of an event log, got {function!r}")
        if name in USUAL or name in self.grid or name in ("seed", "error"):
            raise ValueError(f"the table has a column {name!r}: give the metric another name")
        self.metrics[name] = function
        return function

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_live": None}  # a figure stays in its notebook

    def run(
        self,
        *,
        live: bool | str = False,
        speed: float | None = None,
        progress: bool = True,
        workers: int | None = None,
        ray: bool | str = False,
    ) -> Study:
        """Serve every setting. If interrupted, returns what was measured so far.

        `workers` serves so many settings at once, each in a process of its own; `ray` as tasks of Ray, on this machine
        (True) or on a cluster by its address. Both are for simulations, and give the same numbers as one after the
        other.

        `live` draws each setting's rolling hit rate while it is served, or another of "output_tokens_per_s",
        "used_blocks", "waiting", "running". `speed` limits a simulation to that many simulated seconds per second, so
        that you can watch it.
        """
        flag("progress", progress)
        if speed is not None:
            real("speed", speed, least=0.0, open_left=True)
            if self.model is not None or "model" in self.grid:
                raise ValueError("speed= needs a simulation: a model runs in real time")
        if workers is not None or ray is not False:
            self._check_parallel(live)
        planned = [(seed, *setting) for setting in settings_of(self.grid) for seed in range(self.repeats)]
        view = self._open_live(live, planned)

        def one(entry: tuple[int, Setting, dict[str, Any]]) -> Run:
            seed, values, names = entry
            history = History()
            if view:
                view.watch(_name_of(names), history, self._workload(values, seed))
            return self._serve(values, names, seed, history, speed)

        done: dict[int, Run] = {}
        try:
            with contextlib.closing(each(one, planned, workers=workers, ray=ray)) as served:
                done.update(_progress(served, len(planned), progress and not view))
        except KeyboardInterrupt:
            pass  # the study records that it was interrupted
        finally:
            if view:
                view.close()
        runs = [done[i] for i in sorted(done)]
        if failed := [run for run in runs if run.error is not None]:
            first = failed[0]
            warnings.warn(f"{len(failed)} of {len(runs)} runs failed, {first.label}: {first.error}", stacklevel=2)
        return Study(
            runs,
            names=list(self.grid),
            workload=self.workload_name,
            runner=self.runner_name,
            num_planned=len(planned),
        )

    def once(self, names: dict[str, Any], seed: int) -> Run:
        """Serve the fixed settings once, with the workload of this seed; `names` label the run."""
        return self._serve({}, names, seed, History(), None)

    def _check_parallel(self, live: bool | str) -> None:
        if self.model is not None or "model" in self.grid:
            raise ValueError(
                "workers= and ray= are for simulations: models that run at once would slow each other down"
            )
        if live is not False:
            raise ValueError("live= follows one run after the other: leave out workers= and ray=")

    def _serve(self, values: Setting, names: dict[str, Any], seed: int, history: History, speed: float | None) -> Run:
        """Serve one setting, once. An error becomes its result, and the other settings are still served."""
        log = EventLog(keep=None) if self.metrics else None
        engine: Engine | None = None
        try:
            engine = make_engine({**self.fixed, **values}, self.runner, self.model, log)
            workload = self._workload(values, seed)
            if engine.worker is not None:  # the first step of a model is slower than all that follow
                engine.generate([[1, 2, 3]], _WARM_UP)
            served = serve(workload, engine, history, speed)
            measured = {name: _number(name, function(engine.log)) for name, function in self.metrics.items()}
        except Exception as error:  # it becomes this run's result, and the others count
            return Run(names, seed, f"{type(error).__name__}: {error}")
        finally:
            if engine is not None:
                engine.close()
        return Run(names, seed, None, {**measured, **served.metrics}, served.requests, _curves(history, workload))

    def _workload(self, values: Setting, seed: int) -> Workload:
        chosen: Workload = values.get("workload", self.workload)
        return chosen.reseeded(seed) if self.repeats > 1 and chosen.again is not None else chosen

    def _workloads(self) -> list[Any]:
        return list(self.grid.get("workload", [self.workload]))

    @property
    def workload_name(self) -> str:
        if "workload" in self.grid:
            return f"{len(self.grid['workload'])} workloads"
        return f"{self.workload.name}: {len(self.workload.asks)} requests"

    @property
    def runner_name(self) -> str:
        if several := next((name for name in ("model", "runner") if name in self.grid), None):
            return f"{len(self.grid[several])} {several}s"
        if self.model is not None:
            return "the embedded model" if self.model == "embedded" else self.model
        return type(self.runner).__name__ if self.runner is not None else "SimRunner"

    def _open_live(self, live: bool | str, planned: list[tuple[int, Setting, dict[str, Any]]]) -> Any:
        if live is False:
            return None
        from labkit.study.live import LiveCurves

        curve = "hit_rate" if live is True else live
        names = list(dict.fromkeys(_name_of(names) for _, _, names in planned))
        if self._live is None or (self._live.curve, self._live.names) != (curve, names):
            self._live = LiveCurves(names, curve)
        return self._live.open()


_WARM_UP = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False)


def _name_of(names: Mapping[str, Any]) -> str:
    return ", ".join(map(str, names.values())) or "the setting"


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metric {name!r} gave {value!r}: it must give a number") from None


def _curves(history: History, workload: Workload) -> dict[str, list[float | None]]:
    columns = history.columns()
    found: dict[str, list[float | None]] = {}
    lengths = workload.lengths()
    num_output = sum(ask.num_output for ask in workload.asks)
    num_prompt = sum(lengths) - num_output
    for name in CURVES:
        xs, ys = thin(*rolling(columns, name, num_prompt, num_output), most=KEPT_POINTS)
        found["now"] = [round(x, 6) for x in xs.tolist()]
        found[name] = [round(y, 5) if y == y else None for y in ys.tolist()]
    return found


def _progress(served: Any, total: int, shown: bool) -> Any:
    if not shown:
        return served
    from tqdm.auto import tqdm  # comes with transformers

    return tqdm(served, total=total, unit="run", leave=False, delay=1.0)
