"""From the engine's thread to an event loop: one call per step for all streams of the loop, however many there are.

Knows token ids and requests. Knows nothing of text or HTTP. A thread-safe call per token would cost more than the step.
Tokens wait in a list of integers until their reader comes for them, so a slow reader gets several at once, and its
memory is bounded by the length of its answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np

from labkit.core.blocks.tables import Tokens
from labkit.core.plan import Outputs
from labkit.core.request import Status
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.server.errors import ApiError

SECONDS_BETWEEN_LOOKS = 0.25  # at whether the engine's thread is alive


class Delta(NamedTuple):
    """What is new of the nth request of a feed: tokens, and whether it has ended."""

    nth: int
    tokens: list[int]
    ended: bool


class News(NamedTuple):
    """What one step brought, or the requests that ended without a step."""

    serials: Sequence[int] | Tokens
    tokens: Sequence[int] | Tokens
    ended: Sequence[Handle]


class Member:
    """One request of a feed."""

    __slots__ = ("ended", "feed", "handle", "index", "num_seen", "tokens")

    def __init__(self, feed: Feed, index: int, handle: Handle) -> None:
        self.feed, self.index, self.handle = feed, index, handle
        self.tokens: list[int] = []  # not read yet
        self.num_seen = 0  # tokens that arrived here
        self.ended = False


class Line(Protocol):
    """A connection that takes chunks of an answer without waiting."""

    @property
    def is_free(self) -> bool:
        """Whether everything written before has left, and the client is there."""

    @staticmethod
    def write_all(chunks: Sequence[tuple[Any, bytes]], /) -> None:
        """Write to several lines, which are free."""


class Feed:
    """The tokens of some requests for one reader in the event loop. Closing it aborts what has not ended.

    Waking a reader for every token is dear. After `write_to(line, write)` it is woken only for an end, for an error,
    and while the line is not free. Other tokens go through `write` to the line.
    """

    def __init__(self, hub: Hub, handles: Sequence[Handle]) -> None:
        self.hub = hub
        self.members = [Member(self, i, handle) for i, handle in enumerate(handles)]
        self.news: dict[int, Member] = {}  # by index
        self.num_open = len(handles)
        self.error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._line: Line | None = None
        self._write: Callable[[list[Delta]], bytes]
        hub.add(self)

    async def read(self) -> list[Delta]:
        """Wait until there is something new, and take it. Raises what `fail` was called with."""
        while not self.news and self.error is None:
            self._waiter = self.hub.loop.create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        return self._take()

    def _take(self) -> list[Delta]:
        found = []
        for member in self.news.values():
            found.append(Delta(member.index, member.tokens, member.ended))
            member.tokens = []
        self.news = {}
        return found

    def write_to(self, line: Line | None, write: Callable[[list[Delta]], bytes]) -> None:
        """From here on, write to the line while the reader waits."""
        self._line, self._write = line, write

    def deliver(self, is_plain: bool) -> tuple[Line, bytes] | None:
        """There is something new: return what to write to the line, or wake the reader."""
        line, waiter = self._line, self._waiter
        if waiter is None or waiter.done():
            return None
        if line is None or not is_plain or self.error is not None or not line.is_free:
            waiter.set_result(None)
            return None
        try:
            chunk = self._write(self._take())
        except Exception as error:  # the engine's thread goes on; the reader raises it
            self.fail(error)
            return None
        return (line, chunk) if chunk else None

    @property
    def has_ended(self) -> bool:
        """Whether everything was read."""
        return not self.num_open and not self.news

    def fail(self, error: BaseException) -> None:
        """End the reading with an error; the reader closes the feed."""
        if self.error is None:
            self.error = error
            self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        self.hub.remove(self)


class Hub:
    """All feeds of one event loop. After the first token, readers are woken for `interval` tokens of a request."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, interval: int = 1) -> None:
        self.engine, self.loop, self.interval = engine, loop, interval
        self.members: dict[str, Member] = {}  # live ones by request id
        self.by_serial: dict[int, Member] = {}
        self.fresh: list[Member] = []  # those that the scheduler has not numbered yet
        self.news: deque[News] = deque()
        self.is_posted = False
        self.is_submitting = False  # what a step brings meanwhile is kept until the new requests are known here
        self._stepped = False
        self._looking = False
        self._unlisten = engine.listen(self._on_outputs)
        engine.wakeup.hooks.append(self._on_ring)

    def __repr__(self) -> str:
        return f"Hub({len(self.members)} requests)"

    @property
    def feeds(self) -> list[Feed]:
        return list(dict.fromkeys(member.feed for member in self.members.values()))

    # -- in the engine's thread ----------------------------------------------------------------------------------

    def _on_outputs(self, outputs: Outputs) -> None:
        self._stepped = True
        if self.members or self.is_submitting:
            self._post(News(outputs.serials, outputs.tokens, outputs.ended))  # type: ignore[arg-type]

    def _on_ring(self) -> None:
        """After a step its outputs have said all. Otherwise requests were aborted or rejected, or the engine was
        rewound or closed."""
        if self._stepped:
            self._stepped = False
            return
        self._scan()

    def _scan(self) -> None:
        members = list(self.members.values())
        ended = [member.handle for member in members if member.handle.ended or _is_rewound(member)]
        if ended:
            self._post(News((), (), ended))

    def _post(self, news: News) -> None:
        self.news.append(news)
        if not self.is_posted:
            self.is_posted = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop was closed without stopping the server
                self.detach()

    # -- in the event loop ---------------------------------------------------------------------------------------

    def submit(self, make: Callable[[], list[Handle]]) -> Feed:
        """Call `make`, which submits requests, and return their feed."""
        self.is_submitting = True
        try:
            return Feed(self, make())
        finally:
            self.is_submitting = False

    def add(self, feed: Feed) -> None:
        for member in feed.members:
            self.members[member.handle.id] = member
        self.fresh += feed.members
        if any(member.handle.ended for member in feed.members):  # before anyone listened
            self.engine.own_thread().post(self._scan)
        if not self._looking:
            self._looking = True
            self.loop.call_later(SECONDS_BETWEEN_LOOKS, self._look)

    def remove(self, feed: Feed) -> None:
        live = [member for member in feed.members if self.members.pop(member.handle.id, None) is not None]
        for member in live:
            self.by_serial.pop(member.handle.serial, None)
        if self.fresh and live:
            self.fresh = [member for member in self.fresh if member.feed is not feed]
        with suppress(RuntimeError):  # the engine's thread has died, or it was closed
            for member in live:
                if not member.handle.ended:
                    self.engine.abort(member.handle)

    def _deliver(self) -> None:
        self.is_posted = False
        woken: dict[Feed, bool] = {}  # and whether there is nothing but tokens
        while self.news:
            serials, tokens, ended = self.news.popleft()
            if self.fresh:
                self._learn_serials()
            find = self.by_serial.get
            for serial, token in zip(np.asarray(serials).tolist(), np.asarray(tokens).tolist(), strict=True):
                member = find(serial)
                if member is not None:
                    member.tokens.append(token)
                    member.num_seen += 1
                    if len(member.tokens) >= self.interval or member.num_seen == 1:
                        feed = member.feed
                        feed.news[member.index] = member
                        woken.setdefault(feed, True)
            for handle in ended:
                if (over := self._end(handle)) is not None:
                    woken[over] = False
        chunks = [found for feed, is_plain in woken.items() if (found := feed.deliver(is_plain)) is not None]
        if chunks:
            chunks[0][0].write_all(chunks)

    def _end(self, handle: Handle) -> Feed | None:
        member = self.members.pop(handle.id, None)
        if member is None or member.handle is not handle:
            return None
        self.by_serial.pop(handle.serial, None)
        member.ended = True
        feed = member.feed
        feed.num_open -= 1
        feed.news[member.index] = member
        if handle.status is Status.REWOUND or not handle.ended:
            feed.fail(ApiError("the engine went back to an earlier state, without this request", status=503))
            if not handle.ended:
                self.engine.abort(handle)
        return feed

    def _learn_serials(self) -> None:
        """The scheduler numbers a request before its first output."""
        staying = []
        for member in self.fresh:
            if member.handle.serial >= 0:
                self.by_serial[member.handle.serial] = member
            else:
                staying.append(member)
        self.fresh = staying

    def _look(self) -> None:
        """A thread that has died posts nothing, so look from here for as long as someone waits."""
        self._looking = False
        if not self.members:
            return
        if not is_alive(self.engine):
            self.fail_all(ApiError("the engine has stopped", status=503))
            return
        self._looking = True
        self.loop.call_later(SECONDS_BETWEEN_LOOKS, self._look)

    def fail_all(self, error: ApiError) -> None:
        for feed in self.feeds:
            feed.fail(error)

    def detach(self) -> None:
        self._unlisten()
        if self._on_ring in self.engine.wakeup.hooks:
            self.engine.wakeup.hooks.remove(self._on_ring)


def _is_rewound(member: Member) -> bool:
    return member.handle.num_output < member.num_seen


def is_alive(engine: Engine) -> bool:
    """Whether the engine can serve: it is open, and its thread, if it has one, lives."""
    return not engine.is_closed and (engine.worker is None or not engine.worker.is_over)
