"""The adapters that an engine can serve: loaded, listed, pinned and unloaded by name.

An adapter is registered with its folder; its weights are in host memory (all of them, or the `max_cpu_adapters` used
last), and the scheduler brings those of running requests to slots on the device. Adapters change between two steps, in
the engine's thread.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from labkit.core.options import closest, flag, text, whole
from labkit.core.request import Request
from labkit.core.scheduling.scheduler import Scheduler
from labkit.core.scheduling.slots import AdapterSlots
from labkit.core.shown import Shown, mimebundle

T = TypeVar("T")


class Serving(Protocol):
    """What the adapters need of an engine."""

    scheduler: Scheduler
    runner: Any
    clock: Any
    lock: Any
    arriving: dict[str, Any]

    def _call(self, function: Callable[[], T]) -> T: ...
    def _check_open(self) -> None: ...


class AdapterInUseError(RuntimeError):
    """Requests use the adapter: it cannot be unloaded or replaced until they have ended."""


@dataclass(frozen=True)
class AdapterInfo(Shown):
    """One adapter as `engine.adapters` lists it."""

    name: str
    path: str
    rank: int
    modules: tuple[str, ...]  # the last parts of their names
    num_bytes: int
    digest: str  # of its files
    slot: int | None  # on the device
    in_memory: bool  # of the host
    pinned: bool
    num_running: int
    num_waiting: int

    def __repr__(self) -> str:
        where = f"slot {self.slot}" if self.slot is not None else "in host memory" if self.in_memory else "on disk"
        pinned = ", pinned" if self.pinned else ""
        return (
            f"Adapter({self.name!r}: rank {self.rank}, {self.num_bytes / 2**20:.1f} MiB, {where}{pinned}, "
            f"{self.num_running} running, {self.num_waiting} waiting)"
        )


@dataclass
class _Entry:
    path: str
    key: str
    rank: int
    modules: tuple[str, ...]
    num_bytes: int
    digest: str
    has_files: bool = True  # it can be read again
    pinned: bool = False
    used: int = 0  # the number of the latest use


class Adapters(Shown, Mapping[str, AdapterInfo]):
    """`engine.adapters`: a mapping from names to what is known of each.

    >>> eng = lk.Engine(adapters={"sql": "path/to/sql"}, max_adapters=4)
    >>> eng.adapters.load("law", "path/to/law")
    >>> eng.submit("def f(", adapter="law").text
    >>> eng.adapters.unload("law")
    """

    def __init__(self, engine: Serving, max_cpu_adapters: int | None = None) -> None:
        self._engine = weakref.ref(engine)
        self.max_cpu_adapters = (
            None if max_cpu_adapters is None else whole("max_cpu_adapters", max_cpu_adapters, least=1)
        )
        self._entries: dict[str, _Entry] = {}
        self._uses = 0

    @property
    def engine(self) -> Serving:
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the engine of these adapters is gone")
        return engine

    def for_engine(self, engine: Serving) -> Adapters:
        """The same adapters in a copy of the engine, which shares the model and so the weights."""
        other = Adapters(engine, self.max_cpu_adapters)
        other._entries = {name: replace(entry) for name, entry in self._entries.items()}
        other._uses = self._uses
        return other

    @property
    def slots(self) -> AdapterSlots:
        """The scheduler's count of what is on the device."""
        found = self.engine.scheduler.slots
        if found is None:
            raise ValueError(
                "this engine has no room for adapters: make it with adapters={name: path} or max_adapters=8"
            )
        return found

    @property
    def _memory(self) -> Any:
        """The model's `Slots`; None for a runner without weights, to which adapters are names."""
        runner = self.engine.runner
        return getattr(getattr(runner, "model", runner), "adapters", None)

    # -- loading and unloading -------------------------------------------------------------------------------------

    def load(self, name: str, path: str | os.PathLike[str] | Any, *, pin: bool = False) -> AdapterInfo:
        """Read an adapter from a folder (adapter_config.json, adapter_model.safetensors), or from a hub, and serve it
        under this name from now on. `path` may also be an `Adapter` of `labkit.loading.peft`, made in memory. If the
        name exists, its weights are replaced; that is refused with an
        `AdapterInUseError` while requests use it. `pin` keeps it on the device once it is there."""
        text("an adapter's name", name)
        if "@" in name:
            raise ValueError(f"an adapter's name has no '@', got {name!r}")
        if not isinstance(path, (str, os.PathLike)) and not hasattr(path, "deltas"):
            raise ValueError(f"adapter {name!r} is a folder or a hub's name, got {path!r}")
        flag("pin", pin)
        self.engine._check_open()
        return self.engine._call(lambda: self._load(name, path, pin))

    def _load(self, name: str, path: Any, pin: bool) -> AdapterInfo:
        slots, memory, before = self.slots, self._memory, self._entries.get(name)
        if memory is None:
            entry = _Entry(str(path), name, 0, (), 0, "")
        else:
            weights = self._read(name, path)
            digest, where = weights.digest, str(getattr(path, "folder", path))
            entry = _Entry(where, f"{name}@{digest}", weights.rank, tuple(weights.kinds), weights.num_bytes, digest)
            entry.has_files = not hasattr(path, "deltas")
        if before is not None and before.key != entry.key:
            self._drop(name, "replaced")
        elif before is not None:
            entry.pinned = before.pinned
        self._entries[name] = entry
        if memory is not None:
            memory.known[entry.key] = weights
        try:
            if pin:
                slots.pin(entry.key)
                entry.pinned = True
        finally:
            self._touch(entry)
            self._log("load", name)
        return self._info(name)

    def _read(self, name: str, path: Any) -> Any:
        from labkit.loading.peft import Adapter, read_adapter

        try:
            weights = path if isinstance(path, Adapter) else read_adapter(path, self._memory.dtype)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        self._memory.check(weights, name)
        return weights

    def unload(self, name: str) -> None:
        """Forget an adapter. Refused with an `AdapterInUseError` while requests use it: wait for them or abort them
        first. What the prefix cache holds of it is found again only by the same weights."""
        self.engine._check_open()
        self.engine._call(lambda: self._drop(name, "unloaded"))

    def _drop(self, name: str, what: str) -> None:
        slots, entry = self.slots, self._entry(name)
        with self.engine.lock:  # no request can arrive meanwhile
            if live := self._live(name):
                raise AdapterInUseError(
                    f"adapter {name!r} cannot be {what}: {len(live)} requests use it, {live[0].id!r} first; wait for "
                    f"them, or abort them"
                )
            del self._entries[name]
        slots.forget(entry.key)
        if self._memory is not None:
            self._memory.known.pop(entry.key, None)
        if what == "unloaded":
            self._log("unload", name)

    def pin(self, name: str) -> None:
        """Keep this adapter on the device from the moment it is there, and in host memory."""
        self.engine._call(lambda: self._pin(name, True))

    def unpin(self, name: str) -> None:
        self.engine._call(lambda: self._pin(name, False))

    def _pin(self, name: str, pinned: bool) -> None:
        entry = self._entry(name)
        if pinned:
            self.slots.pin(entry.key)
        else:
            self.slots.pinned.discard(entry.key)
        entry.pinned = pinned
        self._log("pin" if pinned else "unpin", name)

    def _log(self, what: str, name: str) -> None:
        scheduler = self.engine.scheduler
        scheduler.log.add(("Control", f"adapter {what}", name))
        scheduler.log.flush(scheduler.step, self.engine.clock.now())
        scheduler.log.post()

    # -- requests --------------------------------------------------------------------------------------------------

    def key_for(self, name: str) -> str:
        """What a request of this adapter is told apart by. Its weights are in host memory from here on; a ValueError if
        there is no such adapter, or its files have changed."""
        if self.engine.scheduler.slots is None:
            if hasattr(self.engine.runner, "model") or hasattr(self.engine.runner, "workers"):
                self.slots  # noqa: B018  # raises
            return name  # a fake or simulated model: adapters are names
        if self._memory is None and name not in self._entries:
            return name
        entry = self._entry(name)
        if self._memory is not None and entry.key not in self._memory.known:
            self.engine._call(lambda: self._fetch(name, entry))
        self._touch(entry)
        return entry.key

    def _fetch(self, name: str, entry: _Entry) -> None:
        weights = self._read(name, entry.path)
        if weights.digest != entry.digest:
            raise ValueError(f"adapter {name!r}: {entry.path} has changed since it was loaded: load it again")
        self._memory.known[entry.key] = weights

    def _touch(self, entry: _Entry) -> None:
        self._uses += 1
        entry.used = self._uses
        memory = self._memory
        if self.max_cpu_adapters is not None and memory is not None and len(memory.known) > self.max_cpu_adapters:
            self.engine._call(self._shrink)

    def _shrink(self) -> None:
        """Drop the weights that were not used for longest; those of live requests and pinned ones stay."""
        known = self._memory.known
        busy = {request.adapter for request in self._live()}
        latest = max(entry.used for entry in self._entries.values())
        there = [(name, entry) for name, entry in self._entries.items() if entry.key in known]
        for name, entry in sorted(there, key=lambda item: item[1].used):
            if len(known) <= (self.max_cpu_adapters or 0):
                return
            if not (entry.pinned or entry.used == latest or name in busy or not entry.has_files):
                del known[entry.key]

    def is_current(self, name: str, key: str) -> bool:
        """Whether `key_for(name)` would still give this key."""
        entry = self._entries.get(name)
        return entry.key == key if entry is not None else self._memory is None

    def _live(self, name: str | None = None) -> list[Request]:
        """Requests that use this adapter; None: any."""
        every = [*self.engine.scheduler.requests.values(), *self.engine.arriving.values()]
        return [
            request for request in every
            if request.adapter is not None and name in (None, request.adapter) and not request.ended
        ]  # fmt: skip

    # -- what there is ---------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> _Entry:
        if not isinstance(name, str) or name not in self._entries:
            known = (
                closest(str(name), self._entries)
                if self._entries
                else "none is loaded: engine.adapters.load(name, path)"
            )
            raise ValueError(f"there is no adapter {name!r}; {known}")
        return self._entries[name]

    def _info(self, name: str) -> AdapterInfo:
        entry = self._entry(name)
        live = self._live(name)
        running = sum(request.row is not None for request in live)
        memory = self._memory
        return AdapterInfo(
            name, entry.path, entry.rank, entry.modules, entry.num_bytes, entry.digest,
            self.slots.slot_of.get(entry.key), memory is None or entry.key in memory.known, entry.pinned, running,
            len(live) - running,
        )  # fmt: skip

    def list(self) -> list[AdapterInfo]:
        """Every adapter, in the order in which they were loaded."""
        return [self._info(name) for name in self._entries]

    def frame(self) -> Any:
        """The list as a DataFrame."""
        from labkit.core.frames import table

        columns = list(AdapterInfo.__dataclass_fields__)
        return table(([getattr(info, name) for name in columns] for info in self.list()), columns)

    def __getitem__(self, name: str) -> AdapterInfo:
        if name not in self._entries:
            raise KeyError(name)
        return self._info(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        slots = self.engine.scheduler.slots
        if slots is None:
            return "Adapters(no room: Engine(..., max_adapters=8) makes some)"
        shown = ", ".join(list(self._entries)[:8]) + (", ..." if len(self) > 8 else "")
        return f"Adapters({len(self)} loaded: {shown or 'none'}; {slots!r})"

    def _repr_html_(self) -> str | None:
        if self.engine.scheduler.slots is None:
            return mimebundle(self).get("text/html")
        return html_table(self)


def html_table(adapters: Adapters) -> str:
    """A table of the adapters, those on the device first."""
    from html import escape

    infos = sorted(adapters.list(), key=lambda info: (info.slot is None, info.slot or 0))
    heads = ("adapter", "rank", "MiB", "where", "running", "waiting", "modules", "path")
    lines = []
    for info in infos[:50]:
        where = f"slot {info.slot}" if info.slot is not None else "host memory" if info.in_memory else "disk"
        cells = (
            info.name, info.rank, f"{info.num_bytes / 2**20:.1f}", where + (", pinned" if info.pinned else ""),
            info.num_running, info.num_waiting, ", ".join(info.modules), info.path,
        )  # fmt: skip
        lines.append("".join(f"<td>{escape(str(cell))}</td>" for cell in cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    more = f"<p>and {len(infos) - 50} more</p>" if len(infos) > 50 else ""
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<b>{escape(repr(adapters.slots))}</b><table><tr>{head}</tr>{body}</table>{more}"


def checked(adapters: Any) -> dict[str, str | os.PathLike[str]]:
    """The option `adapters=`: paths by name."""
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise ValueError(f'adapters= are paths by name, {{"sql": "path/to/adapter"}}, got {adapters!r}')
    for name, path in adapters.items():
        text("an adapter's name", name)
        if not isinstance(path, (str, Path)):
            raise ValueError(f"adapter {name!r} is a folder or a hub's name, got {path!r}")
    return dict(adapters)
