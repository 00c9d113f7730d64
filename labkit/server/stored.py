"""Answers of /v1/responses that later requests may continue. Bounded: the oldest ones make room."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any, NamedTuple

MOST_CHARACTERS = 2**26


class Entry(NamedTuple):
    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    messages: list[dict[str, Any]]  # the conversation up to and with this answer, without instructions
    size: int
    session: str  # of those that continue it


class Stored:
    """At most `most` answers, and at most 64 Mi characters of them.

    >>> stored = Stored(most=1)
    >>> stored.add({"id": "a"}, [], []), stored.add({"id": "b"}, [], []), stored
    (None, None, Stored(1 of at most 1))
    """

    def __init__(self, most: int, most_characters: int = MOST_CHARACTERS) -> None:
        self.most, self.most_characters = most, most_characters
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.num_characters = 0

    def __repr__(self) -> str:
        return f"Stored({len(self.entries)} of at most {self.most})"

    def __contains__(self, id: str) -> bool:
        return id in self.entries

    def get(self, id: str) -> Entry | None:
        return self.entries.get(id)

    def add(
        self, response: dict[str, Any], input_items: list[dict[str, Any]], messages: list[dict[str, Any]],
        session: str | None = None,
    ) -> None:  # fmt: skip
        """Its `session` is its own id, if nobody has named one."""
        size = len(json.dumps([response, input_items, messages]))
        self.remove(response["id"])
        self.entries[response["id"]] = Entry(response, input_items, messages, size, session or response["id"])
        self.num_characters += size
        while self.entries and (len(self.entries) > self.most or self.num_characters > self.most_characters):
            self.remove(next(iter(self.entries)))

    def remove(self, id: str) -> bool:
        """Forget an answer; whether there was one. Those that continue it keep their own copy of the conversation."""
        entry = self.entries.pop(id, None)
        if entry is not None:
            self.num_characters -= entry.size
        return entry is not None

    def check(self) -> None:
        assert self.num_characters == sum(entry.size for entry in self.entries.values()) <= self.most_characters
        assert len(self.entries) <= self.most
