"""What an answer consists of besides plain text: reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Part(NamedTuple):
    """A piece of an answer. `kind` is reasoning, content, or what is new of a call: its name, a piece of its
    arguments (JSON), its end; or broken, if what was handed out of it turned out not to be a call. `text` of a broken
    one is what the model wrote."""

    kind: str
    text: str = ""
    call: int = 0


class ToolCall(NamedTuple):
    name: str
    arguments: str  # a JSON object, as the model wrote it


@dataclass
class Message:
    """A whole answer. Calls that are malformed are part of the content.

    >>> Message.of([Part("content", "Let me look."), Part("name", "look"), Part("arguments", "{}"), Part("end")])
    Message(content='Let me look.', reasoning='', calls=[ToolCall(name='look', arguments='{}')])
    """

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Message:
        found, name, arguments = cls(), "", ""
        for part in settled(parts):
            if part.kind == "content":
                found.content += part.text
            elif part.kind == "reasoning":
                found.reasoning += part.text
            elif part.kind == "name":
                name, arguments = part.text, ""
            elif part.kind == "arguments":
                arguments += part.text
            else:
                found.calls.append(ToolCall(name, arguments))
        return found


def settled(parts: Iterable[Part]) -> list[Part]:
    """The parts of a whole answer: a call that broke is the text that the model wrote."""
    found: list[Part] = []
    for part in parts:
        if part.kind != "broken":
            found.append(part)
            continue
        found = [other for other in found if other.kind not in ("name", "arguments") or other.call != part.call]
        found.append(Part("content", part.text))
    return found
