"""The OpenAPI description of the routes, made from their request models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from labkit.core.version import __version__
from labkit.server.answers import ANSWERS, NOTHING, PLAIN
from labkit.server.routes import Route

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


THEIRS = {  # the errors of Anthropic's API
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The whole description, as /openapi.json gives it."""
    bodies = list(dict.fromkeys(route.body for route in routes if route.body is not None))
    made, shared = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    schemas = {**shared.get("$defs", {}), "Error": ERROR, "MessagesError": THEIRS}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        reference = made[route.body, "validation"] if route.body is not None else None
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, reference)
    return {
        "openapi": "3.1.0",
        "info": {"title": "labkit", "version": __version__, "description": "OpenAI-compatible serving"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(route: Route, path: str, body: Any) -> dict[str, Any]:
    answer = ANSWERS.get(path)
    kinds: dict[str, Any] = {"application/json": {} if answer is None else {"schema": answer}}
    if path in PLAIN:
        kinds = {PLAIN[path]: {"schema": {"type": "string"}}}
    if route.streams:
        kinds["text/event-stream"] = {}
    form = "Error" if route.form is None else "MessagesError"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{form}"}}}
    found: dict[str, Any] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_"),
        "responses": {
            "200": {"description": "The answer", **({} if answer is NOTHING else {"content": kinds})},
            "4XX": {"description": "What is wrong with the request", "content": error},
            "503": {"description": "Loading, overloaded, stopping or stopped", "content": error},
        },
        "security": [] if path in ("/health", "/ping") else [{}, {"key": []}],
    }
    if names := re.findall(r"\{(\w+)\}", path):
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found
