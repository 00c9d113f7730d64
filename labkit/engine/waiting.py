"""Steps on demand, and waiting for requests: by stepping or, where a background thread does that, by waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from labkit.clock import WallClock
from labkit.core.options import duration
from labkit.core.plan import Outputs
from labkit.engine.background import Background
from labkit.engine.wakeup import has_news

if TYPE_CHECKING:
    from labkit.engine.handle import Handle

TOGETHER = 0.05  # seconds for which one call of the engine's thread takes steps


class Waiting(Background):
    """A loop that others drive or wait for."""

    def wait_for(self, handles: Iterable[Handle], timeout: float | None = None) -> None:
        """Wait until all have ended, by stepping or, with a background thread, by waiting for it."""
        if timeout is not None:
            duration("timeout", timeout)
        clock = WallClock()
        for handle in handles:
            while not handle.ended:
                left = None if timeout is None else timeout - clock.now() / 1e9
                if left is not None and left <= 0:
                    raise TimeoutError(f"{handle!r} has not ended after {timeout:g} s")
                self._wait_once(handle, None, left)

    def wait_past(self, handle: Handle, seen: int) -> int:
        """Wait until the request has more than `seen` tokens or has ended; returns how many it has."""
        while not has_news(handle, seen):
            self._wait_once(handle, seen, None)
        return len(handle.output_ids)

    def _wait_once(self, handle: Handle, seen: int | None, timeout: float | None) -> None:
        if self.is_running:
            if self._is_here:
                raise RuntimeError("the engine's own thread cannot wait for the engine")
            self.wakeup.wait(handle, seen, timeout)
        elif self._steps(lambda: has_news(handle, seen), timeout) is None and not handle.ended and not self.is_running:
            raise RuntimeError(f"{handle!r} cannot finish here: it was rewound, or belongs to another engine")

    async def wait_past_async(self, handle: Handle, seen: int | None) -> int:
        while not has_news(handle, seen):
            if self.is_running:
                await self.wakeup.wait_async(handle, seen)
            else:
                self._wait_once(handle, seen, 0.0)  # one step
                await asyncio.sleep(0)
        return len(handle.output_ids)

    def step(self) -> Outputs | None:
        """One step: launch the next plan and commit the oldest. None if nothing is left to do."""
        self._check_steps_by_hand()
        return self._call(self._step)

    def _steps(self, over: Callable[[], bool] = lambda: False, timeout: float | None = None) -> Outputs | None:
        """Several steps as one call of the engine's thread, because a call takes about a tenth of a millisecond: until
        `over`, until another thread calls, or for 50 ms. What the last one gives."""
        self._check_steps_by_hand()
        seconds = TOGETHER if timeout is None else min(timeout, TOGETHER)

        def steps() -> Outputs | None:
            clock = WallClock()
            while True:
                outputs = self._step()
                wanted = self.worker is not None and not self.worker.inbox.empty()
                if outputs is None or wanted or over() or clock.now() > seconds * 1e9:
                    return outputs

        return self._call(steps)

    def _check_steps_by_hand(self) -> None:
        self._check_open()
        if self.is_running and not self._is_here:
            raise RuntimeError("the engine steps by itself in the background: pause() it first")

    def run(self) -> None:
        """Step until nothing is left."""
        while self._steps():
            pass
