"""Answers that are made while no client waits. Knows feeds and tasks, not what an answer looks like."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from labkit.server.bridge import Feed
from labkit.server.errors import ClientGone


class _Open(NamedTuple):
    feed: Feed
    task: asyncio.Task[None]


class Background:
    """Answers in the making, by id. Each ends by itself, by `stop`, or with the engine."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    def __repr__(self) -> str:
        return f"Background({len(self._open)} answers)"

    def __contains__(self, id: str) -> bool:
        return id in self._open

    def start(self, id: str, feed: Feed, make: Callable[[], Awaitable[None]]) -> None:
        """Call `make`, which reads the feed and keeps the answer."""
        self._open[id] = _Open(feed, asyncio.ensure_future(self._run(id, feed, make)))

    async def _run(self, id: str, feed: Feed, make: Callable[[], Awaitable[None]]) -> None:
        try:
            await make()
        finally:
            feed.close()
            del self._open[id]

    def status(self, id: str) -> str:
        """`queued` until the first token is being computed."""
        return "queued" if self._open[id].feed.members[0].handle.admitted_at is None else "in_progress"

    async def stop(self, id: str) -> None:
        """Abort an answer, and wait until it is over."""
        if id in self._open:
            feed, task = self._open[id]
            feed.fail(ClientGone())
            await task
