"""Calls as Python: [look(city="Paris", days=[1, 2]), wait()], the whole answer. So do Llama 3.2 and 4 and Olmo.

Arguments are keywords with literal values. They are handed out as JSON, a keyword at a time.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from labkit.text.reader import SPACE, Broken, Reader, Steps

BEGIN, END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.-]+")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_CONSTANTS = {"true": True, "false": False, "null": None}


class PythonicParser(Reader):
    tags = (BEGIN, END)

    def read(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.starts(BEGIN)):
            yield from self.space()
        if (yield from self.starts("[")):
            yield from self._list()
        else:
            self.at = 0
        yield from self.until("content", strip=True)

    def _list(self) -> Steps[None]:
        while (yield from self.attempt(self._call())):
            char = yield from self.space()
            if char == ",":
                self.at += 1
                continue
            if char != "]":
                self.at = self.mark
                return
            self.at += 1
            self.mark = self.at
            yield from self.space()
            if not (yield from self.starts(END)):
                self.at = self.mark
            return

    def _call(self) -> Steps[None]:
        yield from self.space()
        name = yield from self._word()
        yield from self.expect("(")
        names: set[str] = set()
        while (yield from self.space()) != ")":
            key = yield from self._word()
            yield from self.space()
            yield from self.expect("=")
            value = yield from self._literal()
            if key in names:
                raise Broken
            if not names:
                self.begin(name)
            self.say_arguments(f"{', ' if names else '{'}{json.dumps(key)}: {value}")
            names.add(key)
            char = yield from self.space()
            if char == ",":
                self.at += 1
            elif char != ")":
                raise Broken
        self.at += 1
        if not names:
            self.begin(name)
        self.say_arguments("}" if names else "{}")

    def _word(self) -> Steps[str]:
        begin = self.at
        while (yield from self.char()) and (word := _NAME.match(self.text, self.at)) is not None:
            self.at = word.end()
        if self.at == begin:
            raise Broken
        return self.text[begin : self.at]

    def _literal(self) -> Steps[str]:
        """A Python literal, as JSON."""
        yield from self.space()
        closing: list[str] = []
        begin = self.at
        while True:
            char = yield from self.char()
            if char == "" or (char in ")]}" and closing and char != closing[-1]):
                raise Broken
            if not closing and char in ",)":
                break
            if char in "'\"":
                yield from self._quoted(char)
                continue
            if char in _CLOSING:
                closing.append(_CLOSING[char])
            elif closing and char == closing[-1]:
                closing.pop()
            self.at += 1
        return _as_json(self.text[begin : self.at].strip(SPACE))

    def _quoted(self, quote: str) -> Steps[None]:
        self.at += 1
        while (char := (yield from self.char())) != quote:
            if not char:
                raise Broken
            self.at += 1
            if char == "\\":
                if not (yield from self.char()):
                    raise Broken
                self.at += 1
        self.at += 1


def _as_json(literal: str) -> str:
    try:
        return json.dumps(_value(literal), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise Broken from None


def _value(literal: str) -> Any:
    if literal in _CONSTANTS:
        return _CONSTANTS[literal]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about backslashes that escape nothing
        return ast.literal_eval(literal)
