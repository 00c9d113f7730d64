"""When each block of a trace is used again. Goes through the trace once and reads it backwards from temporary files, so
memory follows the number of different blocks and not the length of the trace."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import IO

from labkit.study.traces.trace import Trace

NEVER = float(2**62)
CHUNK = 1 << 18  # entries that are read at once


class Future:
    """For every request of a trace, in order, the index of the request that uses each of its blocks next.

    >>> from labkit.study.traces.trace import TraceRequest
    >>> requests = [TraceRequest(0.0, 20, 1, (7, 8)), TraceRequest(1.0, 20, 1, (7, 9))]
    >>> with Future(Trace.of(requests, block_size=16)) as future:
    ...     [list(next_use) for next_use in future] == [[1, NEVER], [NEVER, NEVER]]
    True
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __enter__(self) -> Future:
        self._lengths, self._next = array("q"), tempfile.TemporaryFile()
        with tempfile.TemporaryFile() as hashes:
            for request in self.trace:
                self._lengths.append(len(request.hashes))
                array("q", request.hashes).tofile(hashes)
            self._number_backwards(hashes)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._next.close()

    def __iter__(self) -> Iterator[array[float]]:
        """Requests from first to last, whose entries lie in the file from its end to its beginning."""
        at = sum(self._lengths)
        begin, held = at, array("d")
        for length in self._lengths:
            if at - length < begin:
                begin = max(0, min(at - length, at - CHUNK))
                held = _read(self._next, "d", begin, at - begin)
            entries = held[at - length - begin : at - begin]
            entries.reverse()
            yield entries
            at -= length

    def _number_backwards(self, hashes: IO[bytes]) -> None:
        """Write, from the last use to the first, which request uses the block next."""
        seen: dict[int, int] = {}
        get = seen.get
        at = begin = sum(self._lengths)
        held: array[int] = array("q")
        out = array("d")
        for index in range(len(self._lengths) - 1, -1, -1):
            length = self._lengths[index]
            if at - length < begin:
                begin = max(0, min(at - length, at - CHUNK))
                held = _read(hashes, "q", begin, at - begin)
            own = held[at - length - begin : at - begin]
            own.reverse()
            out.extend([get(digest, NEVER) for digest in own])
            seen.update(dict.fromkeys(own, index))
            at -= length
            if len(out) > CHUNK:
                out.tofile(self._next)
                out = array("d")
        out.tofile(self._next)
        self._next.flush()


def _read(file: IO[bytes], kind: str, first: int, num: int) -> array:  # type: ignore[type-arg]
    found = array(kind)
    file.seek(8 * first)
    found.fromfile(file, num)
    return found
