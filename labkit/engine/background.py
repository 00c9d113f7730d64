"""The engine's background thread: steps while there is work, and runs calls that other threads make."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple, Self, TypeVar

from labkit.clock import Clock, WallClock
from labkit.core.request import Request, Status
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.closing import Held, held_memory
from labkit.engine.loop import Loop, StalledError, warn
from labkit.engine.worker import Worker
from labkit.runner.base import Runner

T = TypeVar("T")
MOST_FAILURES = 3  # steps in a row that may fail before the background thread ends its requests


class Ended(NamedTuple):
    """What closing has ended."""

    num_aborted: int
    memory: list[Held]  # should be free by now


class Background(Loop):
    """A loop that one worker thread may run."""

    def __init__(self, scheduler: Scheduler, runner: Runner, clock: Clock, worker: Worker | None) -> None:
        super().__init__(scheduler, runner, clock)
        self.worker = worker
        self.is_closed = False  # closed: nothing new may start
        self._ending: Future[Ended] | None = None
        self._num_failures = 0
        self.num_starts = 0  # how often `start` was called
        if worker is not None:
            self._finalizer = weakref.finalize(self, Worker.stop, worker, 5.0)

    def _call(self, function: Callable[[], T]) -> T:
        return function() if self.worker is None else self.worker.call(function)

    @property
    def _is_here(self) -> bool:
        return self.worker is None or self.worker.is_here

    @property
    def is_running(self) -> bool:
        """Whether a background thread steps this engine."""
        return self.worker is not None and self.worker.turn is not None and not self.worker.is_over

    def start(self) -> Self:
        """From here on, step in the background whenever there is work."""
        self._num_failures = 0
        self.num_starts += 1
        self.own_thread().set_turn(_turn_of(weakref.ref(self)))
        return self

    def own_thread(self) -> Worker:
        """From here on everything runs in one thread, whichever thread calls."""
        self._check_open()
        if self.worker is None:
            self.worker = Worker()
            self._finalizer = weakref.finalize(self, Worker.stop, self.worker, 5.0)
        return self.worker

    def pause(self, timeout: float | None = 60.0) -> Self:
        """Stop stepping after the current step; `start()` continues. Nothing is lost. A TimeoutError says that the step
        takes longer than `timeout` seconds: the engine then pauses when the step ends."""
        if self.worker is not None and self.is_running:
            try:
                self.worker.set_turn(None, timeout)
            except TimeoutError:
                raise TimeoutError(
                    f"the current step has not ended after {timeout:g} s; the engine pauses when it does"
                ) from None
            self.wakeup.ring()
        return self

    def resume(self) -> Self:
        """Go on after `pause()`: in the background if that is where it stepped, else when it is driven."""
        return self.start() if self.num_starts else self

    def _turn(self) -> float | None:
        """One step in the background. Returns the seconds until the next is due, None if the next call wakes it."""
        real_time = isinstance(self.clock, WallClock)
        try:
            outputs = self._step(patient=not real_time)
            self._num_failures = 0
        except StalledError as error:
            self._give_up([self.scheduler.queue.peek()] if self.scheduler.queue else self._live(), error)
            return 0.0
        except Exception as error:  # in the background nobody catches it: a warning, and another try
            self._num_failures += 1
            warn(f"a step failed: {type(error).__name__}: {error}")
            if self._num_failures >= MOST_FAILURES:
                self._give_up(self._live(), error)
                self._num_failures = 0
            return 0.0
        if outputs is not None:
            return 0.0
        if self._arrivals:
            return max(0.0, (self._arrivals[0][0] - self.clock.now()) / 1e9)
        return None

    def _live(self) -> list[Request]:
        return list(self.scheduler.requests.values())

    def _give_up(self, requests: list[Request], error: Exception) -> None:
        """Nobody steps a background engine by hand, so requests that cannot be served are ended, with the reason."""
        for request in requests:
            if not request.ended:
                request.error = f"{type(error).__name__}: {error}"
                self.scheduler.abort(request.id, self.clock.now())
        with suppress(Warning):  # of a subscriber that fails, where warnings are errors
            self.log.post()
        self.wakeup.ring()

    def _die(self, error: BaseException) -> None:
        """The thread ends. Nobody will serve what is left, so those who wait for it are told."""
        for request in [*self.arriving.values(), *self._live()]:
            if not request.ended:
                request.status, request.finish_reason = Status.ABORTED, "abort"
                request.error = f"the engine's thread ended with {error!r}"
        self.wakeup.ring()

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("this engine is closed: make another one")
        if self.worker is not None and self.worker.is_over:
            raise RuntimeError(self.worker.why_over)

    def _wait_for_end(self, timeout: float) -> Ended:
        """End everything, or as much as there is after so many seconds."""
        if self._ending is None:
            self._ending = self._begin_end()
        try:
            return self._ending.result(timeout)
        except TimeoutError:
            return Ended(0, held_memory(self.runner))
        except RuntimeError:
            if self.worker is None or not self.worker.is_over:
                raise
            self._ending = self._begin_end()  # the thread died before it came to it
            return self._ending.result()

    def _begin_end(self) -> Future[Ended]:
        """Let the thread end everything. If there is none, or it has died, it is done here."""
        if self.worker is not None and not self.worker.is_here and not self.worker.is_over:
            return self.worker.submit(self._end)
        future: Future[Ended] = Future()
        future.set_result(self._end())
        return future

    def _end(self) -> Ended:
        if self.worker is not None:
            self.worker.turn = None
        aborted = self._end_all()
        try:
            self._spill()
        except Exception as error:  # an engine closes with a full disk, too
            warn(f"the prefix cache was not written to disk: {error}")
        memory = held_memory(self.runner)
        if (close := getattr(self.runner, "close", None)) is not None:
            close()
        return Ended(aborted, memory)

    def _end_all(self) -> int:
        live = [*self.arriving.values(), *self._live()]
        for request in live:
            self._abort(request)  # type: ignore[arg-type]
        while self.in_flight:
            try:
                self._commit()
            except Exception as error:  # an engine closes after a failed step, too
                warn(f"the last step failed: {error}")
        return len(live)


def _turn_of(engine: weakref.ref[Background]) -> Callable[[], float | None]:
    """A turn that does not keep the engine alive: a worker must not hold a reference to its engine."""

    def turn() -> float | None:
        here = engine()
        if here is None:
            return None
        try:
            return here._turn()
        except BaseException as error:
            here._die(error)
            raise

    return turn
