"""One answer as it grows, split into reasoning, content and calls."""

from __future__ import annotations

from collections.abc import Callable

from labkit.text.parts import Message, Part
from labkit.text.reader import Reader


class Answer:
    """One answer as it grows: reasoning first, if the model's output has it, then content and calls.

    >>> answer = Answer(tools=HermesParser())
    >>> answer.feed("Yes.", ended=True)
    [Part(kind='content', text='Yes.', call=0)]
    """

    def __init__(self, reasoning: Reader | None = None, tools: Reader | None = None) -> None:
        self.reasoning, self.tools = reasoning, tools
        self.num_ended = 0  # calls that are complete

    def feed(self, text: str, ended: bool = False) -> list[Part]:
        parts = [Part("content", text)] if text else []
        if self.reasoning is not None:
            parts = self.reasoning.feed(text) + (self.reasoning.finish() if ended else [])
        if self.tools is not None:
            parts = self._calls(parts, ended, self.tools)
        self.num_ended += sum(part.kind == "end" for part in parts)
        return parts

    @staticmethod
    def _calls(parts: list[Part], ended: bool, tools: Reader) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            found += tools.feed(part.text) if part.kind == "content" else [part]
        return found + (tools.finish() if ended else [])


def whole(make: Callable[[], Reader], text: str) -> Message:
    """The message that a complete text is.

    >>> whole(HermesParser, '<tool_call>{"name": "look", "arguments": {}}</tool_call>').calls
    [ToolCall(name='look', arguments='{}')]
    """
    reader = make()
    return Message.of(reader.feed(text) + reader.finish())
