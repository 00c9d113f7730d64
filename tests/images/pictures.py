"""Small pictures as files, made here. Tests that import this are skipped where Pillow is not installed."""

import base64
import io
import struct
import sys
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL.Image", reason="pip install 'labkit[images]'")
PIL = sys.modules["PIL"]


def picture(width=7, height=5, mode="RGB", seed=0):
    """Noise, so that no two positions look the same."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    return PIL.Image.fromarray(values.squeeze(), mode) if mode == "L" else PIL.Image.fromarray(values)


def file_of(image, format="PNG", **more):
    file = io.BytesIO()
    image.save(file, format, **more)
    return file.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, rows, *chunks):
    """A PNG from its raw rows, for what Pillow does not write."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(format, width=60_000, height=60_000):
    """A short file that states a huge size."""
    if format == "PNG":
        return png(width, height, 8, 2, [])
    if format == "GIF":
        return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + bytes(9) + b"\2\0;"
    if format == "WEBP":
        size = (16_383).to_bytes(3, "little")
        return b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size * 2 + bytes(80)
    small = bytearray(file_of(picture(), "JPEG"))
    at = small.index(b"\xff\xc0") + 5
    small[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(small)
