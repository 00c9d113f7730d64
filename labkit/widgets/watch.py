"""`watch(url)`: the dashboard over a server. Polls /metrics, or follows labkit's stream of events where it is open.

Knows HTTP and the two feeds. The threads here only fetch; drawing is the dashboard's.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from html import escape
from typing import Any, Protocol

from labkit.core.events.log import EventLog
from labkit.core.events.types import parse
from labkit.core.events.why import Why
from labkit.core.frames import table
from labkit.core.options import real
from labkit.widgets.dashboard import MOST_STEPS, Dashboard
from labkit.widgets.feed import COLUMNS, Feed
from labkit.widgets.polled import PolledFeed
from labkit.widgets.scrape import MOST_BYTES, poll_of
from labkit.widgets.style import STYLE

SECONDS_TO_ANSWER = 10.0
CLOSED = (401, 403, 404, 405)  # a server without this route, or without this key


class Source(Protocol):
    """Fetches from a server into a feed until it is closed."""

    feed: Any
    log: EventLog

    def html(self) -> str: ...
    def close(self) -> None: ...


class _Fetching:
    """A thread that fetches, and says how that goes."""

    def __init__(self, server: _Server, log: EventLog, feed: Any) -> None:
        self.server, self.log, self.feed = server, log, feed
        self.state = "connecting"
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="labkit-watch", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def _run(self) -> None:
        raise NotImplementedError

    def html(self) -> str:
        told = f"{escape(self.server.url)} \u00b7 {escape(self.state)}"
        return f'<div class="lk wide"><style>{STYLE}</style><span class="q">{told}</span></div>'

    def close(self) -> None:
        self.ended.set()
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(SECONDS_TO_ANSWER)


class Polling(_Fetching):
    """Asks for /metrics every `every` seconds."""

    def __init__(self, server: _Server, every: float, model: str | None) -> None:
        super().__init__(server, EventLog(), PolledFeed())
        self.every, self.model = every, model
        self._begin = time.perf_counter_ns()
        self.poll()

    def poll(self) -> None:
        with self.server.open("/metrics") as answer:
            text = answer.read(MOST_BYTES).decode("utf-8", "replace")
        poll = poll_of(text, time.perf_counter_ns() - self._begin, self.model)
        if not poll.gauges and not poll.counters:
            raise ValueError(f"{self.server.url}/metrics has none of vLLM's metrics")
        self.feed.inbox.append(poll)
        self.state = f"{', '.join(poll.models) or 'no model named'}, polled every {self.every:g} s"

    def _run(self) -> None:
        while not self.ended.wait(self.every):
            try:
                self.poll()
            except (OSError, ValueError) as error:
                self.state = f"no answer: {error}"


class Following(_Fetching):
    """Reads the stream of events into a log of its own, and connects again when it breaks."""

    def __init__(self, server: _Server) -> None:
        log = EventLog()
        super().__init__(server, log, Feed(log, keep=MOST_STEPS))
        self._answer: Any = server.open("/events")
        self._moment: tuple[int, int] | None = None

    def _run(self) -> None:
        while not self.ended.is_set():
            try:
                with self._answer:
                    self.state = "follows its events"
                    for line in self._lines():
                        self._take(line)
            except (OSError, ValueError, AttributeError) as error:  # http.client's, when closed while it reads
                self.state = f"the stream ended: {error}"
            if not self.ended.wait(0.5):
                self._again()

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self._answer:
            if self.ended.is_set():
                return
            if line.strip():
                yield json.loads(line)
            else:
                self._flush()

    def _again(self) -> None:
        try:
            self._answer = self.server.open("/events")
        except OSError as error:
            self.state = f"no answer: {error}"
            return
        self.log.rewind(self.log.num_trimmed)  # the server sends the latest events once more
        self._moment = None

    def _take(self, record: dict[str, Any]) -> None:
        if "labkit_log" in record:
            self.feed.block_size = int(record.get("block_size", 16))
            return
        if "error" in record and "event" not in record:
            raise ValueError(str(record["error"]))
        step, now, event = parse(record)
        if self._moment is not None and self._moment != (step, now):
            self._flush()
        self._moment = (step, now)
        if event[0] == "Step":
            self.log.flush(step, now, event[1:])
            self._moment = None
            self.log.post()
        elif event[0] != "Rewound":  # the stream ends there, and begins again
            self.log.add(event)

    def _flush(self) -> None:
        if self._moment is not None:
            self.log.flush(*self._moment)
            self._moment = None
            self.log.post()

    def close(self) -> None:
        self.ended.set()
        super().close()


class _Server:
    """An address and a key."""

    def __init__(self, url: str, key: str | None) -> None:
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ValueError(f"url is a server's address, such as http://127.0.0.1:8000, got {url!r}")
        self.url = url.rstrip("/").removesuffix("/metrics").removesuffix("/v1").rstrip("/")
        self.key = key

    def open(self, path: str) -> Any:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        asked = urllib.request.Request(self.url + path, headers=headers)
        return urllib.request.urlopen(asked, timeout=SECONDS_TO_ANSWER)


class Watch(Dashboard):
    """What `labkit.watch` returns: a dashboard that follows a server. With events it also has block tables, a timeline
    and `why(request)`."""

    def __init__(self, source: Any) -> None:
        self.source = source
        super().__init__(source.log, feed=source.feed, machine=source)
        source.start()

    def __repr__(self) -> str:
        return f"Watch({self.source.server.url}: {'closed' if self.closed else self.source.state})"

    @property
    def has_events(self) -> bool:
        return isinstance(self.source, Following)

    def why(self, request: str) -> Why:
        """Why a request waited: the id of an answer is the id of its request."""
        if not self.has_events:
            raise RuntimeError(
                "metrics do not say why a request waited: start labkit with --enable-admin, and give admin_key= if it "
                "has one"
            )
        return self.log.why(request)

    def frame(self) -> Any:
        """The steps as a DataFrame; without events, the polls."""
        if self.has_events:
            return super().frame()
        lines = [[line["now"] / 1e9, *(line.get(name, 0.0) for name in COLUMNS)] for line in self.feed._lines]
        return table(lines, ["time", *COLUMNS])

    def close(self) -> None:
        self.source.close()
        super().close()


def watch(
    url: str,
    *,
    api_key: str | None = None,
    admin_key: str | None = None,
    every: float = 0.5,
    model: str | None = None,
    events: bool | None = None,
) -> Watch:
    """A dashboard over a running server: labkit, vLLM, or any other with vLLM's /metrics. It shows KV cache use,
    running and waiting requests, tokens a second, and percentiles of the time to first token and between tokens.

    Over a labkit server that was started with --enable-admin (or --admin-key) it follows the engine's events, and shows
    what `engine.dashboard()` shows. `events=False` polls metrics there too, `events=True` insists on events. `model`
    picks one of several models. Needs labkit[lab].

    >>> live = watch("http://127.0.0.1:8000")
    >>> live.close()
    """
    real("every", every, least=0.05, most=3600.0)
    if model is not None and events:
        raise ValueError("model= picks metrics; events are those of the whole engine")
    if events is not False and model is None:
        try:
            return Watch(Following(_Server(url, admin_key or api_key)))
        except urllib.error.HTTPError as error:
            error.close()
            if events or error.code not in CLOSED:
                raise RuntimeError(f"{url}: no events: {error.reason} ({error.code})") from None
    return Watch(Polling(_Server(url, api_key), every, model))
