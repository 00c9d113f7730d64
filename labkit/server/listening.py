"""Where `labkit serve` listens: an address and a port, or a Unix domain socket, whose file it removes in the end."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from labkit.server.running import bind


@contextmanager
def listening(process: Mapping[str, Any], scheme: str = "http") -> Iterator[tuple[socket.socket, str]]:
    """A bound socket, and how to say where it is. With `uds`, host and port do not matter."""
    if "uds" in process:
        with _unix(process["uds"]) as found:
            yield found, f"unix:{process['uds']}"
        return
    with bind(process.get("host", "127.0.0.1"), process.get("port", 8000)) as found:
        host, port = found.getsockname()[:2]
        yield found, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def _unix(path: str) -> Iterator[socket.socket]:
    """The file has the permissions that the umask leaves: with 022 only its owner can connect."""
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as found:
        try:
            found.bind(path)
        except OSError as error:
            if error.errno is None:  # the path is too long: most systems take about a hundred bytes
                raise ValueError(f"--uds: {path}: {error}") from None
            raise OSError(error.errno, f"--uds: cannot listen on {path}: {error.strerror}") from None
        ours = os.stat(path).st_ino
        try:
            yield found
        finally:
            with suppress(OSError):  # gone, or already another server's
                if os.stat(path).st_ino == ours:
                    os.unlink(path)


def _remove_stale(path: str) -> None:
    """A socket that nobody listens on is what a killed server left behind."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, f"--uds: {path} exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, f"--uds: another process listens on {path}")
