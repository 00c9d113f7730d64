"""The engine's events for one reader over HTTP: lines of JSON, the latest batches first, then each as it comes.

The engine's thread only appends batches to a bounded queue. A reader that is too slow for it is told, and has to begin
again.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable

from labkit.core.events.types import Batch, read
from labkit.server.service import Service

MOST_WAITING = 8192  # batches
SECONDS_BETWEEN_LINES = 1.0  # an empty line shows that the connection lives
LINES_AT_ONCE = 64  # batches that are written without a break for others


class Events:
    """One reader's queue."""

    def __init__(self, service: Service, num_batches: int) -> None:
        self.service, self.engine, self.num_batches = service, service.engine, num_batches
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Batch] = deque()
        self.trimmed = 0
        self.is_too_slow = False
        self._news = asyncio.Event()
        self._unsubscribe: Callable[[], None] = lambda: None

    async def open(self) -> None:
        """Take the latest batches, and subscribe to the next, with nothing between."""

        def begin() -> list[Batch]:
            log = self.engine.log
            log.post()
            self._unsubscribe = log.subscribe(self._on_batches)
            return log.batches()

        held = await asyncio.to_thread(lambda: self.engine.own_thread().call(begin))
        latest = held[max(0, len(held) - self.num_batches) :]
        self.trimmed = self.engine.log.num_trimmed + sum(len(batch.events) for batch in held[: len(held) - len(latest)])
        self.waiting.extendleft(reversed(latest))

    def _on_batches(self, batches: list[Batch]) -> None:
        """Called in the engine's thread."""
        if len(self.waiting) > MOST_WAITING + self.num_batches:
            self.is_too_slow = True
            self._unsubscribe()
        else:
            self.waiting.extend(batches)
        self.loop.call_soon_threadsafe(self._news.set)

    async def lines(self) -> AsyncIterator[bytes]:
        head = {"labkit_log": 1, "trimmed": self.trimmed, "block_size": self.engine.blocks.block_size}
        try:
            yield json.dumps(head).encode() + b"\n"
            while not self.service.is_stopping and not self.engine.is_closed:
                while self.waiting:
                    num = min(LINES_AT_ONCE, len(self.waiting))
                    taken = [self.waiting.popleft() for _ in range(num)]
                    yield b"".join(written(batch) for batch in taken)
                    if any(event[0] == "Rewound" for batch in taken for event in batch.events):
                        return
                if self.is_too_slow:
                    yield b'{"error": "events came faster than they were read: connect again"}\n'
                    return
                self._news.clear()
                if not self.waiting:
                    yield await self._wait()
        finally:
            self._unsubscribe()

    async def _wait(self) -> bytes:
        try:
            await asyncio.wait_for(self._news.wait(), SECONDS_BETWEEN_LINES)
        except TimeoutError:
            return b"\n"
        return b""


def written(batch: Batch) -> bytes:
    lines = [json.dumps({"event": type(one).__name__, **one.__dict__}, separators=(",", ":")) for one in read(batch)]
    return "".join(line + "\n" for line in lines).encode()
