"""Clocks, in integer nanoseconds: real time, processor time and virtual time."""

from __future__ import annotations

import time
from typing import Protocol

from labkit.core.options import MOST_SECONDS, duration, real


class Clock(Protocol):
    def now(self) -> int: ...
    def advance(self, seconds: float) -> None: ...
    def wait_until(self, when: int) -> None: ...


class WallClock:
    """Real time since the clock was created. `advance` does nothing, as a step's time has already passed."""

    def __init__(self) -> None:
        self._start = time.perf_counter_ns()

    def __repr__(self) -> str:
        return f"WallClock({self.now() / 1e9:.3f} s)"

    def now(self) -> int:
        return time.perf_counter_ns() - self._start

    def advance(self, seconds: float) -> None:
        pass

    def wait_until(self, when: int) -> None:
        time.sleep(max(0.0, (when - self.now()) / 1e9))


class ProcessClock:
    """The processor time of this process; waiting is skipped. For an engine with one thread, measured beside others
    whose work is not to be counted."""

    def __init__(self) -> None:
        self._skipped = -time.process_time_ns()

    def __repr__(self) -> str:
        return f"ProcessClock({self.now() / 1e9:.3f} s)"

    def now(self) -> int:
        return time.process_time_ns() + self._skipped

    def advance(self, seconds: float) -> None:
        pass

    def wait_until(self, when: int) -> None:
        self._skipped += max(0, when - self.now())


class VirtualClock:
    """Time that moves only when it is advanced: for simulations and reproducible tests."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = round(duration("start", start) * 1e9)

    def __repr__(self) -> str:
        return f"VirtualClock({self._now / 1e9:.6f} s)"

    def now(self) -> int:
        return self._now

    def advance(self, seconds: float) -> None:
        if real("seconds", seconds, least=float("-inf"), most=MOST_SECONDS) < 0:
            raise ValueError(f"time does not run backwards: advance({seconds})")
        self._now += round(seconds * 1e9)

    def wait_until(self, when: int) -> None:
        self._now = max(self._now, when)
