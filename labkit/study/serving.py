"""Serves a workload on an engine, request by request, and computes its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from labkit.bench.metrics import Timed, latencies
from labkit.bench.workload import Workload
from labkit.clock import VirtualClock
from labkit.core.params import SamplingParams
from labkit.core.request import Request
from labkit.core.scheduling.ahead import FastForward
from labkit.core.scheduling.scheduler import RejectedError
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.runner.sim import SimRunner
from labkit.study.history import History

LOOK_EVERY = 16  # steps between two samples of block usage, as a sample has a cost


@dataclass(frozen=True)
class Served:
    """The result of one run: numbers by name, and columns with one entry per request."""

    metrics: dict[str, float]
    requests: dict[str, list[Any]]


class _Conversations:
    """Submits the requests that are due, and the next turn of a conversation once its answer has ended."""

    def __init__(self, workload: Workload, engine: Engine) -> None:
        self.asks, self.engine = workload.asks, engine
        self.begin = engine.clock.now()
        self.handles: dict[int, Handle] = {}
        self.place: dict[str, int] = {}
        self.rejected: dict[int, str] = {}
        self.next: dict[int, list[int]] = {}  # ask -> those that go on with it
        for i, ask in enumerate(self.asks):
            if ask.after is not None:
                self.next.setdefault(ask.after, []).append(i)

    def open(self) -> None:
        for i, ask in enumerate(self.asks):
            if ask.after is None:
                self.submit(i, ask.prompt, self.begin / 1e9 + ask.arrival)

    def submit(self, i: int, prompt: Any, at: float) -> None:
        ask = self.asks[i]
        params = SamplingParams(
            max_tokens=ask.num_output, temperature=0, ignore_eos=True, detokenize=False, extra_args=ask.extra
        )  # fmt: skip
        try:
            session, parent, hint = ask.turn or (None, None, None)
            handle = self.engine.submit(
                prompt, params, arrival=at, priority=ask.priority, session=session, parent=parent, hint=hint
            )
        except RejectedError as error:
            self.rejected[i] = str(error)
            return
        self.handles[i], self.place[handle.id] = handle, i

    def go_on(self, ended: Any) -> None:
        """The turns that come after these answers."""
        i = self.place.get(ended.id)
        if i is None or ended.error is not None:
            return
        for j in self.next.get(i, ()):
            ask = self.asks[j]
            prompt = np.concatenate((ended.tokens, np.asarray(ask.prompt, np.int32)))
            self.submit(j, prompt, (ended.finished_at or 0) / 1e9 + ask.arrival)


class _Steps:
    """An engine's steps: by fast-forward on a simulator, as long as nobody looks at plans or outputs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.forward: FastForward | None = None
        runner, clock = cast(Any, engine.runner), cast(Any, engine.clock)
        foreseen = type(runner) is SimRunner and type(clock) is VirtualClock
        if foreseen and not (engine.is_running or engine.listeners or engine.scheduler.max_in_flight):
            self.forward = FastForward(engine.scheduler, runner)

    def take(self) -> tuple[int, Sequence[Request]] | None:
        """Number of the next step, and the requests that ended in it; None if nothing is left to do."""
        engine = self.engine
        if self.forward is not None:
            engine._let_arrive()
            found = self.forward.step(engine.clock.now())
            if found is not None:
                engine.clock.wait_until(found[0])
                return engine.scheduler.step - 1, found[1]
        outputs = engine.step()
        return None if outputs is None else (outputs.step, outputs.ended)

    def settle(self) -> None:
        """What was put off is done: tables and counts may be looked at."""
        if self.forward is not None:
            self.forward.settle()


