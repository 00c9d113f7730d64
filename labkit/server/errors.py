"""Errors as clients see them: OpenAI's shape, a status, the field at fault. No stack traces, paths or addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    499: "ClientClosedRequestError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
REFUSALS = ("queue_full", "loading", "stopping", "engine_dead")  # why a server takes no request, whoever sends it
LONGEST_MESSAGE = 2000
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+-]+){2,}[/\\]?")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}\b")


class ApiError(Exception):
    """What is wrong with a request, or with the server that should serve it. `refusal` is one of `REFUSALS`, which are
    counted."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        retry_after: int | None = None,
        refusal: str | None = None,
    ) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.message = message[:LONGEST_MESSAGE]
        self.status = status
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status) or HTTPStatus(self.status).phrase
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class ClientGone(Exception):
    """The client closed the connection, so nobody reads the answer."""


def overloaded(message: str, seconds: int = 1, refusal: str = "queue_full") -> ApiError:
    return ApiError(message, status=503, retry_after=seconds, refusal=refusal)


def engine_dead(message: str = "the engine has stopped") -> ApiError:
    return ApiError(message, status=503, refusal="engine_dead")


def internal() -> ApiError:
    return ApiError("the server failed to serve this request; its log says why", status=500)


def clean(text: str) -> str:
    """An engine's error text without paths and addresses."""
    return _ADDRESS.sub("(address)", _PATH.sub("(path)", text))


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, and how many more there are."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    place = ".".join(str(part) for part in first["loc"] if not _is_type(part)) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}"
    elif place is None and first["type"] == "model_type":
        message = "the body must be a JSON object"
    elif "_than" in first["type"]:
        message += f" [{first['type']}]"
    others = len({error["loc"][:1] for error in found}) - 1
    more = f" (and {others} more)" if others > 0 else ""
    return ApiError(f"{place}: {message}{more}" if place else f"{message}{more}", param=place)


def _is_type(part: Any) -> bool:
    """Pydantic adds the name of the alternative it tried: list[int], constrained-str, ..."""
    return isinstance(part, str) and (bool(re.search(r"[\[\-(]", part)) or part in _TYPES)


_TYPES = frozenset(("str", "int", "float", "bool", "dict", "list"))


def of_value(error: ValueError, fields: Iterable[str], renamed: Mapping[str, str] | None = None) -> ApiError:
    """A ValueError of the engine, whose text begins with the name of what is wrong."""
    message = clean(str(error))
    word = re.split(r"\W", message, maxsplit=1)[0]
    word = (renamed or {}).get(word, word)
    return ApiError(message, param=word if word in set(fields) else None)
