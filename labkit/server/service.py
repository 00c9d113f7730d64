"""What the endpoints share: the engine, the model's names, its tokenizer, and the way in for requests.

An endpoint turns JSON into prompts and `SamplingParams`, calls `submit`, and reads the feed. It never touches the
scheduler.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from labkit.core.params import MOST_LOGPROBS, SamplingParams
from labkit.core.scheduling.scheduler import RejectedError
from labkit.engine.adapters import Adapters
from labkit.engine.defaults import sampling_defaults
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.images import ImageUrls
from labkit.server.background import Background
from labkit.server.bridge import Feed, Hub, is_alive
from labkit.server.counting import Calls, Counts
from labkit.server.errors import ApiError, clean, engine_dead, overloaded
from labkit.server.pieces import TokenTexts
from labkit.server.settings import Settings
from labkit.server.stored import Stored
from labkit.server.tracing import Tracing
from labkit.text.tokenizer import Tokenizer

SECONDS_TO_SEND = 3.0  # what is left of traces
SECONDS_TO_PAUSE = 2.0  # a step that takes longer ends after the server
TEMPLATES_AT_ONCE = 4  # chat templates that are rendered, each for seconds at most
UNNAMED = "labkit-tiny"  # the embedded model


class Counted(NamedTuple):
    """A model's name and what its engine has done."""

    name: str
    counts: Counts


