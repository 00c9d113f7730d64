"""From the bytes of a file, or from a PIL image, to upright RGB pixels. Knows nothing of paths, URLs and threads."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from labkit.images.header import read_header
from labkit.images.limits import LISTED, ImageError, Limits, pillow

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
MODES = ("1", "L", "P", "RGB", "RGBX", "LA", "PA", "RGBA", "La", "RGBa", "YCbCr", "HSV")  # convertible without loss
WHY_NOT = {
    "CMYK": "its colours are CMYK, made for print: convert it to RGB",
    "LAB": "its colours are LAB: convert it to RGB",
    "I": "its pixels have 32 bits: scale them to 8",
    "F": "its pixels are floating-point numbers: scale them to 8 bits",
}


@dataclass(frozen=True)
class Image:
    """A decoded image. `pixels` is a PIL image of mode RGB: upright, transparent pixels over white. `digest` is the
    SHA-256 of its mode, size and pixels, so images are equal if they look the same, whatever file they came from."""

    pixels: Any = field(compare=False)
    digest: bytes
    format: str = field(compare=False, default="PIL")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        width, height = self.pixels.size
        return width, height

    def thumbnail(self, side: int = 64) -> str:
        """A data: URL of a PNG at most `side` pixels wide and high."""
        small = self.pixels.copy()
        small.thumbnail((side, side))
        file = io.BytesIO()
        small.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def __repr__(self) -> str:
        width, height = self.size
        return f"Image({width}x{height} {self.format}, {self.digest.hex()[:8]})"

    def _repr_html_(self) -> str:
        return f'<img src="{self.thumbnail(256)}" alt="{self!r}" title="{self!r}">'


def decode(data: bytes, limits: Limits) -> Image:
    """An image of one of `FORMATS`. Size and format are checked before a pixel is decoded."""
    limits.check_bytes(len(data))
    header = read_header(data)
    limits.check_pixels(header.width, header.height)
    if header.num_frames > 1:
        raise ImageError("the image is an animation: send one of its pictures")
    try:
        opened = pillow().open(io.BytesIO(data), formats=[header.format])
        if opened.size != (header.width, header.height):
            raise ImageError("the image is broken: it states two sizes")
        return _decoded(opened, header.format)
    except (ImageError, ImportError):
        raise
    except Exception as error:  # of many kinds: a decoder is a program over what somebody sent
        raise ImageError(f"the {header.format} image is broken: {_told(error)}") from None


def from_pil(image: Any, limits: Limits) -> Image:
    """A copy of a PIL image."""
    limits.check_pixels(*image.size)
    try:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ImageError("the image is an animation: send one of its pictures (image.seek(i); image.copy())")
        return _decoded(image, image.format or "PIL")
    except ImageError:
        raise
    except Exception as error:  # a file that was opened and not yet decoded
        raise ImageError(f"the image is broken: {_told(error)}") from None


def _told(error: Exception) -> str:
    """What Pillow says, without the reprs of files that it puts there."""
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    text = str(error).partition("<")[0].strip().rstrip(":")
    return text[:200] if isinstance(error, (OSError, ValueError, SyntaxError)) and text else "it cannot be decoded"


def _decoded(image: Any, format: str) -> Image:
    if image.mode not in MODES and not image.mode.startswith("I;16"):
        why = WHY_NOT.get(image.mode, f"its pixels are of mode {image.mode}: convert it to RGB")
        raise ImageError(f"the image cannot be read: {why} (images are {LISTED})")
    image.load()  # before EXIF is read, which would load it too, and whose errors are not told
    turn = TURNS.get(_orientation(image))
    found = _over_white(_with_alpha(image)) if image.has_transparency_data else _plain(image).convert("RGB")
    if turn is not None:
        found = found.transpose(getattr(pillow().Transpose, turn))
    found.info = {}
    width, height = found.size
    digest = hashlib.sha256(f"RGB {width} {height} ".encode())
    digest.update(found.tobytes())
    return Image(found, digest.digest(), format)


def _orientation(image: Any) -> int:
    """1 is upright; so is an image whose EXIF cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of many kinds, see `decode`
        return 1
    return found if isinstance(found, int) else 1


def _plain(image: Any) -> Any:
    """16 bits as their upper 8, as Pillow reads them in colour. Its own conversion would clip instead."""
    if not image.mode.startswith("I;16"):
        return image
    return pillow().fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _with_alpha(image: Any) -> Any:
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        found = _plain(image).convert("RGBA")
        found.putalpha(pillow().fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
        return found
    if image.mode == "RGB" and clear is not None and max(clear) > 255:  # of an image with 16 bits a colour
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA")


def _over_white(image: Any) -> Any:
    found = pillow().new("RGB", image.size, "white")
    found.paste(image, mask=image.getchannel("A"))
    return found