def serve(workload: Workload, engine: Engine, history: History | None = None, speed: float | None = None) -> Served:
    """Serve the whole workload on the engine's clock; a virtual clock advances at most `speed` seconds a second.

    >>> import labkit as lk
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=256))
    >>> eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(), clock=lk.VirtualClock())
    >>> serve(lk.workloads.poisson(20), eng).metrics["requests"]
    20
    """
    talks = _Conversations(workload, engine)
    blocks, scheduler = engine.blocks, engine.scheduler
    before = (scheduler.step, scheduler.num_preempted, blocks.num_evicted, blocks.num_hit_tokens)
    queried = blocks.num_queried_tokens
    history = history if history is not None else History()
    history.begin = talks.begin
    leave = engine.log.subscribe(history)
    start, steps = time.perf_counter(), _Steps(engine)
    looks: list[tuple[float, float]] = []  # (share of empty places, used blocks)
    try:
        talks.open()
        while (taken := steps.take()) is not None:
            step, ended = taken
            for request in ended:
                talks.go_on(request)
            if step % LOOK_EVERY == 0:
                steps.settle()
                stats = blocks.stats()
                looks.append((stats.waste, stats.used_blocks))
            if speed is not None:
                due = start + (engine.clock.now() - talks.begin) / 1e9 / speed
                time.sleep(max(0.0, due - time.perf_counter()))
    finally:
        steps.settle()
        leave()
    asked = blocks.num_queried_tokens - queried
    metrics = {
        "steps": scheduler.step - before[0],
        "hit_rate": (blocks.num_hit_tokens - before[3]) / asked if asked else 0.0,
        "evictions": blocks.num_evicted - before[2],
        "preemptions": scheduler.num_preempted - before[1],
        "waste": float(np.mean([waste for waste, _ in looks])) if looks else 0.0,
        "used_blocks": float(np.mean([used for _, used in looks])) if looks else 0.0,
    }
    return _told(talks, metrics)


def _told(talks: _Conversations, metrics: dict[str, float]) -> Served:
    timed, columns = _requests(talks)
    if not timed:
        why = next(iter(talks.rejected.values()), None) or next(
            (str(h.error or h.finish_reason or h.status) for h in talks.handles.values()), "no request came"
        )
        raise RuntimeError(f"none of {len(talks.asks)} requests was served: {why}")
    span = max(t.done for t in timed) - min(t.arrival for t in timed)
    output = sum(t.num_output for t in timed)
    found: dict[str, float] = {
        "requests": len(timed),
        "rejected": len(talks.asks) - len(timed),
        "makespan": span,
        "output_tokens_per_s": output / span if span else 0.0,
    }
    for name, values in latencies(timed).items():
        found |= {f"{name}_{which}": value for which, value in values.items() if which != "mean"}
    return Served({**found, **metrics}, columns)


_SECONDS: dict[str, Callable[[Handle, int], float | None]] = {
    "arrival": lambda r, begin: (r.arrival - begin) / 1e9,
    "waited": lambda r, begin: _between(r.arrival, r.admitted_at),
    "ttft": lambda r, begin: _between(r.arrival, r.first_token_at),
    "tpot": lambda r, begin: _each(r),
    "e2e": lambda r, begin: _between(r.arrival, r.finished_at),
}


def _requests(talks: _Conversations) -> tuple[list[Timed], dict[str, list[Any]]]:
    timed: list[Timed] = []
    names = ("request", "priority", "status", *_SECONDS, "num_prompt", "num_cached", "num_output", "preemptions")
    extra = dict.fromkeys(name for ask in talks.asks for name in ask.extra or ())
    columns: dict[str, list[Any]] = {name: [] for name in (*names, *(name for name in extra if name not in names))}
    for i, handle in sorted(talks.handles.items()):
        row: dict[str, Any] = {
            "request": i, "priority": handle.priority, "status": "failed" if handle.error else str(handle.status),
            **{name: get(handle, talks.begin) for name, get in _SECONDS.items()},
            "num_prompt": handle.num_prompt, "num_cached": handle.num_cached, "num_output": handle.num_output,
            "preemptions": handle.num_preemptions,
        }  # fmt: skip
        given = talks.asks[i].extra or {}
        for name, column in columns.items():
            column.append(row[name] if name in row else given.get(name))
        if row["status"] == "finished" and handle.first_token_at is not None and handle.finished_at is not None:
            at = [
                (moment - talks.begin) / 1e9 for moment in (handle.arrival, handle.first_token_at, handle.finished_at)
            ]
            timed.append(Timed(at[0], at[1], at[2], handle.num_prompt, handle.num_output, index=i))
    return timed, columns


def _between(start: int, end: int | None) -> float | None:
    return None if end is None else (end - start) / 1e9


def _each(request: Handle) -> float | None:
    if request.first_token_at is None or request.finished_at is None or request.num_output < 2:
        return None
    return (request.finished_at - request.first_token_at) / 1e9 / (request.num_output - 1)
