"""Renders a chat template within a time and a size. Knows nothing of tokenizers.

A template is a program that comes with a model, over messages that come from anyone. It loops over what it is given
or over `range`, so it is enough to look at the clock between its pieces of text and in `range`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

MOST_SECONDS = 5.0
MOST_CHARACTERS = 2**26


class Limits:
    """What is left for one rendering."""

    def __init__(self, seconds: float = MOST_SECONDS, characters: int = MOST_CHARACTERS) -> None:
        self.seconds, self.characters = seconds, characters
        self.end = time.perf_counter() + seconds

    def check(self, num_characters: int = 0) -> None:
        self.characters -= num_characters
        if self.characters < 0:
            raise ValueError("the chat template writes too long a text for these messages")
        if time.perf_counter() > self.end:
            raise ValueError(f"the chat template takes longer than {self.seconds:g} s for these messages")

    def range(self, *bounds: int) -> Range:
        """Python's range, with a look at the clock."""
        found = Range(self, range(*bounds))
        if len(found) > 100_000:  # jinja2's own bound
            raise ValueError("the chat template asks for a range of more than 100000 numbers")
        return found


class Range:
    """Numbers one after another; the clock is looked at before each."""

    def __init__(self, limits: Limits, numbers: range) -> None:
        self._limits, self._numbers = limits, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        return self._numbers[place]

    def __contains__(self, number: object) -> bool:
        return number in self._numbers

    def __iter__(self) -> Iterator[int]:
        for number in self._numbers:
            self._limits.check()
            yield number


def render(template: Any, variables: dict[str, Any], limits: Limits | None = None) -> str:
    """The text that a compiled jinja2 template makes of these variables."""
    limits = Limits() if limits is None else limits
    pieces = []
    for piece in template.generate({**variables, "range": limits.range}):
        limits.check(len(piece))
        pieces.append(piece)
    return "".join(pieces)
