"""Calls that a request demands: the schemas that constrain the answer, and how it is read back.

Cut off by max_tokens, a call has the arguments so far, as in OpenAI's answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.text.parts import Part
from labkit.text.reader import Reader, Steps


class ForcedParser(Reader):
    """[{"name": ..., "parameters": {...}}, ...], and nothing else."""

    def read(self) -> Steps[None]:
        yield from self.call_list()
        yield from self.until("content", strip=True)

    def _break(self, raw: str) -> None:
        self._grow()
        if self._is_begun:
            self.parts.append(Part("end", "", self.num_calls - 1))


class NamedParser(Reader):
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__()

    def read(self) -> Steps[None]:
        yield from self.attempt(self._call())

    def _call(self) -> Steps[None]:
        self.begin(self.name)
        self._sent = 0
        while (yield from self.char()):
            self.at = len(self.text)
        self._grow()


def schema_of(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function's arguments as a JSON schema. They are an object, whatever else is said of them."""
    return {"properties": {}, **(parameters or {}), "type": "object"}


def list_schema(functions: Sequence[tuple[str, Mapping[str, Any] | None]], most: int | None = None) -> dict[str, Any]:
    """A list of one or more calls of these functions. Definitions that parameters refer to move to the top.

    >>> list_schema([("wait", None)])["items"]["anyOf"][0]["properties"]["name"]
    {'const': 'wait'}
    """
    definitions: dict[str, Any] = {}
    items = []
    for name, parameters in functions:
        schema = schema_of(parameters)
        for place in ("$defs", "definitions"):
            moved = schema.pop(place) if isinstance(schema.get(place), Mapping) else {}
            for key, value in moved.items():
                if definitions.setdefault(place, {}).setdefault(key, value) != value:
                    raise ValueError(f"two tools define {key!r} differently: give one of them another name")
        properties = {"name": {"const": name}, "parameters": schema}
        items.append({
            "type": "object", "properties": properties, "required": ["name", "parameters"],
            "additionalProperties": False,
        })  # fmt: skip
    found = {"type": "array", "minItems": 1, "items": {"anyOf": items}, **definitions}
    return found if most is None else {**found, "maxItems": most}
