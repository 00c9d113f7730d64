"""Wakes threads and event loops that wait for a request: threads by a condition, event loops by one call per step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol


class Awaited(Protocol):
    """What this needs of a request that is waited for."""

    @property
    def ended(self) -> bool: ...

    @property
    def output_ids(self) -> list[int]: ...


class Wakeup:
    """Tells all waiters that a step has passed. An event loop gets one call per step, however many tasks wait in it."""

    def __init__(self) -> None:
        self.passed = threading.Condition()
        self.num_waiting = 0
        self.count = 0
        self.loops: dict[asyncio.AbstractEventLoop, list[tuple[Awaited, int | None, asyncio.Future[None]]]] = {}
        self.lock = threading.Lock()
        self.hooks: list[Callable[[], None]] = []  # called by whoever rings

    def ring(self) -> None:
        """Called by the engine's thread after each step, and after anything that ends a request."""
        for hook in list(self.hooks):
            hook()
        if self.num_waiting:
            with self.passed:
                self.count += 1
                self.passed.notify_all()
        if self.loops:
            with self.lock:
                loops = list(self.loops)
            for loop in loops:
                try:
                    loop.call_soon_threadsafe(self._wake, loop)
                except RuntimeError:  # that event loop was closed while a task waited in it
                    with self.lock:
                        self.loops.pop(loop, None)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        with self.lock:
            waiting = self.loops.get(loop, [])
            staying = [entry for entry in waiting if not has_news(entry[0], entry[1]) and not entry[2].done()]
            going = [entry for entry in waiting if entry not in staying]
            if staying:
                self.loops[loop] = staying
            else:
                self.loops.pop(loop, None)
        for _, _, future in going:
            if not future.done():
                future.set_result(None)

    def wait(self, handle: Awaited, seen: int | None, timeout: float | None) -> bool:
        """Wait until `handle` has more than `seen` tokens or has ended; False on timeout."""
        with self.passed:
            self.num_waiting += 1
            try:
                return self.passed.wait_for(lambda: has_news(handle, seen), timeout)
            finally:
                self.num_waiting -= 1

    async def wait_async(self, handle: Awaited, seen: int | None) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self.lock:
            self.loops.setdefault(loop, []).append((handle, seen, future))
        if has_news(handle, seen):  # it happened before we were registered
            self._wake(loop)
        await future


def has_news(handle: Awaited, seen: int | None) -> bool:
    return handle.ended or (seen is not None and len(handle.output_ids) > seen)
