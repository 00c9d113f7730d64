"""Reads a request's body within bounds, and writes answers: one JSON document, or a stream of server-sent events.

Both kinds of answer watch the connection: when the client is gone, the feed ends and its requests are aborted.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from labkit.server.bridge import Delta, Feed
from labkit.server.errors import ApiError, ClientGone, internal, of_validation

log = logging.getLogger("labkit.server")
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
NOTE = "labkit"  # the key in a request's scope of what the guard passes on and what the log says
LINE = "labkit.line"  # the key in a request's extensions of its connection, on our own server
SECONDS_TO_RECEIVE = 120.0  # a body
_CLOSED = 499  # as nginx logs it; nobody receives it


async def read_body(request: Request, model: type[M]) -> M:
    """The body as a request model, or an ApiError that names the field."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError("the body must be JSON: send Content-Type: application/json", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("compressed bodies are not accepted: send it without Content-Encoding", status=415)
    try:
        async with asyncio.timeout(SECONDS_TO_RECEIVE):
            body = await request.body()
    except TimeoutError:
        late = ApiError(f"the body did not arrive within {SECONDS_TO_RECEIVE:g} s", status=408)
        late.headers["Connection"] = "close"
        raise late from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error) from None


def answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content).encode(), status, headers, media_type="application/json")


def failed(error: BaseException) -> Response:
    """An error as a response."""
    if isinstance(error, ClientGone):
        return Response(status_code=_CLOSED)
    if not isinstance(error, ApiError):
        log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
        error = internal()
    return Failure(error)


class Failure(Response):
    """An error in the form of the API whose route was called. Notes why a request was refused."""

    def __init__(self, error: ApiError) -> None:
        self.error = error
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note, error = scope[NOTE], self.error
        note["refusal"] = error.refusal
        form = note.get("form")
        found = answer(error.body if form is None else form(error), error.status, error.headers)
        await found(scope, receive, send)


@contextmanager
def watched(feed: Feed, receive: Receive) -> Iterator[None]:
    """Fail the feed when its client goes away; close it in the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        feed.fail(ClientGone())

    task = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        task.cancel()
        feed.close()


async def whole(feed: Feed, receive: Receive, read: Callable[[], Awaitable[T]]) -> T:
    """Read an answer to its end while watching the connection."""
    with watched(feed, receive):
        return await read()


class EventStream(Response):
    """Server-sent events: `write` turns new tokens into events, `end` says what follows the last token, and `failed`
    how a stream ends that cannot go on. What fails before the first event has a status of its own.

    On labkit's own server the hub writes the events of most tokens straight to the connection (`Line`). This
    coroutine writes the first and the last ones, and all while the client reads slowly.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        feed: Feed,
        write: Callable[[list[Delta]], bytes],
        *,
        end: Callable[[], bytes] = lambda: DONE,
        failed: Callable[[ApiError], bytes] | None = None,
    ) -> None:
        self.feed, self.write, self.end = feed, write, end
        self.failed = failed if failed is not None else lambda error: event(error.body) + DONE
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        feed = self.feed
        with watched(feed, receive):
            try:
                chunk = await self._next()
            except Exception as error:  # whatever it was, the client gets a status for it
                await failed(error)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send = scope[NOTE]["send"]
            try:
                feed.write_to(scope.get("extensions", {}).get(LINE), self.write)
                while chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    chunk = await self._next()
                last = self.end()
            except ClientGone:
                scope[NOTE]["outcome"] = "the client left"
                last = b""
            except Exception as error:  # the status is sent already, so the stream ends with the error
                if not isinstance(error, ApiError):
                    log.error("a stream failed: %s: %s", type(error).__name__, error, exc_info=error)
                    error = internal()
                scope[NOTE]["outcome"] = f"failed: {error.status}"
                last = self.failed(error)
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _next(self) -> bytes:
        """The next events; nothing once all was told."""
        chunk = b""
        while not chunk and not self.feed.has_ended:
            chunk = self.write(await self.feed.read())
        return chunk


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
