"""What stands before every route: keys, the size of bodies, a request id, and a line of log when an answer is over.

Plain ASGI, so that streams pass through untouched. Decides on `scope["path"]`, which is what is routed; everything
needs a key but the paths in `OPEN`.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labkit.server.admin import PATHS
from labkit.server.errors import ApiError
from labkit.server.http import NOTE, failed
from labkit.server.service import Service
from labkit.server.settings import hash_of

OPEN = ("/health", "/ping")
QUIET = ("/health", "/ping", "/metrics", "/load")  # asked for every few seconds
SAFE_ID = re.compile(rb"[\w.:-]{1,128}")
log = logging.getLogger("labkit.server")


class Guard:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, service: Service, forms: Mapping[str, Any]) -> None:
        self.app, self.service, self.forms = app, service, forms
        self.hashes = service.settings.key_hashes
        self.admin_hashes = service.settings.admin_hashes
        self.root = service.settings.root_path.rstrip("/")
        self.open = frozenset((*OPEN, *(self.root + path for path in OPEN)))
        self.admin = frozenset((*PATHS, *(self.root + path for path in PATHS)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root:  # routes answer with and without it, as a proxy may strip it or not
            scope["root_path"] = self.root
        state: dict[str, Any] = {}  # of this request alone: a server may share scope["state"]
        scope[NOTE] = state
        state["form"] = self.forms.get(scope["path"].removeprefix(self.root))  # of errors
        state["send"] = send  # for streams: past the layers between, which cost more than the writing
        begin, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if (id := self._shown_id(scope, state)) is not None:
                    message["headers"] = [*message["headers"], (b"x-request-id", id)]
                state["first"] = time.perf_counter() - begin
            await send(message)

        self.service.num_open += 1
        try:
            try:
                self._check(scope)
                await self.app(scope, self._bounded(receive), sending)
            except ApiError as error:
                if status:
                    raise
                await failed(error)(scope, receive, sending)
        finally:
            self.service.num_open -= 1
            seconds = time.perf_counter() - begin
            self.service.calls.add(scope["method"], state.get("route", "none"), status or 499, seconds)
            if state.get("refusal") and scope["method"] == "POST" and scope["path"] not in self.open:
                self.service.calls.refused[state.get("model", self.service.name), state["refusal"]] += 1
            self._log(scope, status, seconds, state)

    def _shown_id(self, scope: Scope, state: dict[str, Any]) -> bytes | None:
        """The id in an answer's header: of its request in the engine, or with `request_id_headers` the client's own."""
        if not self.service.settings.request_id_headers:
            return state["id"].encode() if "id" in state else None
        given: bytes = dict(scope["headers"]).get(b"x-request-id", b"")
        return given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex.encode()

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        known = self.admin_hashes if self.admin_hashes and scope["path"] in self.admin else self.hashes
        if known and scope["path"] not in self.open:
            given = hash_of(_key(headers))
            fits = [hmac.compare_digest(given, one) for one in known]  # all, so that it takes equally long
            if not any(fits):
                raise ApiError("send the server's API key: Authorization: Bearer KEY", status=401)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.service.settings.max_body:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Counts what arrives; a body in chunks names no length."""
        left = self.service.settings.max_body

        async def counting() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return counting

    def _too_large(self) -> ApiError:
        return ApiError(f"the body is larger than {self.service.settings.max_body} bytes", status=413)

    def _log(self, scope: Scope, status: int, seconds: float, state: dict[str, Any]) -> None:
        if not self.service.settings.log_requests or (scope["path"] in QUIET and status < 400):
            return
        prompt, output = state.get("tokens", (None, None))
        client = scope.get("client")
        told = [
            state.get("id", "-"),
            client[0] if client else "-",
            f"{scope['method']} {scope['path'][:200]!r}",
            str(status or 499),
        ]
        if prompt is not None:
            told.append(f"{prompt}+{output} tokens")
        told.append(f"{seconds:.3f} s (first byte {state.get('first', seconds):.3f} s)")
        if "outcome" in state:
            told.append(state["outcome"])
        log.info(" ".join(told))


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()
