"""A worker thread with an inbox of callables.

All torch and OpenMP work of an engine runs in one such thread, loading included: a second thread that uses OpenMP costs
a fifth of the speed on a CPU.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Turn = Callable[[], float | None]  # does some work; returns seconds until the next turn, None: after the next call

Inbox: TypeAlias = "queue.SimpleQueue[tuple[Future[Any] | None, Callable[[], Any]] | None]"

_numbers = itertools.count(1)


class Worker:
    """Runs submitted calls in order. Between them it calls `turn` repeatedly, as long as one is set."""

    def __init__(self, inbox: Inbox | None = None) -> None:
        self.inbox: Inbox = queue.SimpleQueue() if inbox is None else inbox
        self.turn: Turn | None = None
        self.is_over = False
        self.failure: str | None = None  # what a turn raised, which ended the thread
        self.thread = threading.Thread(target=self._run, name=f"labkit-engine-{next(_numbers)}", daemon=True)
        self.thread.start()

    def __repr__(self) -> str:
        state = "stopped" if not self.thread.is_alive() else "running" if self.turn else "waiting"
        return f"Worker({self.thread.name}, {state})"

    @property
    def is_here(self) -> bool:
        """Whether the caller is this worker's own thread."""
        return threading.current_thread() is self.thread

    def call(self, function: Callable[[], T], timeout: float | None = None) -> T:
        """Run a function in the worker thread and wait for its result. Ctrl-C and a TimeoutError end the waiting, not
        the work."""
        return function() if self.is_here else self.submit(function).result(timeout)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the worker thread; the future has its result."""
        future: Future[T] = Future()
        self.inbox.put((future, function))
        if self.is_over:
            self._refuse_rest()
        return future

    def post(self, function: Callable[[], Any]) -> None:
        """Run a function in the worker thread later, without waiting."""
        self.inbox.put((None, function))

    def set_turn(self, turn: Turn | None, timeout: float | None = None) -> None:
        def change() -> None:
            self.turn = turn

        self.call(change, timeout)

    def stop(self, timeout: float = 60.0) -> bool:
        """Finish all submitted calls and end the thread. True if the thread has ended."""
        if self.thread.is_alive() and not self.is_here:
            self.inbox.put(None)
            self.thread.join(timeout)
        return not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.failure = repr(error)
            raise
        finally:
            self.is_over = True
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        """Nobody runs what is still in the inbox: its callers must not wait for it."""
        while True:
            try:
                asked = self.inbox.get_nowait()
            except queue.Empty:
                return
            if asked is not None and asked[0] is not None:
                asked[0].set_exception(RuntimeError(self.why_over))

    @property
    def why_over(self) -> str:
        if self.failure is None:
            return "this engine is closed"
        return f"this engine has stopped, its thread ended with {self.failure}: close it and make another one"

    def _serve(self) -> None:
        pause: float | None = None
        while True:
            try:
                asked = self.inbox.get(block=pause is None or pause > 0, timeout=pause)
            except queue.Empty:
                pause = self._take_turn()
                continue
            if asked is None:
                self.turn = None
                return
            future, function = asked
            del asked
            try:
                given = function()
                if future is not None:
                    future.set_result(given)
            except BaseException as error:  # any exception goes to the caller
                if future is not None:
                    future.set_exception(error)
            del future, function
            given = None
            pause = 0.0 if self.turn is not None else None

    def _take_turn(self) -> float | None:
        return self.turn() if self.turn is not None else None
