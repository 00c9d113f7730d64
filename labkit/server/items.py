"""The items of /v1/responses: what a conversation of items is as chat messages, and what an answer is as items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from labkit.server.errors import ApiError
from labkit.server.service import new_id


def input_items(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input as items with ids, as they are listed."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    return [_with_id(item) for item in items]


def _with_id(item: dict[str, Any]) -> dict[str, Any]:
    found = {"type": "message", **item}
    if found["type"] == "message" and isinstance(found.get("content"), str):
        kind = "output_text" if found.get("role") == "assistant" else "input_text"
        found["content"] = [{"type": kind, "text": found["content"]}]
    return {"id": new_id("item"), **found}


def messages_of(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as chat messages: reasoning and calls join the assistant's message that they belong to.

    >>> messages_of([{"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    found: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "message":
            _add_message(found, item, f"input.{i}")
        elif kind == "function_call":
            call = {"name": _text(item, "name", i), "arguments": _text(item, "arguments", i)}
            entry = {"id": _text(item, "call_id", i), "type": "function", "function": call}
            _assistant(found).setdefault("tool_calls", []).append(entry)
        elif kind == "function_call_output":
            output = item.get("output")
            if not isinstance(output, (str, list)):
                raise ApiError(f"input.{i}.output is text or a list of parts", param=f"input.{i}.output")
            found.append({"role": "tool", "tool_call_id": _text(item, "call_id", i), "content": output})
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise ApiError(f"input.{i}.content is a list of parts", param=f"input.{i}.content")
            text = "".join(str(part.get("text", "")) for part in parts)
            found.append({"role": "assistant", "content": None, "reasoning_content": text})
        else:
            raise ApiError(
                f"input.{i} is of type {str(kind)[:64]!r}; messages, function_call, function_call_output and reasoning "
                "are served",
                param=f"input.{i}",
            )
    return found


def contents_of(items: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """What the messages of these items hold, with the fields that errors name."""
    fields = {"message": "content", "function_call_output": "output"}
    named = [(f"input[{i}]", item, fields.get(item.get("type") or "message")) for i, item in enumerate(items)]
    return [(f"{place}.{field}", item.get(field)) for place, item, field in named if field is not None]


def _add_message(found: list[dict[str, Any]], item: dict[str, Any], place: str) -> None:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not role:
        raise ApiError(f"{place} needs a role", param=place)
    if not isinstance(content, (str, list)):
        raise ApiError(f"{place}.content is text or a list of parts", param=f"{place}.content")
    last = found[-1] if found else {}
    if role == "assistant" and last.get("content", "") is None and "tool_calls" not in last:
        last["content"] = content  # reasoning comes before the text it led to
        return
    found.append({"role": role, "content": content})


def _assistant(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that calls belong to."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": None})
    return found[-1]


def _text(item: dict[str, Any], name: str, i: int) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(f"input.{i} needs {name}, a text", param=f"input.{i}.{name}")
    return value