class Service:
    """One engine behind a server. Without an engine it is loading, and answers 503."""

    def __init__(self, settings: Settings, engine: Any = None) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.num_open = 0  # requests being served
        self.is_stopping = False
        self._engine: Engine | None = None
        self._hubs: dict[asyncio.AbstractEventLoop, Hub] = {}
        self._started_here = False
        self.counted: list[Counted] = []  # for /metrics
        self.calls = Calls()
        self.tracing: Tracing | None = None
        if settings.otlp_traces_endpoint is not None:
            self.tracing = Tracing(settings.otlp_traces_endpoint)
        self.registry: Any = None  # of prometheus-client
        self.tokenizer: Any = None
        self.templates = _templates()
        self.image_urls = ImageUrls(
            local_path=settings.allowed_local_media_path, domains=settings.allowed_media_domains
        )
        self.num_pixels = 0  # of images whose prompts are being made
        self.stored = Stored(settings.max_stored_responses)
        self.background = Background()
        self.defaults: Mapping[str, Any] | None = None  # sampling parameters that the model recommends
        self.names: tuple[str, ...] = tuple(settings.served_model_name)
        if engine is not None:
            self.use(engine)

    def __repr__(self) -> str:
        return f"Service({', '.join(self.names) or 'loading'}: {self.num_open} open)"

    def use(self, engine: Any) -> None:
        """From here on, serve this `Engine` or `LLM`."""
        engine = getattr(engine, "engine", engine)
        if not isinstance(engine, Engine):
            raise TypeError(f"a server needs an Engine or an LLM, got {type(engine).__name__}")
        self.tokenizer = engine.tokenizer
        if self.settings.chat_template is not None and isinstance(self.tokenizer, Tokenizer):
            self.tokenizer = Tokenizer(self.tokenizer.backend, self.tokenizer.config, self.settings.chat_template)
        self.texts = TokenTexts(self.tokenizer)
        self.names = tuple(self.settings.served_model_name) or (engine.model_name or UNNAMED,)
        if self.defaults is None:
            self.defaults = sampling_defaults(engine.model_name)
        self._engine = engine
        if all(each.counts.engine is not engine for each in self.counted):
            self.counted.append(Counted(self.names[0], Counts(engine)))
            if self.tracing is not None:
                self.tracing.follow(self.counted[-1].counts, self.names[0])

    @property
    def name(self) -> str:
        """The model's first name; empty while it is being loaded under a name of its own."""
        return self.names[0] if self.names else ""

    @property
    def is_loaded(self) -> bool:
        return self._engine is not None

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters for requests that name none."""
        return {**(self.defaults or {}), **self.settings.default_sampling}

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise overloaded("the model is being loaded", 5, "loading")
        return self._engine

    @property
    def is_ready(self) -> bool:
        return self._engine is not None and is_alive(self._engine) and not self.is_stopping

    @property
    def is_dead(self) -> bool:
        return self._engine is not None and not is_alive(self._engine)

    @property
    def max_logprobs(self) -> int:
        """The most logprobs of a token; MOST_LOGPROBS if that is the whole vocabulary."""
        most = self.settings.max_logprobs
        return MOST_LOGPROBS if most >= self.engine.runner.vocab_size else most

    @property
    def room(self) -> int:
        """The most tokens of a request, prompt and answer together."""
        return self.engine.scheduler.room_for(0)

    def check_model(self, name: str | None) -> str:
        """The name to answer with."""
        _ = self.engine
        if not name:
            return self.names[0]
        if name not in self.names and name not in self.adapters:
            known = [*self.names, *self.adapters]
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            raise ApiError(
                f"the model {name[:200]!r} does not exist here; there is {', '.join(known[:20])}{more}",
                status=404,
                param="model",
            )
        return name

    def check_draws(self) -> None:
        """Refuse a call for text of a model that only pools."""
        spec = self.engine.pooling
        if spec is not None and not spec.generates:
            routes = "/classify, /score and /rerank" if spec.labels else "/v1/embeddings"
            raise ApiError(f"this model draws no tokens: it serves {routes} and /pooling", param="model")

    @property
    def adapters(self) -> Adapters:
        """The adapters of the engine, which are models to clients."""
        return self.engine.adapters

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a body's `model` names; None for the model itself."""
        return name if name and name not in self.names and name in self.adapters else None

    # -- one of several models: see several.py -------------------------------------------------------------------

    async def chosen(self, request: Any) -> Service:
        """The service of the model that a request names."""
        return self

    def of(self, name: str) -> Service:
        return self

    @property
    def services(self) -> list[Service]:
        """One for each model."""
        return [self]

    # -- the way in ----------------------------------------------------------------------------------------------

    def hub(self) -> Hub:
        """The hub of the running loop. The first one starts the engine's thread."""
        loop = asyncio.get_running_loop()
        hub = self._hubs.get(loop)
        if hub is None:
            if not self._hubs:
                self._started_here = self._started_here or not self.engine.is_running
                self.engine.start()  # also if it runs: a player then knows that it is not the only one
            hub = self._hubs[loop] = Hub(self.engine, loop, self.settings.stream_interval)
        return hub

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        ids: Sequence[str],
        priority: int = 0,
        salt: str | None = None,
        adapter: str | None = None,
        images: Sequence[Any] = (),
        **session: Any,
    ) -> Feed:
        """Submit prompts, or nothing if one of them cannot be served. The feed's members are the first prompt's
        samples, then the second's, and so on. `images` are those of the only prompt, `session` what is said of the
        session that all belong to."""
        engine = self.engine
        if self.is_stopping:
            raise overloaded("the server is shutting down", 5, "stopping")
        if self.is_dead:
            raise engine_dead()
        self.check_queue(sum(each.n for each in params))

        shared: dict[str, Any] = {"priority": priority, "salt": salt, "adapter": adapter, **session}

        def make() -> list[Handle]:
            made: list[Handle] = []
            try:
                for prompt, each, id in zip(prompts, params, ids, strict=True):
                    given = {"prompt_token_ids": prompt, "multi_modal_data": {"image": [*images]}}
                    made.append(engine.submit(given if images else prompt, each, id=id, **shared))
            except BaseException:
                for handle in made:
                    for member in (handle, *handle.samples):
                        engine.abort(member)
                raise
            return [member for handle in made for member in (handle, *handle.samples)]  # type: ignore[misc]

        try:
            return self.hub().submit(make)
        except RejectedError as error:
            if "queue is full" in str(error):
                raise overloaded("the queue is full: try again later") from None
            raise ApiError(clean(str(error))) from None

    @contextmanager
    def traced(self, ids: Sequence[str], headers: Mapping[str, str]) -> Iterator[None]:
        """Submit these requests inside, so that their traces continue the client's."""
        if self.tracing is None:
            yield
            return
        self.tracing.note(ids, headers)
        try:
            yield
        except BaseException:
            self.tracing.forget(ids)
            raise

    def check_queue(self, num_new: int) -> None:
        """Refuse a call that would wait for too long."""
        scheduler, most = self.engine.scheduler, self.settings.max_waiting
        if scheduler.max_waiting is not None:
            most = min(most, scheduler.max_waiting)
        if num_new > most:
            raise ApiError(f"a call may ask for at most {most} answers here, counting n for each prompt, got {num_new}")
        waiting = scheduler.num_waiting + len(self.engine.arriving)
        if waiting + num_new > most:
            raise overloaded(f"the queue is full: {waiting} requests wait")

    # -- the end -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Take no more requests."""
        self.is_stopping = True

    def end_all(self, message: str) -> None:
        """End every open request with an error. Called in the event loop."""
        for hub in self._hubs.values():
            hub.fail_all(ApiError(message, status=503))

    def close(self) -> None:
        for hub in self._hubs.values():
            hub.detach()
        self._hubs.clear()
        self._stop_counting()
        if self.tracing is not None:
            self.tracing.close(SECONDS_TO_SEND)
        if self._started_here and self._engine is not None and not self.is_dead:
            with suppress(TimeoutError, RuntimeError):  # RuntimeError: it dies now
                self._engine.pause(SECONDS_TO_PAUSE)
        self._started_here = False
        self.templates.shutdown(wait=False)
        self.templates = _templates()

    def _stop_counting(self) -> None:
        for each in self.counted:
            each.counts.stop()

    def close_engine(self, seconds: float) -> bool:
        """Whether its thread has ended within this time."""
        return self.engine.close(seconds).thread is None


def _templates() -> ThreadPoolExecutor:
    """Threads that render chat templates. These are programs over what clients send: other streams go on meanwhile, and
    what else runs beside the event loop (beam searches, for minutes) does not keep them waiting."""
    return ThreadPoolExecutor(TEMPLATES_AT_ONCE, "labkit-template")


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
