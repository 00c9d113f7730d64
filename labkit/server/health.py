"""/health, /ping, /version, /load and /v1/models: what a server says of itself."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from labkit.core.version import __version__
from labkit.server.errors import ApiError
from labkit.server.http import answer
from labkit.server.routes import Route
from labkit.server.service import Service


async def health(service: Service, request: Request) -> Response:
    """200 if requests are served; 503 while the model is being loaded, during shutdown and if the engine has died."""
    if service.is_dead:
        raise ApiError("the engine has stopped", status=503)
    _ = service.engine
    if service.is_stopping:
        raise ApiError("the server is shutting down", status=503)
    return Response(status_code=200)


async def version(service: Service, request: Request) -> Response:
    return answer({"version": __version__})


async def load(service: Service, request: Request) -> Response:
    return answer({"server_load": service.num_open - 1})  # besides this one


async def models(service: Service, request: Request) -> Response:
    _ = service.engine
    adapters = [(one, name) for one in service.services for name in one.adapters]
    found = [*(_card(service, name) for name in service.names), *(_adapter_card(one, name) for one, name in adapters)]
    return answer({"object": "list", "data": found})


async def model(service: Service, request: Request) -> Response:
    name = service.check_model(request.path_params["model"])
    if name in service.names:
        return answer(_card(service, name))
    return answer(_adapter_card(service.of(name), name))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "labkit",
        "root": service.of(name).names[0],
        "parent": None,
        "max_model_len": service.of(name).room,
    }


def _adapter_card(service: Service, name: str) -> dict[str, Any]:
    """An adapter is a model whose parent is its base. Where it lies is the operator's business."""
    return {**_card(service, service.name), "id": name, "root": name, "parent": service.name}


ROUTES = [
    Route("GET", "/health", health, None, "200 if requests are served, else 503"),
    Route("GET", "/ping", health, None, "The same as /health"),
    Route("POST", "/ping", health, None, "The same as /health"),
    Route("GET", "/version", version, None, "labkit's version"),
    Route("GET", "/load", load, None, "How many requests are being served"),
    Route("GET", "/v1/models", models, None, "The names that requests may use as model"),
    Route("GET", "/v1/models/{model:path}", model, None, "One of these"),
]
