"""A route as endpoint modules declare it; app.py wires them and openapi.py describes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from labkit.server.errors import ApiError
    from labkit.server.service import Service

Endpoint = Callable[["Service", Request], Awaitable[Response]]


class Route(NamedTuple):
    """A method and a path, the function that answers, and what its body must be."""

    method: str
    path: str
    endpoint: Endpoint
    body: type[BaseModel] | None
    summary: str
    streams: bool = False  # may answer with server-sent events
    draws: bool = False  # answers with tokens that a model draws
    of_model: bool = True  # a body's `model` says which of several models answers
    form: Callable[[ApiError], dict[str, Any]] | None = None  # of errors; None is OpenAI's
