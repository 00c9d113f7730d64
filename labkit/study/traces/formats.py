"""Trace files: which formats there are, how a file's format is recognized, reading and writing. What a format's lines
mean is in `readers.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any

from labkit.core.options import choose
from labkit.study.traces import readers
from labkit.study.traces.columns import ColumnTrace, write_columns
from labkit.study.traces.readers import NAMES, Parsed, Parser, csv_lines, json_lines
from labkit.study.traces.trace import Trace, TraceRequest


@dataclass(frozen=True)
class Format:
    """A file format: how a file is read, the columns it is recognized by, the tokens of its blocks."""

    read: Callable[[IO[str]], Parsed] | None  # None: needs more than the file
    columns: frozenset[str]
    block_size: int | None = None


def _lines(make: Callable[[], Parser]) -> Callable[[IO[str]], Parsed]:
    return lambda file: json_lines(file, make())


def _rows(make: Callable[[], Parser]) -> Callable[[IO[str]], Parsed]:
    return lambda file: csv_lines(file, make())


FORMATS: dict[str, Format] = {
    "mooncake": Format(
        _lines(lambda: readers.mooncake), frozenset(("timestamp", "input_length", "output_length", "hash_ids")), 512
    ),
    "bailian": Format(
        _lines(readers.Bailian),
        frozenset(("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")),
        16,
    ),
    "azure": Format(_rows(readers.Azure), frozenset(("TIMESTAMP", "ContextTokens", "GeneratedTokens"))),
    "burstgpt": Format(_rows(lambda: readers.burstgpt), frozenset(("Timestamp", "Request tokens", "Response tokens"))),
    "sharegpt": Format(None, frozenset()),
    "labkit": Format(None, frozenset(("labkit_trace",))),
    "columns": Format(None, frozenset(("labkit_columns",))),
    "events": Format(readers.events, frozenset(("labkit_log",))),
}


def read_trace(
    path: str | PathLike[str],
    format: str | None = None,
    *,
    block_size: int | None = None,
    errors: str = "raise",
    tokenizer: Any = None,
) -> Trace:
    """The trace in a file. The file is read anew on every pass and not kept in memory.

    `format` is recognized from the first line if not given: "mooncake", "bailian" (Qwen), "azure", "burstgpt",
    "sharegpt", "events" (a saved event log), and "labkit" and "columns" as `write_trace` writes them. `block_size` is
    the tokens that a block hash stands for, if the file differs from its format's usual number. ShareGPT's texts need a
    `tokenizer` and have no times. `errors="skip"` counts malformed requests in `trace.excluded` instead of ending at
    the first.

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
    size = block_size or chosen.block_size
    if name == "columns":
        if block_size is not None:
            raise ValueError(f"{path.name} says itself how many tokens a block has: leave out block_size")
        return ColumnTrace(path)
    if name == "sharegpt":
        if not hasattr(tokenizer, "encode"):
            raise ValueError("ShareGPT files hold text: give tokenizer=, such as engine.tokenizer")
        return Trace(path.name, _source(path, _sharegpt(tokenizer, size or 16)), block_size=size or 16, errors=errors)
    if name == "labkit":
        size = size or _block_size(path)
        return Trace(path.name, _source(path, _lines(lambda: readers.Own(size))), block_size=size, errors=errors)
    if name == "events":
        with open(path, encoding="utf-8", errors="replace") as file:
            size = readers.stored_block_size(file)
        if block_size not in (None, size):
            raise ValueError(f"{path.name} says itself how many tokens a block has: leave out block_size")
    assert chosen.read is not None
    return Trace(path.name, _source(path, chosen.read), block_size=size, errors=errors)


def _source(path: Path, read: Callable[[IO[str]], Parsed]) -> Callable[[], Parsed]:
    def source() -> Parsed:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            yield from read(file)

    return source


def _sharegpt(tokenizer: Any, block_size: int) -> Callable[[IO[str]], Parsed]:
    return lambda file: readers.sharegpt(file, tokenizer, block_size)


def _block_size(path: Path) -> int | None:
    with open(path, encoding="utf-8", errors="replace") as file:
        try:
            found: int | None = json.loads(file.readline(1 << 16)).get("block_size")
        except (ValueError, AttributeError):
            return None
    return found


def recognized(path: Path) -> str:
    """The format of a file, from the columns of its first line."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline(1 << 20).strip()
    if not first:
        raise ValueError(f"{path.name} has no requests: its first line is empty")
    if first.startswith("["):
        return "sharegpt"
    try:
        columns = set(json.loads(first)) if first.startswith("{") else {name.strip() for name in first.split(",")}
    except ValueError:
        columns = set()
    fitting = [name for name, known in FORMATS.items() if known.columns and known.columns <= columns]
    if not fitting:
        raise ValueError(f"{path.name}: cannot tell its format from its first line; give one of {', '.join(FORMATS)}")
    return max(fitting, key=lambda name: len(FORMATS[name].columns))


WRITTEN = ("labkit", "columns", "mooncake")


@dataclass(frozen=True)
class Written:
    """What `write_trace` did. `left_out` counts requests with a field that the format has no place for."""

    path: str
    requests: int
    left_out: dict[str, int]

    def __repr__(self) -> str:
        left = ", ".join(f"{name} of {count:,}" for name, count in self.left_out.items())
        return f"Written({self.path}: {self.requests:,} requests{f'; left out: {left}' if left else ''})"


def write_trace(trace: Trace, path: str | PathLike[str], format: str = "labkit") -> Written:
    """Write a trace to a file: "labkit" is JSON lines, "columns" the same in arrays, read much faster, "mooncake" its
    four fields.

    >>> from labkit.study.traces.trace import TraceRequest
    >>> trace = Trace.of([TraceRequest(0.5, 20, 3, (1, 2), session="a")], block_size=16)
    >>> write_trace(trace, "saved.jsonl")
    Written(saved.jsonl: 1 requests)
    >>> read_trace("saved.jsonl").head()[0].session
    'a'
    """
    path = Path(path)
    if format == "columns":
        return Written(path.name, write_columns(trace, path), {})
    line = choose("format to write", format, {"labkit": _own_line, "mooncake": _mooncake_line, "columns": None})
    assert line is not None
    num, left_out = 0, {}  # type: ignore[var-annotated]
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        if format == "labkit":
            file.write(json.dumps({"labkit_trace": 1, "block_size": trace.block_size, "name": trace.name}) + "\n")
        for request in trace:
            file.write(json.dumps(line(request), separators=(",", ":")) + "\n")
            num += 1
            if format == "mooncake":
                for name in ("tokens", "think", "hint", *NAMES):
                    if getattr(request, name) is not None:
                        left_out[name] = left_out.get(name, 0) + 1
    return Written(path.name, num, left_out)


def _own_line(request: TraceRequest) -> dict[str, Any]:
    row: dict[str, Any] = {"arrival": request.arrival, "prompt": request.num_prompt, "output": request.num_output}
    if request.hashes:
        row["hashes"] = list(request.hashes)
    if request.tokens is not None:
        row["tokens"] = list(request.tokens)
    row |= {name: value for name in (*NAMES, "think") if (value := getattr(request, name)) is not None}
    if request.hint is not None:
        row["hint"] = request.hint.written
    return row


def _mooncake_line(request: TraceRequest) -> dict[str, Any]:
    return {
        "timestamp": round(request.arrival * 1e3), "input_length": request.num_prompt,
        "output_length": request.num_output, "hash_ids": list(request.hashes),
    }  # fmt: skip
