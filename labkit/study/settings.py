"""The grid of settings, and how an engine is built from one of them."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from labkit.clock import VirtualClock
from labkit.core.blocks.manager import BlockManager
from labkit.core.events.log import EventLog
from labkit.core.options import check_names, real
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.build import Options
from labkit.engine.engine import Engine
from labkit.runner.cost import LinearCost
from labkit.runner.fake import FakeRunner
from labkit.runner.sim import SimRunner

SHORT = {"budget": "max_num_batched_tokens", "rows": "max_num_seqs"}
OF_BLOCKS = tuple(name for name in inspect.signature(BlockManager).parameters)
OF_SCHEDULER = tuple(name for name in inspect.signature(Scheduler).parameters if name not in ("blocks", "log"))
OF_COST = ("constant", "per_token", "per_context", "per_block", "per_row", "per_pair", "per_join", "per_prefill")
OF_SIMULATOR = (*OF_COST, "acceptance")
OF_MODEL = tuple(name for name in Options.__dataclass_fields__ if name not in ("log", "seed"))  # repeats have seeds
NUM_BLOCKS = 512  # default for a simulation; with a model, as many as fit

Setting = dict[str, Any]


def valid_names(runner: Any, has_model: bool) -> tuple[str, ...]:
    """The names allowed in the grid."""
    short = tuple(SHORT)
    if has_model:
        return ("workload", "model", *short, *OF_MODEL)
    simulator = OF_SIMULATOR if runner is None or isinstance(runner, SimRunner) else ()
    return ("workload", "runner", *short, *OF_BLOCKS, *OF_SCHEDULER, *simulator)


def check_grid(grid: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any], valid: Sequence[str]) -> None:
    if not isinstance(grid, Mapping):
        raise TypeError(f'a grid is a dict of lists, such as {{"num_blocks": [128, 256]}}, got {grid!r}')
    for name, values in grid.items():
        if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
            raise TypeError(f"grid[{name!r}] must be a list of values, got {values!r}: [{values!r}]?")
        if not values:
            raise ValueError(f"grid[{name!r}] is empty: give it at least one value")
        if name in fixed:
            raise TypeError(f"{name!r} is in the grid and also passed by name: leave one of them out")
    check_names("Experiment", [*grid, *fixed], valid)
    for short, name in SHORT.items():
        if short in {*grid, *fixed} and name in {*grid, *fixed}:
            raise TypeError(f"{short!r} is short for {name!r}: give one of them")


def settings_of(grid: Mapping[str, Sequence[Any]]) -> list[tuple[Setting, Setting]]:
    """Every combination, the last name varying fastest: (values, their labels)."""
    named = {name: list(zip(values, labels(values), strict=True)) for name, values in grid.items()}
    found = []
    for combination in itertools.product(*named.values()):
        values = {name: value for name, (value, _) in zip(named, combination, strict=True)}
        found.append((values, {name: label for name, (_, label) in zip(named, combination, strict=True)}))
    return found


def labels(values: Sequence[Any]) -> list[Any]:
    """Each value's label in a table or a file: the value itself if it is plain, else its name. Labels are unique."""
    found: list[Any] = []
    for value in values:
        label = label_of(value)
        number = 2
        while label in found:
            label = f"{label_of(value)} ({number})"
            number += 1
        found.append(label)
    return found


def label_of(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "asks") or isinstance(value, SimRunner):
        return getattr(value, "name", None) or repr(value)
    name = getattr(value, "__name__", None) or getattr(value, "name", None)
    return str(name) if name else repr(value)


def make_engine(setting: Mapping[str, Any], runner: Any, model: str | None, log: EventLog | None) -> Engine:
    """The engine of one setting. Values that hold state (policies, runners) are copied: each run has its own."""
    memo: dict[int, Any] = {}  # one for all: decisions of one policy object stay of one object
    options = {
        SHORT.get(name, name): copy.deepcopy(value, memo) for name, value in setting.items() if name != "workload"
    }  # fmt: skip
    if log is not None:
        options["log"] = log
    model = options.pop("model", model)
    if model is not None:
        return Engine(None if model == "embedded" else model, **options)
    chosen: Any = options.pop("runner", None) or copy.deepcopy(runner) or SimRunner()
    simulator = {name: options.pop(name) for name in OF_SIMULATOR if name in options}
    if simulator:
        chosen = _changed(chosen, simulator)
    options.setdefault("num_blocks", NUM_BLOCKS)
    if hasattr(chosen, "swap_cost"):
        options.setdefault("swap_cost", chosen.swap_cost)
        options.setdefault("recompute_cost", chosen.recompute_cost)
    blocks = BlockManager(**{name: options.pop(name) for name in OF_BLOCKS if name in options})
    return Engine(scheduler=Scheduler(blocks, **options), runner=chosen, clock=VirtualClock())


def check_runner(runner: Any) -> None:
    if runner is not None and not isinstance(runner, (SimRunner, FakeRunner)) and not hasattr(runner, "launch"):
        raise TypeError(f"runner must be a SimRunner(), a FakeRunner() or a similar object, got {runner!r}")


def _changed(runner: Any, options: Mapping[str, float]) -> SimRunner:
    if not isinstance(runner, SimRunner):
        raise TypeError(f"{', '.join(options)} are options of a SimRunner, but runner is {runner!r}")
    constants = {name: value for name, value in options.items() if name != "acceptance"}
    changed, cost = copy.copy(runner), runner.cost
    if constants:
        if not isinstance(cost, LinearCost):
            raise TypeError(
                f"{', '.join(constants)} are constants of a LinearCost, but the runner's cost is {runner.cost!r}"
            )
        changed.cost = replace(cost, **cast(Any, constants))
    changed.acceptance = real("acceptance", options.get("acceptance", runner.acceptance), least=0.0, most=1.0)
    return changed
