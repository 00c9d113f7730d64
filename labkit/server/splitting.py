"""Answers split into reasoning, content and tool calls: what is told of each piece, and of the whole.

Knows no form of JSON but the calls'. Chats and responses write the parts, each in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from labkit.server.pieces import Growing
from labkit.server.sampling import Sampling
from labkit.server.service import Service
from labkit.server.tools import Calling, new_call_id
from labkit.text.answer import Answer
from labkit.text.parts import Message, Part
from labkit.text.reasoning import END, REASONING, TAIL, AfterReasoning, ReasoningParser
from labkit.text.tokenizer import Tokenizer


class Splitting:
    """How the answers of one call are split. The same for all samples of a prompt."""

    def __init__(self, service: Service, calling: Calling, prompt: Sequence[int]) -> None:
        self.service, self.calling = service, calling
        self.tokenizer = service.tokenizer
        name = service.settings.reasoning_parser
        self.reasoning: ReasoningParser | None = REASONING[name] if name is not None else None
        self.prompt = ""
        if self.reasoning is not None:
            self.prompt = self.tokenizer.decode(list(prompt[-TAIL:]), skip_special_tokens=False)

    @property
    def is_plain(self) -> bool:
        """The answer is text alone."""
        return self.reasoning is None and self.calling.reader(self.service.settings) is None

    def change(self, body: Sampling) -> dict[str, Any]:
        """What the answer's text must have so that it can be split, unless the request says otherwise."""
        if "skip_special_tokens" in body.model_fields_set or not self.needs_special_tokens:
            return {}
        return {"skip_special_tokens": False}

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the marks of reasoning or calls are special tokens, which a text leaves out."""
        reader = self.calling.reader(self.service.settings)
        tags = {*(reader.tags if reader is not None else ()), *((END,) if self.reasoning is not None else ())}
        return bool(tags & special_tokens(self.tokenizer))

    def wrap(self, grammar: Any) -> Any:
        """A grammar as it applies to the answer: from the end of the reasoning on."""
        if self.reasoning is None or self.reasoning.is_closed(self.prompt):
            return grammar
        return AfterReasoning(grammar, self.tokenizer)

    def begin(self, grown: Growing) -> Split:
        reasoning = self.reasoning.begin(self.prompt) if self.reasoning is not None else None
        return Split(self, grown, Answer(reasoning, self.calling.reader(self.service.settings)))


def special_tokens(tokenizer: Any) -> set[str]:
    if not isinstance(tokenizer, Tokenizer):
        return set()
    return {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}


class Split:
    """One answer."""

    def __init__(self, how: Splitting, grown: Growing, answer: Answer) -> None:
        self.how, self.grown, self.answer = how, grown, answer
        self.ids: dict[int, str] = {}  # of calls
        self.parts: list[Part] = []

    def feed(self, text: str, tokens: Sequence[int], ended: bool) -> list[Part]:
        """What is new."""
        if ended and tokens:
            text = text.removesuffix(self._end_token(tokens[-1]))
        found = self.answer.feed(text, ended)
        if not self.how.calling.is_parallel:
            found = [part for part in found if part.call == 0]
        self.parts += found
        return found

    def _end_token(self, id: int) -> str:
        """A token that ended the answer is not a part of it."""
        params, reason = self.grown.handle.params, self.grown.handle.finish_reason
        if params.skip_special_tokens or params.include_stop_str_in_output or reason not in ("eos", "stop"):
            return ""
        return self.how.service.texts.text_of(id)

    def call_id(self, call: int) -> str:
        if call not in self.ids:
            self.ids[call] = new_call_id(self.how.service.settings)
        return self.ids[call]

    def message(self) -> Message:
        return Message.of(self.parts)

    def num_reasoning(self) -> int:
        """Tokens of the reasoning."""
        return len(self.how.tokenizer.encode(self.message().reasoning, add_special_tokens=False))

    @property
    def finish_reason(self) -> str:
        """tool_calls, if the answer is over and the model called. A call that was named ends as text does."""
        reason, calling = self.grown.finish_reason, self.how.calling
        return "tool_calls" if reason == "stop" and self.answer.num_ended and not calling.is_named else reason
