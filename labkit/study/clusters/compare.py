"""Compares routers, numbers of replicas and placements on one workload: `lk.study.cluster(...)`."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from labkit.bench.workload import Workload, arriving
from labkit.core.options import check_names, real, whole
from labkit.study.clusters.cluster import Cluster
from labkit.study.clusters.placement import Disaggregated
from labkit.study.clusters.replica import OPTIONS
from labkit.study.clusters.results import check_slo, columns_of, metrics_of
from labkit.study.clusters.routers import Router, name_of, named
from labkit.study.parallel import each
from labkit.study.settings import labels
from labkit.study.study import Run, Study

DEFAULT_ROUTERS = ("random", "least_loaded", "cache_aware", "precise")
SHOWN = ("output_tokens_per_s", "goodput", "ttft_p90", "tpot_p50", "hit_rate", "imbalance")


class ClusterStudy(Study):
    """The table of `lk.study.cluster`: a row for each router, number of replicas or placement, rate and seed."""

    def _worth_showing(self) -> list[str]:
        differing = (name for name in SHOWN if len({run.metrics[name] for run in self.runs if run.metrics}) > 1)
        return list(differing) or list(SHOWN[:1])


def cluster(
    workload: Workload,
    replicas: Any = 4,
    routers: Sequence[str | Router] = DEFAULT_ROUTERS,
    *,
    rates: Sequence[float] | None = None,
    slo: Mapping[str, float] | None = None,
    repeats: int = 1,
    runner: Any = None,
    patience: float | None = None,
    workers: int | None = None,
    ray: bool | str = False,
    **options: Any,
) -> ClusterStudy:
    """Serve a workload on simulated clusters, once for each router (a name, an object or a function of yours), and
    collect one table.

    `replicas` is a number, a list of options for each replica, a `Disaggregated(...)`, or a list of numbers and
    placements to compare. `rates` draws the arrivals again at so many requests a second. Goodput counts the requests
    that met the `slo`, by default {"ttft": 1.0, "tpot": 0.1} seconds. `workers` and `ray` serve several rows at once,
    as in `Experiment.run`. Other options are those of `Cluster`.

    >>> import labkit as lk
    >>> mix = lk.workloads.shared_prefixes(100, rate=20)
    >>> lk.study.cluster(mix, 2, ["random", "precise"]).frame()[["router", "hit_rate"]].shape
    (2, 2)
    """
    if not isinstance(workload, Workload):
        raise TypeError(f"workload must be a Workload, such as labkit.workloads.chats(), got {workload!r}")
    if isinstance(routers, str) or not isinstance(routers, Sequence) or not routers:
        raise TypeError(f'routers is a list, such as ["random", "precise"], got {routers!r}')
    check_names("cluster", options, OPTIONS)
    if whole("repeats", repeats, least=1) > 1 and workload.again is None and rates is None:
        raise ValueError(f"{workload!r} was not drawn from a seed: every repeat would be the same")
    objective = check_slo(slo)
    chosen = [named(router) for router in routers]
    places = list(replicas) if _is_several(replicas) else [replicas]
    grid: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
        ("router", chosen, labels([name_of(router) for router in chosen]))
    ]
    if _is_several(replicas):
        grid.append(("replicas", places, labels([_name_of_place(place) for place in places])))
    if rates is not None:
        checked = [real("a rate", rate, least=0.0, open_left=True) for rate in rates]
        if not checked:
            raise ValueError("rates is empty: give it at least one rate, in requests a second")
        grid.append(("rate", checked, checked))
    shared = dict(options, runner=runner, patience=patience)
    tasks: list[_Task] = []
    for combination in itertools.product(*([*zip(values, shown, strict=True)] for _, values, shown in grid)):
        value = {name: one for (name, _, _), (one, _) in zip(grid, combination, strict=True)}
        label = {name: one for (name, _, _), (_, one) in zip(grid, combination, strict=True)}
        place = value.get("replicas", places[0])
        tasks += [_Task(place, value["router"], value.get("rate"), label, seed) for seed in range(repeats)]

    def serve(task: _Task) -> Run:
        drawn = _drawn(workload, task.rate, task.seed if repeats > 1 else None)
        return _serve(drawn, task, objective, shared)

    done = dict(each(serve, tasks, workers=workers, ray=ray))
    runs = [done[i] for i in range(len(tasks))]
    if failed := [run for run in runs if run.error is not None]:
        first = failed[0]
        warnings.warn(f"{len(failed)} of {len(runs)} runs failed, {first.label}: {first.error}", stacklevel=2)
    shown = f"{workload.name}: {len(workload.asks)} requests"
    kind = _name_of_place(replicas) if not _is_several(replicas) else "clusters"
    where = kind if not isinstance(kind, int) else f"{kind} replicas"
    return ClusterStudy(runs, names=[name for name, _, _ in grid], workload=shown, runner=where, num_planned=len(runs))


class _Task(NamedTuple):
    """What one row serves."""

    place: Any
    router: Router
    rate: float | None
    label: dict[str, Any]
    seed: int


def _serve(workload: Workload, task: _Task, slo: Mapping[str, float], options: dict[str, Any]) -> Run:
    """One row. An error becomes its result, and the others are still served."""
    try:
        served = Cluster(task.place, router=copy.deepcopy(task.router), **options)
        served.serve(workload)
        served.check()
    except Exception as error:  # it becomes this run's result, and the others count
        return Run(task.label, task.seed, f"{type(error).__name__}: {error}")
    return Run(task.label, task.seed, None, metrics_of(served, slo), columns_of(served))


def _drawn(workload: Workload, rate: float | None, seed: int | None) -> Workload:
    if seed is not None and workload.again is not None:
        workload = workload.reseeded(seed)
    return workload if rate is None else arriving(workload, rate, seed=seed or 0)


def _is_several(replicas: Any) -> bool:
    """A list of numbers and placements; a list of dicts is one cluster."""
    return isinstance(replicas, (list, tuple)) and not all(isinstance(one, Mapping) for one in replicas)


def _name_of_place(place: Any) -> Any:
    if isinstance(place, Disaggregated):
        return place.name
    return len(place) if isinstance(place, (list, tuple)) else place
