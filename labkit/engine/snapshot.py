"""Snapshots: saves an engine's state, restores it, or copies it into another engine.

Restoring replaces the contents of parts and requests, not the objects. References to `bm`, `sched` or a request stay
valid.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol, TypeVar

from labkit.clock import Clock
from labkit.core.blocks.tiers import Tier
from labkit.core.events.log import EventLog
from labkit.core.request import Request, Status
from labkit.core.scheduling.scheduler import Scheduler
from labkit.core.shown import Shown
from labkit.engine.handle import Handle
from labkit.runner.base import Runner


class Stateful(Protocol):
    """What a snapshot needs of an engine."""

    scheduler: Scheduler
    runner: Runner
    clock: Clock
    arriving: dict[str, Handle]
    listeners: list[Any]
    shards: dict[str, Any]
    weights_version: int

    @property
    def log(self) -> EventLog: ...

    def hand_out(self) -> None: ...


E = TypeVar("E", bound=Stateful)
KEPT = frozenset(
    {
        "listeners",
        "scheduler",
        "runner",
        "clock",
        "tokenizer",
        "worker",
        "wakeup",
        "lock",
        "closed",
        "_finalizer",
        "adapters",
        "images",
        "shards",
        "backlog",
        "weights_version",
        "_form",
        "kv_connector",
    }
)  # attributes of the engine itself that a restore keeps

OF_HANDLES = ("captures", "num_edited")  # what else of them follows from the tokens is made again


class Snapshot(Shown):
    """An engine's state at one moment. `engine.restore(snapshot)` works any number of times."""

    def __init__(self, engine: Stateful, state: list[tuple[object, dict[str, Any]]], mark: int) -> None:
        self.engine = engine
        self.state = state
        self.mark = mark
        self.step = engine.scheduler.step
        self.weights_version = engine.weights_version
        self.now = engine.clock.now()

    def __repr__(self) -> str:
        return f"Snapshot(step {self.step}, {self.now / 1e9:.6f} s)"


def _parts(engine: Stateful) -> list[object]:
    s, blocks = engine.scheduler, engine.scheduler.blocks
    offload = blocks.offload
    below = [] if offload is None else [offload, *_of_tier(offload.host)]
    return [
        engine, s, s.queue, s.pending, blocks, blocks.pool, blocks.host, blocks.tables, blocks.prefix, blocks.eviction,
        *below, *([] if blocks.states is None else [blocks.states]), engine.runner, engine.clock,
    ]  # fmt: skip


def _of_tier(tier: Tier) -> list[object]:
    return [tier, tier.prefix, tier.eviction]


def refuse_disk(engine: Stateful) -> None:
    offload = engine.scheduler.blocks.offload
    if offload is not None and offload.disk is not None:
        raise ValueError(
            "snapshots and forks do not hold the files of kv_disk_path: leave it out of an engine that you want to copy"
        )


def _requests(engine: Stateful) -> list[Request]:
    s = engine.scheduler
    arriving = engine.arriving.values()
    rows = [request for request in s.row_request if request is not None]
    return [*s.requests.values(), *s.ended.values(), *arriving, *rows]


def _fields(thing: object) -> dict[str, Any]:
    if isinstance(thing, Request):
        own = OF_HANDLES if isinstance(thing, Handle) else ()
        return {name: getattr(thing, name) for name in (*Request.__slots__, *own)}
    kept = KEPT if hasattr(thing, "listeners") else frozenset()
    return {name: value for name, value in thing.__getstate__().items() if name not in kept}  # type: ignore[attr-defined]


def _put_back(thing: object, state: dict[str, Any]) -> None:
    if hasattr(thing, "__setstate__"):
        thing.__setstate__(state)
        return
    for name, value in state.items():
        setattr(thing, name, value)


def _copy_state(things: list[object], states: list[dict[str, Any]], log: object) -> list[dict[str, Any]]:
    """Deep copies in which parts and requests are kept as references."""
    memo: dict[int, Any] = {id(thing): thing for thing in things}
    memo[id(log)] = log
    return [copy.deepcopy(state, memo) for state in states]


def take_snapshot(engine: Stateful) -> Snapshot:
    refuse_disk(engine)
    unique = {id(thing): thing for thing in [*_parts(engine), *_requests(engine)]}
    things = list(unique.values())
    engine.log.flush(engine.scheduler.step, engine.clock.now())
    states = _copy_state(things, [_fields(thing) for thing in things], engine.log)
    return Snapshot(engine, list(zip(things, states, strict=True)), engine.log.mark())


def restore_engine(engine: Stateful, snapshot: Snapshot) -> None:
    if snapshot.engine is not engine:
        theirs, ours = (getattr(one.runner, "kv_dtype", None) for one in (snapshot.engine, engine))
        kept = "" if theirs == ours else f", whose keys and values are {theirs}; here they are {ours}"
        raise ValueError(f"this snapshot belongs to another engine{kept}")
    known = {id(thing) for thing, _ in snapshot.state}
    engine.hand_out()  # now, since the lines of what is undone would come later
    engine.log.flush(engine.scheduler.step, engine.clock.now())
    engine.log.rewind(snapshot.mark)
    for request in _requests(engine):
        if id(request) not in known:
            request.row, request.status = None, Status.REWOUND
    things = [thing for thing, _ in snapshot.state]
    states = _copy_state(things, [state for _, state in snapshot.state], engine.log)
    for thing, state in zip(things, states, strict=True):
        _put_back(thing, state)


def copy_engine(engine: E) -> E:
    refuse_disk(engine)
    listeners, engine.listeners = engine.listeners, []
    try:
        copied = copy.deepcopy(engine)
        copied.shards = {}  # it writes files of its own
        return copied
    finally:
        engine.listeners = listeners
