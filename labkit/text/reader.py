"""Reads reasoning and tool calls out of a text while it is being written.

Knows characters only: where the text is cut into pieces makes no difference to what is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable
from typing import Any, ClassVar, TypeVar

from labkit.text.parts import Part

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields when it needs more text
SPACE = " \t\r\n"
_PLAIN = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r"[^\s,\]}]+")


class Broken(Exception):
    """What is being read is not a call."""


class Reader:
    """Reads a text that arrives in pieces. A subclass says in `read` what comes in which order: a generator over the
    steps below, each of which waits for as much text as it needs.

    >>> reader = HermesParser()
    >>> reader.feed('Hm. <tool_call>{"name": "look", "argu')
    [Part(kind='content', text='Hm.', call=0)]
    >>> reader.feed('ments": {"at": "')
    [Part(kind='name', text='look', call=0), Part(kind='arguments', text='{"at": "', call=0)]
    """

    tags: ClassVar[tuple[str, ...]] = ()  # what marks a call; some vocabularies have special tokens for them
    short_ids: ClassVar[bool] = False

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # read up to here
        self.mark = 0  # handed out up to here, while a call is being read
        self.is_over = False
        self.num_calls = 0
        self.parts: list[Part] = []
        self._is_begun = False  # the name of the call being read was handed out
        self._sent: int | None = None  # while arguments are read: handed out up to here
        self._has_said = True  # anything but space since the last call
        self._steps = self.read()

    def read(self) -> Steps[None]:
        raise NotImplementedError

    def feed(self, text: str) -> list[Part]:
        self.text += text
        return self._go()

    def finish(self) -> list[Part]:
        """What is left, once no more text comes."""
        self.is_over = True
        return self._go()

    def _go(self) -> list[Part]:
        next(self._steps, None)
        parts, self.parts = self.parts, []
        return parts

    # -- steps ---------------------------------------------------------------------------------------------------

    def char(self) -> Steps[str]:
        """The next character; "" at the end."""
        while self.at >= len(self.text):
            if self.is_over:
                return ""
            self._grow()
            yield
        return self.text[self.at]

    def space(self) -> Steps[str]:
        """Skip white space; the character behind it."""
        while (char := (yield from self.char())) and char in SPACE:
            self.at += 1
        return char

    def starts(self, word: str) -> Steps[bool]:
        """Skip a word, if it comes next; whether it did."""
        while not self.is_over and len(self.text) - self.at < len(word) and word.startswith(self.text[self.at :]):
            self._grow()
            yield
        found = self.text.startswith(word, self.at)
        if found:
            self.at += len(word)
        return found

    def expect(self, word: str) -> Steps[None]:
        if not (yield from self.starts(word)):
            raise Broken

    def until(self, kind: str, *tags: str, strip: bool = False) -> Steps[bool]:
        """Hand out text up to the next of the tags, and skip that; whether there was one. With `strip`, without the
        space before a tag and between calls."""
        while True:
            found = min(((at, tag) for tag in tags if (at := self.text.find(tag, self.at)) >= 0), default=None)
            if found is not None:
                at, tag = found
                self._say(kind, self._end(at, strip))
                self.mark, self.at = self.at, at + len(tag)
                return True
            if self.is_over:
                rest = self.text[self.at :]
                if self._has_said or rest.strip() or not strip:
                    self._say(kind, len(self.text))
                self.at = len(self.text)
                return False
            self._say(kind, self._end(len(self.text) - _tail(self.text, self.at, tags), strip))
            yield

    def _end(self, at: int, strip: bool) -> int:
        """The end of the text before `at` that may be shown already."""
        return self.at + len(self.text[self.at : at].rstrip()) if strip else at

    def _say(self, kind: str, end: int) -> None:
        if end > self.at:
            self.parts.append(Part(kind, self.text[self.at : end]))
            self.at, self._has_said = end, True

    # -- calls ---------------------------------------------------------------------------------------------------

    def attempt(self, call: Steps[None]) -> Steps[bool]:
        """Read a call; whether it is one. What is not remains text."""
        self._is_begun, self._sent = False, None
        try:
            yield from call
        except Broken:
            self._break(self.text[self.mark : self.at])
            return False
        self.parts.append(Part("end", "", self.num_calls - 1))
        self.mark, self._has_said = self.at, False
        return True

    def _break(self, raw: str) -> None:
        self._grow()
        self._sent = None
        if self._is_begun:
            self.parts.append(Part("broken", raw, self.num_calls - 1))
        elif raw:
            self.parts.append(Part("content", raw))
        self._has_said = True

    def begin(self, name: str) -> None:
        """Hand out a call's name."""
        if not name or self._is_begun:
            raise Broken
        self.parts.append(Part("name", name, self.num_calls))
        self.num_calls += 1
        self._is_begun = True

    def say_arguments(self, text: str) -> None:
        if text:
            self.parts.append(Part("arguments", text, self.num_calls - 1))

    def _grow(self) -> None:
        if self._sent is not None:
            self.say_arguments(self.text[self._sent : self.at])
            self._sent = self.at

    def call_object(self, needs_arguments: bool = False) -> Steps[None]:
        """{"name": ..., "arguments": {...}}, in any order and with other fields. `arguments` may be `parameters`."""
        yield from self.space()
        yield from self.expect("{")
        name: str | None = None
        arguments: str | None = None
        while True:
            yield from self.space()
            key = yield from self.string()
            yield from self.space()
            yield from self.expect(":")
            yield from self.space()
            if key == "name" and name is None:
                name = yield from self.string()
                if arguments is not None:
                    self.begin(name)
                    self.say_arguments(arguments)
            elif key in ("arguments", "parameters") and arguments is None:
                arguments = yield from self.arguments(name)
            else:
                yield from self.value()
            char = yield from self.space()
            if char not in (",", "}"):
                raise Broken
            self.at += 1
            if char == "}":
                break
        if name is None or (arguments is None and needs_arguments):
            raise Broken
        if arguments is None:
            self.begin(name)
            self.say_arguments("{}")

    def arguments(self, name: str | None) -> Steps[str]:
        """An object; or one written as a string, or null. Handed out as it comes if the call's name is known."""
        char = yield from self.char()
        if char == "{":
            if name is not None:
                self.begin(name)
                self._sent = self.at
            text = yield from self.value()
            self._grow()
            self._sent = None
            return text
        text = (yield from self.string()) if char == '"' else (yield from self.value())
        text = "{}" if text in ("null", "") else text
        if not isinstance(loaded(text), dict):
            raise Broken
        if name is not None:
            self.begin(name)
            self.say_arguments(text)
        return text

    def call_list(self) -> Steps[None]:
        """[{"name": ...}, ...]. Behind a call that is malformed comes text."""
        yield from self.space()
        if not (yield from self.starts("[")):
            self._is_begun = False
            self._break(self.text[self.mark : self.at])
            return
        while (yield from self.attempt(self.call_object())):
            char = yield from self.space()
            if char == ",":
                self.at += 1
                continue
            self.at = self.at + 1 if char == "]" else self.mark
            return

    # -- JSON ----------------------------------------------------------------------------------------------------

    def string(self) -> Steps[str]:
        """A JSON string; its value."""
        begin = self.at
        yield from self._string()
        found: str = loaded(self.text[begin : self.at])
        return found

    def _string(self) -> Steps[None]:
        yield from self.expect('"')
        while (char := (yield from self.char())) != '"':
            if not char:
                raise Broken
            if char == "\\":
                while len(self.text) < self.at + 2:
                    if self.is_over:
                        raise Broken
                    self._grow()
                    yield
                self.at += 2
            elif (plain := _PLAIN.match(self.text, self.at)) is not None:
                self.at = plain.end()
        self.at += 1

    def value(self) -> Steps[str]:
        """A JSON value, as it is written."""
        begin, depth = self.at, 0
        while True:
            char = yield from self.char()
            if char == "":
                raise Broken
            if char == '"':
                yield from self._string()
            elif char in "{[":
                self.at, depth = self.at + 1, depth + 1
            elif char in "}]":
                if not depth:
                    raise Broken
                self.at, depth = self.at + 1, depth - 1
            elif not depth:
                yield from self._scalar()
            else:
                self.at += 1
            if not depth:
                break
        text = self.text[begin : self.at]
        loaded(text)
        return text

    def _scalar(self) -> Steps[None]:
        begin = self.at
        while (char := (yield from self.char())) and (scalar := _SCALAR.match(self.text, self.at)) is not None:
            self.at = scalar.end()
        if self.at == begin or not char:
            raise Broken


def loaded(text: str) -> Any:
    """The value of JSON, or Broken."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Broken from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tail(text: str, start: int, tags: Iterable[str]) -> int:
    """The length of the end of the text that may be the beginning of a tag."""
    most = 0
    for tag in tags:
        for size in range(min(len(tag) - 1, len(text) - start), most, -1):
            if text.endswith(tag[:size]):
                most = size
                break
    return most
