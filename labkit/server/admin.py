"""Routes for the person who runs the server: pause, sleep, other weights, the prefix cache, and the stream of the
engine's events.

They exist only where the server was started with `enable_admin`; then with `admin_key` they need that key. Of several
models they act on all, or on the one that `?model=NAME` names. Events hold the token ids of prompts. Weights are read
from folders below `model_root` only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from labkit.core.blocks.sessions import Hint, UnknownSessionError
from labkit.engine.sleeping import Slept
from labkit.server.errors import ApiError, clean
from labkit.server.events import Events
from labkit.server.folders import below
from labkit.server.http import answer, read_body
from labkit.server.routes import Route
from labkit.server.sampling import SessionHint, SessionName
from labkit.server.service import Service

MODES = ("abort", "wait", "keep")
MOST_BATCHES = 100_000
T = TypeVar("T")


async def apart(function: Callable[[], T]) -> T:
    """Call a method of the engine that waits for its step, without holding up the event loop."""
    try:
        return await asyncio.to_thread(function)
    except (ValueError, RuntimeError) as error:
        raise ApiError(str(error), status=400 if isinstance(error, ValueError) else 409) from None


def chosen(service: Service, request: Request) -> list[Service]:
    """The services of the model that the query names, or of all."""
    _ = service.engine
    name = request.query_params.get("model")
    return service.services if name is None else [service.of(service.check_model(name))]


async def on_each(service: Service, request: Request, act: Callable[[Service], Awaitable[T]]) -> list[T]:
    """Do it for these models at the same time. If it fails for one, the others are done before that is told."""
    done = await asyncio.gather(*map(act, chosen(service, request)), return_exceptions=True)
    if errors := [one for one in done if isinstance(one, BaseException)]:
        raise errors[0]
    return done  # type: ignore[return-value]


async def reset_prefix_cache(service: Service, request: Request) -> Response:
    freed = await on_each(service, request, lambda one: apart(one.engine.reset_prefix_cache))
    return answer({"freed_blocks": sum(freed)})


class SessionHinted(BaseModel):
    """`hint` is "soon", "finished", "pin", "prefetch" or "none"; "waits" needs `seconds`, and "pin" may have them."""

    model_config = ConfigDict(extra="forbid")

    session: SessionName
    hint: SessionHint
    seconds: Annotated[float, Field(ge=0, le=9e9)] | None = None


async def session_hint(service: Service, request: Request) -> Response:
    """What a session will do next. 404 if no model that is asked knows it."""
    body = await read_body(request, SessionHinted)
    if body.seconds is not None and isinstance(body.hint, dict):
        raise ApiError("seconds goes with the name of a hint", param="seconds")
    try:
        given = Hint.of(body.hint if body.seconds is None else {str(body.hint): body.seconds})
    except ValueError as error:
        raise ApiError(str(error), param="hint") from None
    said = [await apart(lambda one=one: _hinted(one, body.session, given)) for one in chosen(service, request)]  # type: ignore[misc]
    if not (found := [one for one in said if one is not None]):
        raise ApiError(f"there is no session {body.session[:200]!r} here", status=404, param="session")
    return answer({"session": body.session, **found[0]})


def _hinted(service: Service, session: str, hint: Hint) -> dict[str, Any] | None:
    try:
        found = service.engine.hint(session, hint)
    except UnknownSessionError:
        return None
    return {"hint": found.hint, "parent": found.parent, "num_running": found.num_running}


class UpdateWeights(BaseModel):
    """`path` (or `model_path`) is a folder of safetensors below the server's model root. `version` (or
    `weight_version`) is that of the new weights, by default the next number. `abort_all_requests` ends what runs, once
    the weights are there."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        validation_alias=AliasChoices("path", "model_path")
    )
    keep_cache: bool = False
    version: Annotated[int, Field(ge=1, le=2**53)] | None = Field(
        default=None, validation_alias=AliasChoices("version", "weight_version")
    )
    abort_all_requests: bool = False


async def update_weights(service: Service, request: Request) -> Response:
    """Replace a model's weights in place, between two steps, while it serves. All or nothing."""
    body = await read_body(request, UpdateWeights)
    if (root := service.settings.model_root) is None:
        raise ApiError("weights are not read over HTTP here: start the server with --model-root", status=404)
    path = below(root, body.path, param="path", what="folder below the server's model root")
    services = chosen(service, request)
    if len(services) != 1:
        names = ", ".join(one.name for one in services)
        raise ApiError(f"weights are one model's: add ?model=NAME, of {names}", param="model")
    engine, begin = services[0].engine, time.perf_counter()
    try:
        done = await asyncio.to_thread(engine.load_weights, path, keep_cache=body.keep_cache, version=body.version)
    except (ValueError, OSError) as error:
        param = "version" if str(error).startswith("version") else "path"
        raise ApiError(clean(str(error)), param=param) from None
    except RuntimeError as error:  # it sleeps, or is closed
        raise ApiError(str(error), status=409) from None
    aborted = await apart(engine.abort_all) if body.abort_all_requests else 0
    told = {
        "version": done.version, "num_tensors": done.num_tensors, "num_bytes": done.num_bytes, "aborted": aborted,
        "freed_blocks": done.freed_blocks, "num_running": done.num_running, "seconds": time.perf_counter() - begin,
    }  # fmt: skip
    return answer({"success": True, **told})


