"""The output of a response as it grows: items, and the events that tell of them in OpenAI's order.

Knows no HTTP and no engine: parts of an answer go in, events come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labkit.server.service import new_id
from labkit.text.parts import Part

Event = dict[str, Any]
KINDS = {"content": "message", "reasoning": "reasoning"}


class Output:
    """Items of one answer. `call_id` gives a call's id."""

    def __init__(self, call_id: Callable[[int], str]) -> None:
        self.call_id = call_id
        self.items: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None  # the item that grows
        self.logprobs: list[Any] = []  # of tokens whose text is still to come

    def take(self, parts: Sequence[Part], logprobs: Sequence[Any] = ()) -> list[Event]:
        events: list[Event] = []
        self.logprobs += logprobs
        for part in parts:
            if part.kind in KINDS:
                events += self._text(part)
            elif part.kind == "name":
                events += [*self.close(), *self._begin(self._call(part))]
            elif part.kind == "arguments" and self.open is not None:
                self.open["arguments"] += part.text
                events.append(self._of("response.function_call_arguments.delta", delta=part.text))
            elif part.kind in ("end", "broken"):
                events += self.close("completed" if part.kind == "end" else "incomplete")
        return events

    def finish(self, is_complete: bool) -> list[Event]:
        """No more parts come."""
        events = [] if self.items else self._text(Part("content"))
        return events + self.close("completed" if is_complete else "incomplete")

    # -- items ---------------------------------------------------------------------------------------------------

    def _call(self, part: Part) -> dict[str, Any]:
        call = {"type": "function_call", "call_id": self.call_id(part.call), "name": part.text, "arguments": ""}
        return {"id": new_id("fc"), **call, "status": "in_progress"}

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        self.items.append(item)
        self.open = item
        return [self._told("response.output_item.added", item=_copy(item))]

    def _text(self, part: Part) -> list[Event]:
        events: list[Event] = []
        kind = KINDS[part.kind]
        if self.open is None or self.open["type"] != kind:
            events += self.close()
            events += self._begin(_message() if kind == "message" else _reasoning())
            assert self.open is not None
            content: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.open["content"].append(content)
            events.append(self._of("response.content_part.added", content_index=0, part=_copy(content)))
        (content,) = self.open["content"]
        content["text"] += part.text
        more: dict[str, Any] = {}
        if kind == "message":
            more, self.logprobs = {"logprobs": self.logprobs}, []
            content["logprobs"] += more["logprobs"]
        if part.text:
            name = "output_text" if kind == "message" else "reasoning_text"
            events.append(self._of(f"response.{name}.delta", content_index=0, delta=part.text, **more))
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """End the item that grows."""
        item = self.open
        if item is None:
            return []
        item["status"] = status
        events = []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._of("response.function_call_arguments.done", **done))
        else:
            (content,) = item["content"]
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            more = {}
            if name == "output_text":
                content["logprobs"] += self.logprobs
                more, self.logprobs = {"logprobs": content["logprobs"]}, []
            events.append(self._of(f"response.{name}.done", content_index=0, text=content["text"], **more))
            events.append(self._of("response.content_part.done", content_index=0, part=_copy(content)))
        events.append(self._told("response.output_item.done", item=_copy(item)))
        self.open = None
        return events

    def _told(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, **fields}

    def _of(self, kind: str, **fields: Any) -> Event:
        assert self.open is not None
        return self._told(kind, item_id=self.open["id"], **fields)

    def messages(self) -> list[dict[str, Any]]:
        """The items as input items of a next request."""
        return [_copy(item) for item in self.items]


def _message() -> dict[str, Any]:
    return {"id": new_id("msg"), "type": "message", "role": "assistant", "content": [], "status": "in_progress"}


def _reasoning() -> dict[str, Any]:
    return {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """A copy that does not grow along."""
    if not isinstance(item.get("content"), list):
        return dict(item)
    return {**item, "content": [dict(content) for content in item["content"]]}
