"""Messages between the engine's process and one rank, over a socket that only these two hold. The other end is known
because it inherited its socket: nobody else can connect."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from contextlib import suppress
from typing import NamedTuple

HEAD = struct.Struct("<IB")  # length, kind
MOST = 2**31  # bytes of a message
BUFFER = 2**18


class Closed(ConnectionError):
    """The other process has ended."""


class Message(NamedTuple):
    kind: str  # one letter
    data: bytes


class Channel:
    """Never blocks in `send` while the other side does: what comes meanwhile is kept."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2**20)
        self._kept = bytearray()
        self._messages: deque[Message] = deque()
        self._poll = select.poll()
        self._is_over = False

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """This side, and the socket that the other process inherits."""
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        other.set_inheritable(True)
        return cls(mine), other

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, kind: str, data: bytes) -> None:
        if len(data) >= MOST:
            raise ValueError(f"a message of {len(data)} bytes is too long: at most {MOST}")
        view = memoryview(HEAD.pack(len(data), ord(kind)) + data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT, None)
                self._read()
            except OSError as error:
                raise Closed(str(error)) from None

    def receive(self, timeout: float | None = None, awake: float = 0.0) -> Message | None:
        """The next message; None after `timeout` seconds (None: never). For the first `awake` seconds it looks again
        and again, which gives its core to whoever wants it, and saves the time of waking up."""
        end = time.perf_counter() + awake if awake else 0.0
        while not self._messages:
            self._read()
            if self._messages:
                break
            if self._is_over:
                raise Closed("the process at the other end has ended")
            if awake and time.perf_counter() < end:
                os.sched_yield()
                continue
            if not self._wait(select.POLLIN, timeout) and timeout is not None:
                return None
        return self._messages.popleft()

    def _wait(self, events: int, timeout: float | None) -> bool:
        self._poll.register(self.socket, events)
        return bool(self._poll.poll(None if timeout is None else timeout * 1000))

    def _read(self) -> None:
        """Take what has come."""
        while not self._is_over:
            try:
                data = self.socket.recv(BUFFER)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._is_over = not data
            self._kept += data
            if len(data) < BUFFER:
                break
        at = 0
        while len(self._kept) - at >= HEAD.size:
            length, kind = HEAD.unpack_from(self._kept, at)
            end = at + HEAD.size + length
            if len(self._kept) < end:
                break
            self._messages.append(Message(chr(kind), bytes(self._kept[at + HEAD.size : end])))
            at = end
        if at:
            del self._kept[:at]

    @property
    def is_hung_up(self) -> bool:
        """Has the other side closed it? May be asked from any thread."""
        poll = select.poll()
        poll.register(self.socket, getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    def close(self, is_over: bool = False) -> None:
        """`is_over`: tell the other side that all went well, if it can be told without waiting."""
        if is_over:
            with suppress(OSError):
                self.socket.send(HEAD.pack(0, ord("Q")))
        self.socket.close()