async def weight_info(service: Service, request: Request) -> Response:
    """The version of the weights; of several models, the named one's or the first's."""
    return answer({"weight_version": chosen(service, request)[0].engine.weights_version})


async def pause(service: Service, request: Request) -> Response:
    """Stop stepping. mode=abort ends all requests, wait lets those of now end, keep leaves them where they are."""
    aborted = await on_each(service, request, lambda one: _pause(one, request))
    return answer({"status": "paused", "aborted": sum(aborted)})


async def _pause(service: Service, request: Request) -> int:
    engine = service.engine
    given = "abort" if _flag(request, "wait_for_inflight_requests", False) is False else "wait"
    mode = request.query_params.get("mode", given)
    if mode not in MODES:
        raise ApiError(f"mode is {', '.join(MODES)}, got {mode[:40]!r}", param="mode")
    if engine.asleep is not None:
        raise ApiError("the engine sleeps: POST /wake_up first", status=409)
    service.hub()  # the first one starts the engine
    clears = mode != "keep" and _flag(request, "clear_cache", True)
    if mode == "wait":
        waited = [*engine.arriving.values(), *engine.scheduler.requests.copy().values()]
        while engine.is_running and not all(one.ended for one in waited):
            await asyncio.sleep(0.02)
    await apart(engine.pause)
    aborted = await apart(engine.abort_all) if mode == "abort" else 0
    if clears:
        await apart(engine.reset_prefix_cache)
    return aborted


async def resume(service: Service, request: Request) -> Response:
    await on_each(service, request, lambda one: apart(one.engine.start))
    return answer({"status": "resumed"})


async def is_paused(service: Service, request: Request) -> Response:
    services = chosen(service, request)
    for one in services:
        if one.engine.asleep is None:
            one.hub()
    return answer({"is_paused": not any(one.engine.is_running for one in services)})


async def sleep(service: Service, request: Request) -> Response:
    """Free the memory, and say how much. Requests are ended first, unless mode says otherwise."""
    level = request.query_params.get("level", "1")
    if level not in ("0", "1"):
        told = "level is 0 (stop stepping) or 1 (free the memory; weights are kept in host memory)"
        raise ApiError(f"{told}, got {level[:40]!r}", param="level")

    async def act(one: Service) -> tuple[int, Slept]:
        return await _pause(one, request), await apart(lambda: one.engine.sleep(int(level)))

    done = await on_each(service, request, act)
    found = {
        "aborted": sum(aborted for aborted, _ in done),
        "freed_kv_bytes": sum(slept.kv_bytes for _, slept in done),
        "moved_weight_bytes": sum(slept.moved_bytes for _, slept in done),
    }
    return answer({"status": "asleep", "level": int(level), **found})


async def wake_up(service: Service, request: Request) -> Response:
    async def act(one: Service) -> None:
        await apart(one.engine.wake_up)
        await apart(one.engine.start)

    await on_each(service, request, act)
    return answer({"status": "awake"})


async def is_sleeping(service: Service, request: Request) -> Response:
    return answer({"is_sleeping": all(one.engine.asleep is not None for one in chosen(service, request))})


async def events(service: Service, request: Request) -> Response:
    """An engine's events as lines of JSON, as `EventLog.save` writes them: the latest, then those to come. Of several
    models, the named one's or the first's."""
    given = request.query_params.get("batches", "2000")
    if not given.isdigit() or int(given) > MOST_BATCHES:
        raise ApiError(f"batches is a whole number up to {MOST_BATCHES}, got {given[:40]!r}", param="batches")
    stream = Events(chosen(service, request)[0], int(given))
    await stream.open()
    return StreamingResponse(stream.lines(), media_type="application/x-ndjson", headers={"Cache-Control": "no-cache"})


def _flag(request: Request, name: str, default: bool) -> bool:
    given = request.query_params.get(name, str(default)).lower()
    if given not in ("true", "false", "1", "0"):
        raise ApiError(f"{name} is true or false, got {given[:40]!r}", param=name)
    return given in ("true", "1")


def _post(path: str, endpoint: Any, summary: str) -> Route:
    return Route("POST", path, endpoint, None, summary)


ROUTES = [
    _post("/reset_prefix_cache", reset_prefix_cache, "Forget every cached prefix"),
    Route("POST", "/session_hint", session_hint, SessionHinted, "What a session will do next", of_model=False),
    Route("POST", "/update_weights_from_disk", update_weights, UpdateWeights, "Replace the weights", of_model=False),
    Route("GET", "/weight_info", weight_info, None, "The version of the weights"),
    _post("/pause", pause, "Stop stepping; mode is abort, wait or keep"),
    _post("/resume", resume, "Go on"),
    _post("/sleep", sleep, "Free memory until /wake_up"),
    _post("/wake_up", wake_up, "Take the memory again, and go on"),
    Route("GET", "/is_paused", is_paused, None, "Whether the engine is paused"),
    Route("GET", "/is_sleeping", is_sleeping, None, "Whether the engine sleeps"),
    Route("GET", "/events", events, None, "The engine's events, as lines of JSON"),
]
PATHS = frozenset(route.path for route in ROUTES)
