"""Reads format, size and number of pictures from the first bytes of a file. Decodes nothing, allocates nothing.

Pillow's own headers come later and must agree: its WebP reader allocates the whole picture before it says the size.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from labkit.images.limits import LISTED, ImageError

KNOWN = (  # formats that people send, and that are refused by their names
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop document"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document, perhaps an SVG drawing"),
    (b"<!doc", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"ID3", "sound (MP3)"),
    (b"OggS", "sound or a video (Ogg)"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
)
BOXES = {b"heic": "a HEIC image", b"heix": "a HEIC image", b"mif1": "a HEIF image", b"avif": "an AVIF image"}


class Header(NamedTuple):
    """What a file says of itself. `num_frames` is 2 for any animation."""

    format: str
    width: int
    height: int
    num_frames: int = 1


def read_header(data: bytes) -> Header:
    """An ImageError if this is no image of a format that is read, or its header is cut off.

    >>> read_header(b"GIF89a" + bytes([2, 0, 3, 0, 0, 0, 0]))
    Header(format='GIF', width=2, height=3, num_frames=1)
    """
    if not data:
        raise ImageError("the image is empty: it has no bytes")
    for start, read in (
        (b"\x89PNG\r\n\x1a\n", _png),
        (b"\xff\xd8\xff", _jpeg),
        (b"GIF87a", _gif),
        (b"GIF89a", _gif),
        (b"RIFF", _webp),
    ):
        if data.startswith(start) and (start != b"RIFF" or data[8:12] == b"WEBP"):
            try:
                return read(data)
            except (struct.error, IndexError):
                raise ImageError("the image is cut off within its header") from None
    raise ImageError(f"{_kind(data)}; images are {LISTED}")


def _kind(data: bytes) -> str:
    head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, name in KNOWN:
        if data.startswith(start) or head.startswith(start.lower()):
            return f"this is {name}"
    if data[4:8] == b"ftyp":
        return f"this is {BOXES.get(data[8:12], 'a video (MP4)')}"
    if data.startswith(b"RIFF"):
        return "this is sound or a video (RIFF)"
    return "this is no image that is known here"


def _png(data: bytes) -> Header:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise ImageError("the PNG image does not begin with its header")
    at, num_frames = 8, 1
    while at + 8 <= len(data):  # chunks in front of the pixels
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"acTL" and struct.unpack_from(">I", data, at + 8)[0] > 1:
            num_frames = 2
        if kind in (b"IDAT", b"IEND"):
            break
        at += 12 + length
    return Header("PNG", width, height, num_frames)


def _jpeg(data: bytes) -> Header:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ImageError("the JPEG image is broken: there is no marker where one must be")
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("JPEG", width, height)
        elif marker in (0xD9, 0xDA):
            raise ImageError("the JPEG image is broken: its pixels come before its size")
        else:
            at += 2 if 0xD0 <= marker <= 0xD8 or marker == 1 else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, num_frames = 13 + _colors(flags), 0
    while at < len(data) and num_frames < 2:
        kind = data[at]
        if kind == 0x21:
            at = _after_blocks(data, at + 2)
        elif kind == 0x2C:
            if at + 10 > len(data):
                break
            left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, at + 1)
            width, height = max(width, left + wide), max(height, top + high)  # as Pillow makes room for it
            at, num_frames = _after_blocks(data, at + 11 + _colors(flags)), num_frames + 1
        else:
            break
    return Header("GIF", width, height, max(1, num_frames))


def _colors(flags: int) -> int:
    """Bytes of a colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(_exactly(data, at, 3), "little") + 1 for at in (24, 27))
        return Header("WEBP", width, height, 2 if data[20] & 2 else 1)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WEBP", width & 0x3FFF, height & 0x3FFF)
    raise ImageError("the WebP image does not begin with its header")


def _exactly(data: bytes, at: int, num: int) -> bytes:
    found = data[at : at + num]
    if len(found) < num:
        raise IndexError(at)
    return found
