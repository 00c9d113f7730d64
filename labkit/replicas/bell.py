"""An inbox that wakes a thread which waits for sockets."""

from __future__ import annotations

import queue
import socket
from contextlib import suppress
from typing import Any


class Bell:
    """Wakes the front's thread from waiting for its replicas."""

    def __init__(self) -> None:
        self.out, self.into = socket.socketpair()
        self.out.setblocking(False)
        self.into.setblocking(False)

    def ring(self) -> None:
        with suppress(OSError):  # it has rung often enough, or is closed
            self.into.send(b"!")

    def hush(self) -> None:
        with suppress(OSError):
            self.out.recv(4096)

    def close(self) -> None:
        self.out.close()
        self.into.close()


class Inbox(queue.SimpleQueue[Any]):
    """An inbox that rings."""

    def __init__(self, bell: Bell) -> None:
        super().__init__()
        self.bell = bell

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self.bell.ring()
