"""Wires the endpoint families to an ASGI application. A family is a module with `ROUTES`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from labkit.server import (
    adapters,
    admin,
    chat,
    classes,
    completions,
    embeddings,
    health,
    invocations,
    loading,
    messages,
    metrics,
    responses,
    scores,
    tokens,
)
from labkit.server.errors import ApiError
from labkit.server.guard import Guard
from labkit.server.http import NOTE, answer, failed
from labkit.server.openapi import document
from labkit.server.routes import Route
from labkit.server.service import Service

FAMILIES = (
    completions, chat, responses, messages, embeddings, classes, scores,
    invocations, tokens, health, metrics, loading, adapters
)  # fmt: skip


def make_app(service: Service) -> Starlette:
    """The application over a service; its `state.service` is the service."""
    families = (*FAMILIES, admin) if service.settings.has_admin else FAMILIES
    routes = [route for family in families for route in family.ROUTES]
    described = document(routes)

    async def openapi(service: Service, request: Request) -> Response:
        return answer(described)

    routes.append(Route("GET", "/openapi.json", openapi, None, "This description"))
    forms = {route.path: route.form for route in routes if route.form is not None}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    app = Starlette(
        routes=[_route(service, route) for route in routes],
        middleware=[*_cors(service), Middleware(Guard, service=service, forms=forms)],
        exception_handlers={HTTPException: _refused},  # type: ignore[dict-item]
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _route(service: Service, route: Route) -> StarletteRoute:
    async def call(request: Request) -> Response:
        request.scope[NOTE]["route"] = route.path
        try:
            chosen = await service.chosen(request) if route.body is not None and route.of_model else service
            if route.draws:
                chosen.check_draws()
            return await route.endpoint(chosen, request)
        except Exception as error:  # an ApiError as it is, anything else as status 500 and into the log
            return failed(error)

    found = StarletteRoute(route.path, call, methods=[route.method], name=f"{route.method} {route.path}")
    return found


def _cors(service: Service) -> list[Middleware]:
    """Other sites' pages may call the server only if their origin is named."""
    s = service.settings
    if not s.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(s.allowed_origins),
            allow_methods=list(s.allowed_methods),
            allow_headers=list(s.allowed_headers),
            allow_credentials=s.allow_credentials,
        )
    ]


async def _refused(request: Request, error: HTTPException) -> Response:
    """No such route, or not with this method."""
    told = {404: "there is no such route", 405: f"{request.method} is not served on this route"}
    made = ApiError(told.get(error.status_code, error.detail), status=error.status_code)
    made.headers |= dict(error.headers or {})
    return failed(made)
