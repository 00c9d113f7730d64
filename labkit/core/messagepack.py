"""MessagePack for plain data: None, bools, whole numbers of 64 bits, floats, text, bytes, lists and dicts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

MOST_DEPTH = 64


def pack(value: Any) -> bytes:
    """
    >>> pack([1, "a"]).hex()
    '9201a161'
    """
    out = bytearray()
    _pack(value, out)
    return bytes(out)


def _pack(value: Any, out: bytearray) -> None:
    if value is None or value is True or value is False:
        out.append({None: 0xC0, False: 0xC2, True: 0xC3}[value])
    elif isinstance(value, int):
        _pack_int(value, out)
    elif isinstance(value, float):
        out += struct.pack(">Bd", 0xCB, value)
    elif isinstance(value, str):
        data = value.encode()
        if len(data) < 32:
            out.append(0xA0 | len(data))
        else:
            _head(len(data), (0xD9, 0xDA, 0xDB), out)
        out += data
    elif isinstance(value, (bytes, bytearray)):
        _head(len(value), (0xC4, 0xC5, 0xC6), out)
        out += value
    elif isinstance(value, (list, tuple)):
        if len(value) < 16:
            out.append(0x90 | len(value))
        else:
            _head(len(value), (None, 0xDC, 0xDD), out)
        for one in value:
            _pack(one, out)
    elif isinstance(value, dict):
        if len(value) < 16:
            out.append(0x80 | len(value))
        else:
            _head(len(value), (None, 0xDE, 0xDF), out)
        for key, one in value.items():
            _pack(key, out)
            _pack(one, out)
    else:
        raise TypeError(f"MessagePack has no form for {type(value).__name__}")


def _pack_int(value: int, out: bytearray) -> None:
    if -32 <= value < 128:
        out.append(value & 0xFF)
        return
    signed = value < 0
    for i, size in enumerate((1, 2, 4, 8)):
        if -(1 << 8 * size - 1) <= value < 0 if signed else value < 1 << 8 * size:
            out.append((0xD0 if signed else 0xCC) + i)
            out += value.to_bytes(size, "big", signed=signed)
            return
    raise ValueError(f"{value} has more than 64 bits")


def _head(length: int, codes: tuple[int | None, ...], out: bytearray) -> None:
    for code, size in zip(codes, (1, 2, 4), strict=True):
        if code is not None and length < 1 << 8 * size:
            out.append(code)
            out += length.to_bytes(size, "big")
            return
    raise ValueError(f"{length} entries are too many")


def unpack(data: bytes) -> Any:
    """The value. A ValueError says what is wrong with other bytes.

    >>> unpack(bytes.fromhex("9201a161"))
    [1, 'a']
    """
    reader = _Reader(data)
    try:
        value = reader.read(0)
    except (struct.error, IndexError):
        raise ValueError("it ends too early") from None
    if reader.at != len(data):
        raise ValueError(f"{len(data) - reader.at} bytes too many")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        if len(found) < size:
            raise ValueError("it ends too early")
        self.at += size
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def read(self, depth: int) -> Any:
        if depth > MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        code = self.take(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 256
        if code < 0x90:
            return self.mapping(code & 15, depth)
        if code < 0xA0:
            return self.sequence(code & 15, depth)
        if code < 0xC0:
            return self.take(code & 31).decode()
        read = _READ.get(code)
        if read is None:
            raise ValueError(f"0x{code:02x} is not read here")
        return read(self, depth)

    def sequence(self, length: int, depth: int) -> list[Any]:
        return [self.read(depth + 1) for _ in range(length)]

    def mapping(self, length: int, depth: int) -> dict[Any, Any]:
        found = {}
        for _ in range(length):
            key = self.read(depth + 1)
            if isinstance(key, (list, dict)):
                raise ValueError("a key is a list or a dict")
            found[key] = self.read(depth + 1)
        return found


_READ: dict[int, Callable[[_Reader, int], Any]] = {
    0xC0: lambda r, d: None, 0xC2: lambda r, d: False, 0xC3: lambda r, d: True,
    0xC4: lambda r, d: r.take(r.number(1)), 0xC5: lambda r, d: r.take(r.number(2)),
    0xC6: lambda r, d: r.take(r.number(4)),
    0xCA: lambda r, d: struct.unpack(">f", r.take(4))[0], 0xCB: lambda r, d: struct.unpack(">d", r.take(8))[0],
    0xCC: lambda r, d: r.number(1), 0xCD: lambda r, d: r.number(2), 0xCE: lambda r, d: r.number(4),
    0xCF: lambda r, d: r.number(8),
    0xD0: lambda r, d: int.from_bytes(r.take(1), "big", signed=True),
    0xD1: lambda r, d: int.from_bytes(r.take(2), "big", signed=True),
    0xD2: lambda r, d: int.from_bytes(r.take(4), "big", signed=True),
    0xD3: lambda r, d: int.from_bytes(r.take(8), "big", signed=True),
    0xD9: lambda r, d: r.take(r.number(1)).decode(), 0xDA: lambda r, d: r.take(r.number(2)).decode(),
    0xDB: lambda r, d: r.take(r.number(4)).decode(),
    0xDC: lambda r, d: r.sequence(r.number(2), d), 0xDD: lambda r, d: r.sequence(r.number(4), d),
    0xDE: lambda r, d: r.mapping(r.number(2), d), 0xDF: lambda r, d: r.mapping(r.number(4), d),
}  # fmt: skip
