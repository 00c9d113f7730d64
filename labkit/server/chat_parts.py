"""The messages and deltas of chats whose answers are split into reasoning, content and tool calls."""

from __future__ import annotations

from typing import Any

from labkit.server.splitting import Split
from labkit.text.parts import Part


def message_of(split: Split, shows_reasoning: bool, before: str = "") -> dict[str, Any]:
    """The fields of a whole message; `before` goes before its content."""
    message = split.message()
    found: dict[str, Any] = {"content": before + message.content}
    if message.reasoning and shows_reasoning:
        found |= _reasoning(message.reasoning)
    if message.calls:
        found["content"] = found["content"] or None
        found["tool_calls"] = [
            _call(split, i) | {"function": {"name": call.name, "arguments": call.arguments}}
            for i, call in enumerate(message.calls)
        ]
    return found


def delta_of(split: Split, parts: list[Part], shows_reasoning: bool) -> dict[str, Any]:
    """What is new of a message. A call begins with its id and name; then come pieces of its arguments."""
    found: dict[str, Any] = {}
    reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
    content = "".join(part.text for part in parts if part.kind == "content")
    if reasoning and shows_reasoning:
        found |= _reasoning(reasoning)
    if content:
        found["content"] = content
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.kind == "name":
            calls[part.call] = _call(split, part.call) | {"function": {"name": part.text, "arguments": ""}}
        elif part.kind == "arguments":
            entry = calls.setdefault(part.call, {"function": {"arguments": ""}})
            entry["function"]["arguments"] += part.text
    if calls:
        found["tool_calls"] = [{"index": i, **call} for i, call in calls.items()]
    return found


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning": text, "reasoning_content": text}


def _call(split: Split, call: int) -> dict[str, Any]:
    return {"id": split.call_id(call), "type": "function"}
