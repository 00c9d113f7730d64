"""A few threads for work that may take long: whoever waits for it waits for a limited time. Knows nothing of images.

A thread cannot be ended from outside. One that takes too long keeps its place until its function returns; when all
places are taken, others are told so. The threads are daemons, unlike those of concurrent.futures, which a process
waits for when it ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from labkit.images.limits import ImageError, ImagesBusy

T = TypeVar("T")


class Threads:
    """At most `num` functions at a time; a thread ends when nothing is left to do."""

    def __init__(self, num: int, name: str) -> None:
        self.num, self.name = num, name
        self.num_busy = 0
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Threads({self.name}: {self.num_busy} of {self.num} busy, {len(self.waiting)} waiting)"

    async def run(self, function: Callable[[], T], seconds: float, late: str) -> T:
        """What the function returns or raises. After so many seconds an ImageError says that it is `late`, or
        ImagesBusy that it has not begun."""
        future: Future[T] = Future()
        self._submit(future, function)
        waiter = asyncio.wrap_future(future)
        try:
            done, _ = await asyncio.wait([waiter], timeout=seconds)
            if done:
                return waiter.result()
            if self._withdraw(future):
                raise ImagesBusy("too many images are being read: try again later")
            raise ImageError(late)
        finally:
            self._withdraw(future)  # if whoever waits is cancelled
            waiter.cancel()  # nobody wants to hear of what comes late

    def _submit(self, future: Future[Any], function: Callable[[], Any]) -> None:
        with self.lock:
            self.waiting.append((future, function))
            if self.num_busy == self.num:
                return
            self.num_busy += 1
        threading.Thread(target=self._work, name=self.name, daemon=True).start()

    def _withdraw(self, future: Future[Any]) -> bool:
        """Whether it had not begun."""
        if not future.cancel():
            return False
        with self.lock:
            self.waiting = deque(one for one in self.waiting if one[0] is not future)
        return True

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    self.num_busy -= 1
                    return
                future, function = self.waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    found = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(found)
                    del found
            del future, function  # an image may be large
