"""Traces in a file of columns: arrays that are read without parsing, some thirty times as fast as JSON lines. A header
line, then batches of requests, each a line of JSON and its arrays."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.sessions import Hint, Turn
from labkit.study.traces.trace import BadRequestError, Columns, Trace, TraceRequest, session_numbers

VERSION = 1
NAMES = ("id", "session", "tenant", "parent", "kind", "think", "parent_session", "hint")
BATCH = 4096  # requests


class ColumnTrace(Trace):
    """A trace in a file that `write_columns` wrote."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            header = _header(file, path.name)
        self.path = path
        super().__init__(path.name, self._requests, block_size=header["block_size"])

    def columns(self, size: int = BATCH) -> Iterator[Columns]:
        """One pass, as many requests at a time as the file holds together."""
        begin, latest = 0, 0.0
        for _, extra, arrays in self._batches():
            arrival, num_prompt, num_output, lengths, _, hashes, _ = arrays
            if (len(arrival) and arrival[0] < latest) or (np.diff(arrival) < 0).any():
                raise ValueError(f"{self.name}: time goes backwards; the file is damaged")
            latest = float(arrival[-1])
            indptr = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
            none = (None,) * len(arrival)
            session = session_numbers(extra.get("session") or none, begin)
            tenant = tuple(extra.get("tenant") or none)
            yield Columns(arrival, num_prompt, num_output, indptr, hashes, session, tenant, self._turns(extra))
            begin += len(arrival)
        if not begin:
            raise ValueError(f"{self.name} has no requests")

    def _turns(self, extra: dict[str, Any]) -> tuple[Turn | None, ...] | None:
        names = extra.get("session")
        if names is None:
            return None
        none = [None] * len(names)
        rows = zip(names, extra.get("parent_session") or none, self._hints(extra) or none, strict=True)
        return tuple(None if name is None else Turn(name, parent, hint) for name, parent, hint in rows)

    def _hints(self, extra: dict[str, Any]) -> list[Hint | None] | None:
        try:
            return [None if given is None else Hint.of(given) for given in extra.get("hint") or ()] or None
        except ValueError as error:
            raise ValueError(f"{self.name} is damaged: {error}") from None

    def _requests(self) -> Iterator[tuple[str, TraceRequest | BadRequestError]]:
        at = 0
        for _, extra, arrays in self._batches():
            arrival, num_prompt, num_output, lengths, num_tokens, hashes, tokens = arrays
            columns = [extra.get(name) or [None] * len(arrival) for name in NAMES]
            id, session, tenant, parent, kind, think, above, _ = columns
            hint = self._hints(extra) or [None] * len(arrival)
            ends, token_ends = (np.cumsum(each).tolist() for each in (lengths, num_tokens))
            owns, ids = array("q", hashes.tobytes()), array("i", tokens.tobytes())
            before = token_before = 0
            rows = zip(arrival.tolist(), num_prompt.tolist(), num_output.tolist(), ends, token_ends, strict=True)
            for i, (now, prompt, output, end, token_end) in enumerate(rows):
                own_ids = ids[token_before:token_end] if token_end > token_before else None
                yield f"request {at}", TraceRequest(
                    now, prompt, output, owns[before:end], own_ids, id[i], session[i], tenant[i], parent[i], think[i],
                    kind[i], above[i], hint[i],
                )  # fmt: skip
                before, token_before = end, token_end
                at += 1

    def _batches(self) -> Iterator[tuple[int, dict[str, Any], list[NDArray[Any]]]]:
        with open(self.path, "rb") as file:
            _header(file, self.name)
            while line := file.readline():
                try:
                    row = json.loads(line)
                    num, blocks, num_ids, crc = (row[name] for name in ("requests", "blocks", "tokens", "crc"))
                    data = file.read(8 * (5 * num + blocks) + 4 * num_ids)
                    if zlib.crc32(data) != crc:
                        raise ValueError("its checksum is wrong")
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.name} is damaged or cut off at byte {file.tell():,}: {error}") from None
                kinds = [np.float64, *[np.int64] * 5, np.int32]
                sizes, at, arrays = [num] * 5 + [blocks, num_ids], 0, []
                for kind, size in zip(kinds, sizes, strict=True):
                    arrays.append(np.frombuffer(data, kind, size, at))
                    at += size * np.dtype(kind).itemsize
                yield num, row, arrays


def _header(file: IO[bytes], name: str) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(file.readline(1 << 16))
        if header["labkit_columns"] != VERSION:
            raise ValueError(f"version {header['labkit_columns']!r}, this labkit reads {VERSION}")
        return {"block_size": header["block_size"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is not a trace of columns: {error}") from None


def write_columns(trace: Trace, path: Path) -> int:
    """Write all of a trace; returns the number of requests."""
    num, batch = 0, []
    with open(path, "wb") as file:
        file.write(json.dumps({"labkit_columns": VERSION, "block_size": trace.block_size}).encode() + b"\n")
        for request in trace:
            batch.append(request)
            if len(batch) == BATCH:
                num += _write(file, batch)
                batch = []
        if batch:
            num += _write(file, batch)
    return num


def _write(file: IO[bytes], batch: list[TraceRequest]) -> int:
    hashes, tokens = array("q"), array("i")
    for request in batch:
        hashes.extend(request.hashes)
        tokens.extend(request.tokens if request.tokens is not None else ())
    data = b"".join(
        [
            np.array([request.arrival for request in batch], np.float64).tobytes(),
            np.array([request.num_prompt for request in batch], np.int64).tobytes(),
            np.array([request.num_output for request in batch], np.int64).tobytes(),
            np.array([len(request.hashes) for request in batch], np.int64).tobytes(),
            np.array([0 if request.tokens is None else len(request.tokens) for request in batch], np.int64).tobytes(),
            hashes.tobytes(),
            tokens.tobytes(),
        ]
    )
    row: dict[str, Any] = {
        "requests": len(batch),
        "blocks": len(hashes),
        "tokens": len(tokens),
        "crc": zlib.crc32(data),
    }
    for name in NAMES:
        values = [getattr(request, name) for request in batch]
        if name == "hint":
            values = [None if hint is None else hint.written for hint in values]
        if any(value is not None for value in values):
            row[name] = values
    file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    file.write(data)
    return len(batch)
