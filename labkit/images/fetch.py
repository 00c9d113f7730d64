"""Fetches a file over HTTP from a host that is allowed, and from nowhere else. Knows nothing of images.

The URL is taken apart once. The host's name must be on the list, all addresses that it resolves to must be public, and
the connection goes to one of these addresses: a name that resolves differently the next time changes nothing. Redirects
are not followed and proxies are not used.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast
from urllib.parse import SplitResult, urlsplit

from labkit.core.version import __version__
from labkit.images.limits import FORMATS, ImageError, Limits

PORTS = {"http": 80, "https": 443}
MOST_ADDRESSES = 4  # of a host that are tried
LONGEST_URL = 8192
INNER = [  # besides what `ipaddress` calls not global: networks that lead to addresses within others
    ipaddress.ip_network(one)
    for one in ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "::/96", "fec0::/10", "100.64.0.0/10")
]
Resolve = Callable[[str, int], list[str]]
Host = tuple[str, int | None]


class Target(NamedTuple):
    """Where a URL leads."""

    scheme: str
    host: str
    port: int
    path: str


class Answer(NamedTuple):
    data: bytes
    kind: str  # the declared media type


def hosts_of(names: Iterable[str]) -> frozenset[Host]:
    """The hosts of a list such as ["images.example.com", "cdn.example.com:8443"]. Without a port: the usual ones."""
    found = []
    for name in [names] if isinstance(names, str) else names:
        try:
            split = urlsplit(f"//{name}")
            host, port = split.hostname, split.port
        except ValueError:
            host, port = None, None
        if not host or split.path or split.query or split.fragment or "@" in name or "*" in name or not name.isascii():
            raise ValueError(
                f"allowed_media_domains takes names of hosts, such as images.example.com or cdn.example.com:8443, "
                f"got {name!r}"
            )
        found.append((host.rstrip("."), port))
    return frozenset(found)


def target_of(url: str, hosts: frozenset[Host]) -> Target:
    """Where an http or https URL leads, if its host is among these."""
    if len(url) > LONGEST_URL:
        raise ImageError(f"the URL has {len(url):,} characters; at most {LONGEST_URL:,} are read")
    if not url.isascii() or any(ord(one) <= 32 or ord(one) == 127 for one in url) or "\\" in url:
        raise ImageError("the URL has characters that must be percent-encoded")
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
    except ValueError:
        raise ImageError("the URL is not valid") from None
    if not host or "%" in host:
        raise ImageError("the URL has no host")
    if "@" in split.netloc:
        raise ImageError("the URL has a user name in it: that is not sent")
    host, usual = host.rstrip("."), PORTS[split.scheme]
    allowed = (host, port) in hosts or (port in (None, usual) and (host, None) in hosts)
    if not allowed:
        at = host if port in (None, usual) else f"{host}:{port}"
        raise ImageError(
            f"images from {at[:200]} are not fetched: the server may allow it with --allowed-media-domains; a data: "
            "URL needs no permission"
        )
    return Target(split.scheme, host, port or usual, _path(split))


def _path(split: SplitResult) -> str:
    return (split.path or "/") + (f"?{split.query}" if split.query else "")


def is_public(address: str) -> bool:
    """Whether this is an address of the public internet: not of this machine, of a private network, or of a tunnel.

    >>> [is_public(one) for one in ("93.184.215.14", "127.0.0.1", "::ffff:169.254.169.254", "100.64.0.1")]
    [True, False, False, False]
    """
    found: Any = ipaddress.ip_address(address)
    if found.version == 6 and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    outside = found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)
    return outside and not any(found in network for network in INNER if network.version == found.version)


def addresses_of(host: str, port: int) -> list[str]:
    return [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def fetch(
    target: Target, limits: Limits, *, resolve: Resolve = addresses_of, is_allowed: Callable[[str], bool] = is_public
) -> Answer:
    """The file there, or an ImageError that says why there is none. Ends within the limits' seconds, except for the
    system's own time limit of resolving a name."""
    until = time.monotonic() + limits.seconds
    try:
        with _connected(target, until, resolve, is_allowed) as opened:
            return _read(target, _Line(opened, until), limits)
    except TimeoutError:
        raise ImageError(f"the image did not arrive within {limits.seconds:g} s") from None
    except ssl.SSLError:
        raise ImageError(f"there is no trusted connection to {target.host}") from None
    except http.client.HTTPException:
        raise ImageError(f"{target.host} did not answer in HTTP") from None
    except OSError:
        raise ImageError(f"{target.host} cannot be reached") from None


def _connected(target: Target, until: float, resolve: Resolve, is_allowed: Callable[[str], bool]) -> socket.socket:
    try:
        found = list(dict.fromkeys(resolve(target.host, target.port)))
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise ImageError(f"the name {target.host} cannot be resolved")
    if not all(is_allowed(address.partition("%")[0]) for address in found):
        raise ImageError(f"{target.host} is not on the public internet: images are not fetched from there")
    for i, address in enumerate(found := found[:MOST_ADDRESSES]):
        try:
            opened = socket.create_connection((address, target.port), timeout=_left(until))
        except OSError:
            if i + 1 == len(found):
                raise
        else:
            break
    if target.scheme == "http":
        return opened
    try:
        opened.settimeout(_left(until))
        return ssl.create_default_context().wrap_socket(opened, server_hostname=target.host)
    except BaseException:
        opened.close()
        raise


def _read(target: Target, line: _Line, limits: Limits) -> Answer:
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = cast(Any, line)
    connection.default_port = PORTS[target.scheme]  # the Host header leaves it out
    headers = {"User-Agent": f"labkit/{__version__}", "Accept": ", ".join(FORMATS.values()),
               "Accept-Encoding": "identity", "Connection": "close"}  # fmt: skip
    connection.request("GET", target.path, headers=headers)
    answer = connection.getresponse()
    if 300 <= answer.status < 400:
        raise ImageError(f"{target.host} answered with a redirect, which is not followed: give the last URL")
    if answer.status != 200:
        raise ImageError(f"{target.host} answered with status {answer.status}")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ImageError(f"{target.host} sent a compressed answer, which is not read")
    length = answer.length
    limits.check_bytes(length or 0)
    data = bytearray()
    while len(data) <= limits.max_bytes and (piece := answer.read(min(2**16, limits.max_bytes + 1 - len(data)))):
        data += piece
    limits.check_bytes(len(data))
    if length is not None and len(data) != length:
        raise ImageError(f"{target.host} sent {len(data):,} of {length:,} bytes")
    return Answer(bytes(data), answer.headers.get("Content-Type", "").partition(";")[0].strip().lower())


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Line:
    """A socket as http.client uses it, in which all reading and writing together has one time limit."""

    def __init__(self, opened: socket.socket, until: float) -> None:
        self.opened, self.until = opened, until

    def sendall(self, data: bytes) -> None:
        self.opened.settimeout(_left(self.until))
        self.opened.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self.opened, self.until))

    def close(self) -> None:
        """http.client closes it before the answer is read; `fetch` does it at the end."""


class _Incoming(io.RawIOBase):
    def __init__(self, opened: socket.socket, until: float) -> None:
        self.opened, self.until = opened, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.opened.settimeout(_left(self.until))
        return self.opened.recv_into(buffer)
