"""Readers of trace files. Each knows one public format and turns a line into a `TraceRequest`; checks that all formats
share are the trace's."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import IO, Any

from labkit.core.options import choose
from labkit.study.trace import BadRequestError, Trace, TraceRequest

Parsed = Iterator["tuple[str, TraceRequest | BadRequestError]"]


@dataclass(frozen=True)
class Format:
    """A file format: how a file is read, the columns it is recognized by, the tokens of its blocks."""

    read: Callable[[IO[str]], Parsed]
    columns: frozenset[str]
    block_size: int | None


def read_trace(
    path: str | PathLike[str],
    format: str | None = None,
    *,
    block_size: int | None = None,
    errors: str = "raise",
) -> Trace:
    """The trace in a file; `format` is recognized from its first line if not given. The file is read anew on every
    pass and not kept in memory.

    `block_size` is the tokens that a block hash stands for, if the file differs from its format's usual number.
    `errors="skip"` counts malformed requests in `trace.excluded` instead of ending at the first.

    >>> import labkit as lk
    >>> with open("trace.jsonl", "w") as file:
    ...     line = '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}'
    ...     _ = file.write(line)
    >>> trace = lk.study.read_trace("trace.jsonl")
    >>> trace
    Trace(trace.jsonl: blocks of 512 tokens)
    >>> trace.head()[0].hashes
    array('q', [0, 1])
    """
    path = Path(path)
    name = recognized(path) if format is None else format
    chosen = choose("trace format", name, FORMATS)

    def source() -> Parsed:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            yield from chosen.read(file)

    return Trace(path.name, source, block_size=block_size or chosen.block_size, errors=errors)


def recognized(path: Path) -> str:
    """The format of a file, from the columns of its first line."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline(1 << 20).strip()
    if not first:
        raise ValueError(f"{path.name} has no requests: its first line is empty")
    try:
        columns = set(json.loads(first)) if first.startswith("{") else {name.strip() for name in first.split(",")}
    except ValueError:
        columns = set()
    fitting = [name for name, known in FORMATS.items() if known.columns <= columns]
    if not fitting:
        raise ValueError(f"{path.name}: cannot tell its format from its first line; give one of {', '.join(FORMATS)}")
    return max(fitting, key=lambda name: len(FORMATS[name].columns))


def _json_lines(parse: Callable[[dict[str, Any]], TraceRequest]) -> Callable[[IO[str]], Parsed]:
    def read(file: IO[str]) -> Parsed:
        loads = json.loads
        for number, line in enumerate(file, 1):
            place = f"line {number}"
            try:
                row = loads(line)
            except ValueError as error:
                if line.strip():
                    yield place, BadRequestError("not JSON", str(error))
                continue
            yield place, _parsed(parse, row) if isinstance(row, dict) else BadRequestError("not an object", line[:40])

    return read


def _csv(make: Callable[[], Callable[[dict[str, Any]], TraceRequest]]) -> Callable[[IO[str]], Parsed]:
    def read(file: IO[str]) -> Parsed:
        rows, parse = csv.DictReader(file), make()
        for row in rows:
            yield f"line {rows.line_num}", _parsed(parse, row)

    return read


def _parsed(parse: Callable[[dict[str, Any]], TraceRequest], row: dict[str, Any]) -> TraceRequest | BadRequestError:
    try:
        return parse(row)
    except BadRequestError as error:
        return error
    except KeyError as error:
        return BadRequestError("missing field", str(error).strip("'"))
    except (TypeError, ValueError) as error:
        return BadRequestError("malformed field", str(error))


def _number(row: dict[str, Any], name: str) -> int:
    value = row[name]
    if type(value) is not int:
        raise BadRequestError("malformed field", f"{name} must be a whole number, got {value!r}")
    return value


def _hashes(row: dict[str, Any]) -> array[int]:
    try:
        return array("q", row["hash_ids"])
    except (TypeError, OverflowError):
        raise BadRequestError("malformed field", "hash_ids must be a list of 64-bit whole numbers") from None


def _time(row: dict[str, Any], name: str) -> float:
    value = row[name]
    if type(value) not in (int, float):
        raise BadRequestError("malformed field", f"{name} must be a number, got {value!r}")
    return float(value)


def _mooncake(row: dict[str, Any]) -> TraceRequest:
    time = _time(row, "timestamp") / 1e3
    return TraceRequest(time, _number(row, "input_length"), _number(row, "output_length"), _hashes(row))


class _Azure:
    """Times are dates, and become seconds after the first."""

    def __init__(self) -> None:
        self.first: datetime | None = None

    def __call__(self, row: dict[str, Any]) -> TraceRequest:
        time = datetime.fromisoformat(row["TIMESTAMP"][:26])
        self.first = self.first or time
        return TraceRequest((time - self.first).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


FORMATS: dict[str, Format] = {
    "mooncake": Format(
        _json_lines(_mooncake), frozenset(("timestamp", "input_length", "output_length", "hash_ids")), 512
    ),
    "azure": Format(_csv(_Azure), frozenset(("TIMESTAMP", "ContextTokens", "GeneratedTokens")), None),
}
