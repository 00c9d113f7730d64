"""Messages between two processes that share a key, over any stream socket. Both sides prove that they know the key, and
every message carries a tag, so that damaged, repeated or foreign bytes end the connection. Nothing is secret: messages
can be read on the way. Knows nothing of what is said."""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time

HELLO = b"labkit-sealed-1"
NONCE = TAG = 32
HEAD = struct.Struct("<QB")  # length, kind


class Broken(ConnectionError):
    """The other side does not know the key, has ended, or sent what it should not."""


class Sealed:
    """One end of a connection. Whatever it does after `deadline` (of `time.monotonic`) raises a TimeoutError.

    >>> a, b = socket.socketpair()
    >>> Sealed(a, key).prove(), Sealed(b, key).demand()     # each in a thread of its own
    """

    def __init__(self, sock: socket.socket, key: bytes, deadline: float = float("inf")) -> None:
        self.socket, self.key, self.deadline = sock, key, deadline
        self._sent = self._received = 0
        self._mine = self._theirs = b""  # keys of the two directions

    def prove(self) -> None:
        """The side that has connected begins the conversation."""
        self._shake(b"client", b"server")

    def demand(self) -> None:
        """The side that was connected to."""
        self._shake(b"server", b"client")

    def _shake(self, me: bytes, other: bytes) -> None:
        nonce = secrets.token_bytes(NONCE)
        self._send_all(HELLO + nonce)
        said = bytes(self._exactly(len(HELLO) + NONCE))
        if not said.startswith(HELLO):
            raise Broken("what answers there speaks another language")
        theirs = said[len(HELLO) :]
        both = nonce + theirs if me == b"client" else theirs + nonce  # the client's first
        self._mine, self._theirs = (hmac.digest(self.key, HELLO + side + both, "sha256") for side in (me, other))
        self.send("H")
        if self.receive(0)[0] != "H":
            raise Broken("the other side did not prove that it knows the key")

    def send(self, kind: str, *parts: bytes | memoryview) -> None:
        """`kind` is one letter."""
        head = HEAD.pack(sum(len(part) for part in parts), ord(kind))
        tag = self._tag(self._mine, self._sent, (head, *parts))
        self._sent += 1
        for part in (head, *parts, tag):
            self._send_all(part)

    def receive(self, most: int) -> tuple[str, bytearray]:
        """The next message, of at most so many bytes."""
        head = bytes(self._exactly(HEAD.size))
        length, kind = HEAD.unpack(head)
        if length > most:
            raise Broken(f"a message of {length} bytes, where {most} were expected at most")
        data, tag = self._exactly(length), self._exactly(TAG)
        if not hmac.compare_digest(tag, self._tag(self._theirs, self._received, (head, data))):
            raise Broken("a message is damaged, or the other side has another key")
        self._received += 1
        return chr(kind), data

    @staticmethod
    def _tag(key: bytes, nth: int, parts: tuple[bytes | bytearray | memoryview, ...]) -> bytes:
        made = hmac.new(key, nth.to_bytes(8, "little"), "sha256")
        for part in parts:
            made.update(part)
        return made.digest()

    def _wait(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        self.socket.settimeout(None if left == float("inf") else left)

    def _send_all(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            self._wait()
            view = view[self.socket.send(view[: 2**20]) :]

    def _exactly(self, num: int) -> bytearray:
        data = bytearray(num)
        view = memoryview(data)
        while view:
            self._wait()
            if not (got := self.socket.recv_into(view)):
                raise Broken("the other side has closed the connection")
            view = view[got:]
        return data

    def close(self) -> None:
        self.socket.close()
