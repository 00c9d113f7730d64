"""How ranks that the engine's process did not start come to it: over a Unix socket on one host, over TCP from others.
Both sides prove with a shared token that they belong together. Knows nothing of what is said afterwards."""

from __future__ import annotations

import hmac
import os
import queue
import secrets
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

HELLO = b"labkit-rank-1"
NONCE = 32
RANK = struct.Struct("<I")
ANSWER = NONCE + RANK.size + 32
SECONDS_PROOF = 5.0  # for one that has connected
MOST_STRANGERS = 64  # connections that prove themselves at a time
LONGEST_PATH = 100  # of a Unix socket
SECONDS_SILENT = 10  # a host that no longer answers TCP


class Refused(ConnectionError):
    """The other side does not know the token, or is none of ours."""


class Entered(NamedTuple):
    """A rank's end of its connection; `memory` is the file of the shared memory, on the same host."""

    socket: socket.socket
    memory: int | None


class Door:
    """Listens for ranks until all are there. `host` None is a Unix socket in a folder that only this user can enter,
    through which ranks also get the shared memory `memory`; otherwise it is an address of this machine.

    >>> with Door() as door:
    ...     address, token = door.address, door.token
    """

    def __init__(self, host: str | None = None, memory: int | None = None) -> None:
        self.token = secrets.token_bytes(32)
        self.memory = memory if host is None else None
        self._folder: str | None = None
        self._entered: queue.Queue[tuple[int, socket.socket]] = queue.Queue()
        self._pending = threading.Semaphore(MOST_STRANGERS)
        if host is None:
            self._folder = tempfile.mkdtemp(prefix="labkit-")
            if len(self._folder) > LONGEST_PATH - 5:
                shutil.rmtree(self._folder)
                self._folder = tempfile.mkdtemp(prefix="labkit-", dir="/tmp")
            path = f"{self._folder}/door"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            self.address = f"unix:{path}"
        else:
            try:
                family, _, _, _, found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
                self._listener = socket.socket(family, socket.SOCK_STREAM)
                try:
                    self._listener.bind(found)
                except OSError:
                    self._listener.close()
                    raise
            except OSError as error:
                raise ValueError(f"{host!r} is no address of this machine to listen on for ranks: {error}") from error
            at, port = self._listener.getsockname()[:2]
            self.address = f"tcp:{at}:{port}"
        self._listener.listen(MOST_STRANGERS)
        self._listener.settimeout(0.2)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def accept(
        self, ranks: set[int], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, socket.socket]:
        """The connections of these ranks. `check` is called while waiting, and may raise. Strangers are turned away."""
        found: dict[int, socket.socket] = {}
        end = time.monotonic() + timeout
        try:
            while missing := ranks - found.keys():
                with suppress(TimeoutError):
                    stranger, _ = self._listener.accept()
                    self._let_prove(stranger)
                with suppress(queue.Empty):
                    while True:
                        rank, proved = self._entered.get_nowait()
                        if rank in missing and rank not in found:
                            found[rank] = proved
                        else:
                            proved.close()
                check()
                if time.monotonic() > end:
                    raise TimeoutError(f"rank {min(missing)} has not come to {self.address} within {timeout:g} s")
        except BaseException:
            for proved in found.values():
                proved.close()
            raise
        return found

    def _let_prove(self, stranger: socket.socket) -> None:
        """In a thread of its own, so that one who says nothing holds nobody up."""
        if not self._pending.acquire(blocking=False):
            stranger.close()
            return
        threading.Thread(target=self._prove, args=(stranger,), name="labkit-door", daemon=True).start()

    def _prove(self, stranger: socket.socket) -> None:
        try:
            stranger.settimeout(SECONDS_PROOF)
            mine = secrets.token_bytes(NONCE)
            stranger.sendall(HELLO + mine)
            said = _exactly(stranger, ANSWER)
            theirs, rank, proof = said[:NONCE], said[NONCE : NONCE + RANK.size], said[NONCE + RANK.size :]
            if not hmac.compare_digest(proof, _proof(self.token, b"rank", mine, theirs, rank)):
                raise Refused("a wrong token")
            answer = _proof(self.token, b"door", theirs, mine, rank)
            if self.memory is None:
                stranger.sendall(answer)
            else:
                socket.send_fds(stranger, [answer], [self.memory])
            _keep(stranger)
            self._entered.put((RANK.unpack(rank)[0], stranger))
        except OSError:
            stranger.close()
        finally:
            self._pending.release()

    def close(self) -> None:
        self._listener.close()
        while not self._entered.empty():
            self._entered.get()[1].close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def enter(address: str, token: bytes, rank: int, timeout: float = 30.0) -> Entered:
    """Connect to an engine's door as this rank."""
    kind, _, place = address.partition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            found = _connected(kind, place)
            break
        except OSError as error:
            if time.monotonic() > end or isinstance(error, FileNotFoundError):
                raise ConnectionError(f"rank {rank} cannot reach the engine at {address}: {error}") from error
            time.sleep(0.1)
    try:
        return _introduce(found, token, RANK.pack(rank), kind == "unix")
    except OSError as error:
        found.close()
        raise Refused(f"rank {rank} was not let in at {address}: {error}") from error


def _connected(kind: str, place: str) -> socket.socket:
    if kind != "unix":
        host, _, port = place.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=SECONDS_PROOF)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.connect(place)
    except OSError:
        found.close()
        raise
    return found


def _introduce(found: socket.socket, token: bytes, rank: bytes, is_local: bool) -> Entered:
    found.settimeout(SECONDS_PROOF)
    said = _exactly(found, len(HELLO) + NONCE)
    if not said.startswith(HELLO):
        raise Refused("what listens there is no engine")
    theirs, mine = said[len(HELLO) :], secrets.token_bytes(NONCE)
    found.sendall(mine + rank + _proof(token, b"rank", theirs, mine, rank))
    memory: int | None = None
    if is_local:
        answer, fds, _, _ = socket.recv_fds(found, 32, 1)
        memory = fds[0] if fds else None
        answer += _exactly(found, 32 - len(answer)) if answer else b""
    else:
        answer = _exactly(found, 32)
    if not hmac.compare_digest(answer, _proof(token, b"door", mine, theirs, rank)):
        if memory is not None:
            os.close(memory)
        raise Refused("the engine closed the connection, or does not know the token")
    _keep(found)
    return Entered(found, memory)


def _proof(token: bytes, side: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"".join((HELLO, side, *parts)), "sha256")


def _exactly(sock: socket.socket, num: int) -> bytes:
    found = b""
    while len(found) < num:
        data = sock.recv(num - len(found))
        if not data:
            raise Refused("the connection was closed")
        found += data
    return found


def _keep(sock: socket.socket) -> None:
    """For good: small messages at once, and an error when the other host has gone."""
    sock.settimeout(None)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", SECONDS_SILENT // 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", SECONDS_SILENT // 2),
        ("TCP_USER_TIMEOUT", SECONDS_SILENT * 1000),
    ):  # fmt: skip
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(asked, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if found[20:24] == socket.inet_aton(address):
                    return name
    return None
