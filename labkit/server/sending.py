"""Writes a step's chunks to their connections in one call, past the ASGI layers and without the interpreter's lock.

Knows sockets and uvicorn's connections. Knows nothing of what is in a chunk.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

log = logging.getLogger("labkit.server")
Send = Callable[[Sequence[int], Sequence[bytes]], Sequence[int]]


class Connection:
    """Where the chunks of one answer go (`bridge.Line`). It stays out of the way of a slow reader: what one write did
    not take, the transport keeps, and until that has left the line is not free."""

    __slots__ = ("cycle", "socket", "transport")

    def __init__(self, cycle: RequestResponseCycle, transport: asyncio.Transport) -> None:
        self.cycle, self.transport = cycle, transport
        is_encrypted = transport.get_extra_info("ssl_object") is not None
        self.socket = None if is_encrypted else transport.get_extra_info("socket").fileno()

    @property
    def is_free(self) -> bool:
        cycle = self.cycle
        if cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        return not self.transport.is_closing() and not self.transport.get_write_buffer_size()

    @staticmethod
    def write_all(chunks: Sequence[tuple[Connection, bytes]]) -> None:
        """Write a chunk of an answer to each of these free lines."""
        send = library()
        framed = [(line, b"%x\r\n%b\r\n" % (len(chunk), chunk)) for line, chunk in chunks]
        direct = [] if send is None else [(line, chunk) for line, chunk in framed if line.socket is not None]
        if send is None or len(direct) < len(framed):
            for line, chunk in framed:
                if send is None or line.socket is None:
                    line.transport.write(chunk)
        if send is not None and direct:
            sockets: Any = [line.socket for line, _ in direct]
            sent = send(sockets, [chunk for _, chunk in direct])
            for (line, chunk), num in zip(direct, sent, strict=True):
                if num < len(chunk):  # full, or broken, which the transport finds out
                    line.transport.write(chunk[num:])


@lru_cache(maxsize=1)
def library() -> Send | None:
    """The call that writes to many sockets; None where it cannot be built, then each is written to by itself."""
    from labkit_kernels.native import BuildError, build

    try:
        function = ctypes.CDLL(str(build(Path(__file__).with_name("send.cpp")))).send_chunks
    except (BuildError, OSError) as error:
        log.info("chunks are written one by one: %s", error)
        return None
    function.restype = None

    def send(sockets: Sequence[int], chunks: Sequence[bytes]) -> Sequence[int]:
        num = len(sockets)
        longs = ctypes.c_long * num
        sent = longs()
        function(num, (ctypes.c_int * num)(*sockets), (ctypes.c_char_p * num)(*chunks), longs(*map(len, chunks)), sent)
        return list(sent)

    return send
