"""One replica: a scheduler, its blocks and a runner, one step at a time. Knows no router and no other replica."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from labkit.core.blocks.manager import BlockManager
from labkit.core.events.log import EventLog
from labkit.core.options import check_names
from labkit.core.plan import Outputs, Plan, Result
from labkit.core.request import Request
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.checks import layout_of
from labkit.runner.sim import SimRunner
from labkit.study.settings import NUM_BLOCKS, OF_BLOCKS, OF_SCHEDULER, SHORT

OPTIONS = (*(name for name in (*OF_BLOCKS, *OF_SCHEDULER) if name != "max_in_flight"), *SHORT)
KEPT_EVENTS = 50_000


class Replica:
    """Begins a step at one time and ends it later, as its runner says; requests that come in between wait."""

    def __init__(self, index: int, runner: Any, options: Mapping[str, Any]) -> None:
        check_names("a replica", options, OPTIONS)
        given = {SHORT.get(name, name): copy.deepcopy(value) for name, value in options.items()}
        given.setdefault("num_blocks", NUM_BLOCKS)
        self.index = index
        self.runner = copy.deepcopy(runner) if runner is not None else SimRunner()
        if hasattr(self.runner, "swap_cost"):
            given.setdefault("swap_cost", self.runner.swap_cost)
            given.setdefault("recompute_cost", self.runner.recompute_cost)
        self.blocks = BlockManager(**{name: given.pop(name) for name in OF_BLOCKS if name in given})
        self.scheduler = Scheduler(self.blocks, log=EventLog(keep=KEPT_EVENTS), **given)
        self.scheduler.vocab_size = self.runner.vocab_size
        self.runner.open(layout_of(self.scheduler, self.runner))
        self.busy = 0  # ns spent in steps
        self._flying: tuple[Plan, Result] | None = None

    def __repr__(self) -> str:
        s = self.scheduler
        return f"Replica({self.index}: {s.num_running} running, {s.num_waiting} waiting, {self.blocks!r})"

    @property
    def log(self) -> EventLog:
        return self.scheduler.log

    @property
    def is_busy(self) -> bool:
        """Is a step under way?"""
        return self._flying is not None

    def submit(self, request: Request, now: int) -> None:
        """Raises RejectedError, and the request then says why."""
        try:
            self.scheduler.submit(request, now)
        finally:
            self.log.post()

    def abort(self, request: Request, now: int) -> None:
        self.scheduler.abort(request.id, now)
        self.log.post()

    def begin(self, now: int) -> int | None:
        """Begin a step; returns when it will end, None if there is nothing to compute."""
        plan = self.scheduler.schedule(now)
        if plan is None:
            plan = self.scheduler.overrule(now)
        self.log.post()  # admissions are known when the step begins
        if plan is None:
            return None
        result = self.runner.launch(plan).result()
        self._flying = (plan, result)
        duration = round(result.seconds * 1e9)
        self.busy += duration
        return now + duration

    def end(self, now: int) -> Outputs:
        assert self._flying is not None
        (plan, result), self._flying = self._flying, None
        return self.scheduler.commit(plan, result, now)
