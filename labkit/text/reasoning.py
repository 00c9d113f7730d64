"""Splits a model's reasoning from its answer, and lets a grammar begin behind the reasoning."""

from __future__ import annotations

import copy
from typing import Any

from labkit.text.reader import Reader, Steps
from labkit.text.tokenizer import stream_of

BEGIN, END = "<think>", "</think>"
TAIL = 16  # tokens of the prompt in which a template may begin or end the reasoning


class Thinking(Reader):
    """<think>reasoning</think>answer. `is_open`: the reasoning begins with the text. `is_closed`: there is none."""

    def __init__(self, is_open: bool = False, is_closed: bool = False) -> None:
        self.is_open, self.is_closed = is_open, is_closed
        super().__init__()

    def read(self) -> Steps[None]:
        if not self.is_closed:
            yield from self.space()
            if (yield from self.starts(BEGIN)) or self._opened():
                yield from self.until("reasoning", END)
            else:
                self.at = 0
        yield from self.until("content")

    def _opened(self) -> bool:
        self.at = 0
        return self.is_open


class ReasoningParser:
    """How a family of models marks its reasoning."""

    def __init__(self, name: str, is_open: bool) -> None:
        self.name, self.is_open = name, is_open  # whether an answer begins with reasoning even if nothing says so

    def __repr__(self) -> str:
        return f"ReasoningParser({self.name})"

    def is_closed(self, prompt: str) -> bool:
        """Whether the prompt's end leaves no place for reasoning, as templates do where thinking is turned off."""
        return prompt.rstrip().endswith(END)

    def begin(self, prompt: str = "") -> Thinking:
        """A reader for the answer to a prompt that ends so.

        >>> answer = REASONING["deepseek_r1"].begin()
        >>> answer.feed("so it is 4.</think>4")
        [Part(kind='reasoning', text='so it is 4.', call=0), Part(kind='content', text='4', call=0)]
        """
        return Thinking(self.is_open or prompt.rstrip().endswith(BEGIN), self.is_closed(prompt))


REASONING = {name: ReasoningParser(name, is_open) for name, is_open in (("deepseek_r1", True), ("qwen3", False))}


class AfterReasoning:
    """A logits processor that applies a mask, such as a grammar's, from the end of the reasoning on."""

    def __init__(self, inner: Any, tokenizer: Any) -> None:
        self.inner, self.tokenizer = inner, tokenizer

    def __repr__(self) -> str:
        return f"AfterReasoning({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AfterReasoning:
        return self  # nothing in it changes

    def begin(self) -> ReasoningProgress:
        return ReasoningProgress(self.inner.begin(), self.tokenizer)


class ReasoningProgress:
    """One sample: still reasoning, or at which token the answer began."""

    def __init__(self, inner: Any, tokenizer: Any) -> None:
        self.inner, self.tokenizer = inner, tokenizer
        self.start: int | None = None
        self._restart()

    def _restart(self) -> None:
        self.stream = stream_of(self.tokenizer, (), skip_special_tokens=False)
        self.text, self.num_read = "", 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ReasoningProgress:
        other = ReasoningProgress(copy.deepcopy(self.inner, memo), self.tokenizer)
        other.start = self.start
        return other

    def fill(self, output: list[int], bits: Any) -> None:
        """Which tokens may come next: any, as long as the reasoning goes on."""
        if self.start is None:
            self._look(output)
        if self.start is not None:
            self.inner.fill(output[self.start :], bits)

    def _look(self, output: list[int]) -> None:
        for at in range(self.num_read, len(output)):
            self.text = self.text[-len(END) :] + self.stream.feed([output[at]])
            self.num_read = at + 1
            if END in self.text:
                self.start = at + 1
                return
