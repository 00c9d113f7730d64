"""`read_image`: from whatever people have at hand to an `Image`. Fetches nothing: see `urls.py`."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkit.images.decode import Image, decode, from_pil
from labkit.images.limits import FORMATS, LISTED, ImageError, Limits

ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
UNDECLARED = ("", "image", "image/*", "application/octet-stream", "binary/octet-stream")  # says nothing of the format
_SPACE = re.compile(r"\s+", re.ASCII)


def read_image(source: Any, *, limits: Limits | None = None) -> Image:
    """An image from a PIL image, a path, the bytes of a file, or a data: URL.

    >>> read_image("data:image/gif;base64,R0lGODlhAQABAPAAAAAAAAAAACwAAAAAAQABAAACAkQBADs=")
    Image(1x1 GIF, b1570eaa)
    """
    limits = Limits() if limits is None else limits
    if isinstance(source, Image):
        limits.check_pixels(*source.size)
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode(bytes(source), limits)
    if isinstance(source, str):
        scheme = scheme_of(source)
        if scheme == "data":
            return of_data_url(source, limits)
        if scheme is not None:
            raise ImageError(f"{scheme}: URLs are not fetched here; give a path, the bytes, or a data: URL")
    if isinstance(source, (str, os.PathLike)):
        return decode(read_file(Path(source), limits), limits)
    if all(hasattr(source, name) for name in ("getexif", "convert", "size", "mode")):
        return from_pil(source, limits)
    raise ImageError(f"an image is a PIL image, a path, bytes or a data: URL, got {type(source).__name__}")


def scheme_of(text: str) -> str | None:
    """http of http://host/path; None for a path, also one like C:\\picture.png."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text[:64])
    return found[1].lower() if found else None


def read_file(path: Path, limits: Limits) -> bytes:
    """The bytes of a regular file. A pipe or a device is refused, and does not keep anybody waiting."""
    try:
        opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path is not valid"
        raise ImageError(f"the image {path.name!r} cannot be opened: {reason}") from None
    try:
        about = os.fstat(opened)
        if not stat.S_ISREG(about.st_mode):
            raise ImageError(f"the image {path.name!r} is no regular file")
        limits.check_bytes(about.st_size)
        with os.fdopen(opened, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    finally:
        os.close(opened)
    limits.check_bytes(len(data))
    return data


def of_data_url(url: str, limits: Limits, decode: Callable[[bytes, Limits], Image] = decode) -> Image:
    """data:[type][;name=value];base64,bytes: the format must be the declared one."""
    about, comma, content = url[len("data:") :].partition(",")
    if not comma:
        raise ImageError("the data: URL has no comma in front of its data")
    kind, *more = [word.strip().lower() for word in about.split(";")]
    if not more or more[-1] != "base64":
        raise ImageError("the data: URL must be base64: data:image/png;base64,...")
    check_kind(kind)
    if len(content) > limits.max_bytes * 3:  # base64 is 4/3 of the bytes, with line ends a little more
        raise ImageError(f"the data: URL has {len(content):,} characters; at most {limits.max_bytes:,} bytes are read")
    try:
        data = _of_base64(content)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data: URL is not valid base64: {error}") from None
    image = decode(data, limits)
    check_format(kind, image)
    return image


def _of_base64(text: str) -> bytes:
    """Line ends are looked for only if there must be some: that takes longer than the decoding, and holds the GIL."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        if (shorter := _SPACE.sub("", text)) == text:
            raise
    return base64.b64decode(shorter, validate=True)


def check_kind(kind: str) -> None:
    """A declared media type must be that of an image which is read here."""
    if ALIASES.get(kind, kind) not in FORMATS.values() and kind not in UNDECLARED:
        raise ImageError(f"its type is {kind[:64]!r}; images are {LISTED}")


def check_format(kind: str, image: Image) -> None:
    """What was declared must be what was sent."""
    declared, found = ALIASES.get(kind, kind), FORMATS[image.format]
    if kind not in UNDECLARED and declared != found:
        raise ImageError(f"its type is declared as {kind}, and it is {found}: declare what it is")
