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
        direct: list[tuple[Connection, bytes]] = []
        sockets: list[int] = []
        for line, chunk in chunks:
            framed = b"%x\r\n%b\r\n" % (len(chunk), chunk)
            if send is None or line.socket is None:
                line.transport.write(framed)
            else:
                direct.append((line, framed))
                sockets.append(line.socket)
        if send is None or not direct:
            return
        sent = send(sockets, [framed for _, framed in direct])
        for (line, framed), num in zip(direct, sent, strict=True):
            if num < len(framed):  # full, or broken, which the transport finds out
                line.transport.write(framed[num:])


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
