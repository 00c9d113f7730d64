"""Runs the application: uvicorn with bounded headers and an orderly end, in this thread or in one of its own.

Stopping: no new connections, then up to `shutdown_timeout` seconds for what runs, then an error event to what is left.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from labkit.core.shown import Shown
from labkit.engine.engine import Engine
from labkit.server.app import make_app
from labkit.server.http import LINE
from labkit.server.sending import Connection, library
from labkit.server.service import Service
from labkit.server.settings import Settings
from labkit.server.several import service_of

MOST_HEADER_BYTES = 65536
SECONDS_FOR_HEADERS = 30.0
LAST_SECONDS = 5  # for connections to close once their streams were ended
log = logging.getLogger("labkit.server")


class Bounded(HttpToolsProtocol):
    """HTTP/1.1 with an upper bound on the bytes and the seconds of a request's line and headers."""

    num_header_bytes = 0
    in_headers = True
    _too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self._too_slow is None:
            self._too_slow = self.loop.call_later(SECONDS_FOR_HEADERS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None

    def on_message_begin(self) -> None:
        self.in_headers = True
        self._await_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.num_header_bytes, self.in_headers = 0, False
        self._stop_waiting()
        super().on_headers_complete()
        if self.cycle is not None:
            line = Connection(self.cycle, self.transport)
            self.scope["extensions"] = {LINE: line}  # type: ignore[dict-item]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_headers:
            self.num_header_bytes += len(data)
            if self.num_header_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("the headers are too large")


class Serving(uvicorn.Server):
    """A uvicorn server that loads an engine while it listens, drains, and ends with the engine."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.load: Callable[[], Engine] | None = None  # called in a thread once the server listens
        self.on_ready: Callable[[Engine], None] = lambda engine: None
        self.failure: BaseException | None = None  # of loading
        self.seconds_to_end: float | None = None  # for what runs, instead of shutdown_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        library()  # is built the first time
        await super().startup(sockets)
        if not self.started:
            return
        if self.load is None:
            self.service.hub()  # starts the engine
            self.on_ready(self.service.engine)
        else:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._load, args=(loop,), name="labkit-load", daemon=True).start()

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self.load is not None
        try:
            engine = self.load()
        except BaseException as error:
            self.failure, self.should_exit = error, True
            return
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._use, engine)

    def _use(self, engine: Engine) -> None:
        self.service.use(engine)
        self.service.hub()
        self.on_ready(engine)

    async def on_tick(self, counter: int) -> bool:
        if self.service.is_dead and not self.should_exit:
            log.error("the engine has stopped, and so does the server")
            self.service.end_all("the engine has stopped")
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.stop()
        seconds = self.service.settings.shutdown_timeout if self.seconds_to_end is None else self.seconds_to_end
        if self.service.is_dead:
            seconds = 0.0
        self.config.timeout_graceful_shutdown = int(seconds) + LAST_SECONDS
        if self.service.num_open:
            log.info("shutting down: %d requests have %g s to end", self.service.num_open, seconds)
        end = asyncio.get_running_loop().call_later(seconds, self.service.end_all, "the server is shutting down")
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for an orderly end, after which the process has its own exit status."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def configure(app: Starlette, service: Service, **options: Any) -> uvicorn.Config:
    """uvicorn's settings. Its access log is off: the guard writes one line for each request, with its id.

    asyncio's own loop, because it releases the interpreter while it writes to a socket; uvloop does not, and the
    engine's thread waits meanwhile. Of 64 streams of the embedded model on two cores: 10% below the engine alone, with
    uvloop 17%.
    """
    given = {"log_config": None, "access_log": False, "server_header": False, "ws": "none", "lifespan": "on"}
    return uvicorn.Config(
        app, http=Bounded, loop="asyncio", proxy_headers=False,
        **given | options,
    )  # fmt: skip


class Server(Shown):
    """A running server on a thread of its own. `url` is its address, `stop()` ends it.

    >>> import labkit as lk
    >>> server = lk.serve(lk.Engine(num_blocks=256))
    >>> server.url
    'http://127.0.0.1:43211'
    >>> server.stop()
    """

    def __init__(self, service: Service, engine: Engine, host: str, port: int, owns_engine: bool) -> None:
        self.service, self.engine, self._owns_engine = service, engine, owns_engine
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._socket = bind(host, port)
        self.host, self.port = host, self._socket.getsockname()[1]
        config = configure(make_app(service), service)
        self._serving = Serving(config, service)
        self._serving.on_ready = lambda engine: self._ready.set()
        self.thread = threading.Thread(target=self._run, name=f"labkit-server-{self.port}", daemon=True)
        self.thread.start()
        self._ready.wait()
        if self._error is not None:
            raise RuntimeError(f"the server did not start: {self._error}") from self._error

    def _run(self) -> None:
        try:
            self._serving.run(sockets=[self._socket])
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names that requests may use as `model`."""
        return self.service.names

    @property
    def num_open(self) -> int:
        """Requests being served."""
        return self.service.num_open

    @property
    def is_running(self) -> bool:
        return self.thread.is_alive()

    def __repr__(self) -> str:
        state = f"{self.num_open} open" if self.is_running else "stopped"
        return f"Server({self.url}: {', '.join(self.names)}, {state})"

    def stop(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait up to `timeout` seconds (by default the server's shutdown_timeout) for those
        that run. The engine stays open, unless the server made it."""
        self._serving.seconds_to_end = timeout
        self._serving.should_exit = True
        self.thread.join()
        if self._owns_engine:
            self.engine.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def start(engine: Any, *, host: str, port: int, **settings: Any) -> Server:
    made = Settings(**settings)
    owns = engine is None or isinstance(engine, str)
    engine = Engine(engine) if owns else getattr(engine, "engine", engine)
    return Server(service_of(made, engine), engine, host, port, owns)


def bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends small chunks of TCP at once
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return found
