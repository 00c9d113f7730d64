"""What an image may be: formats, bytes, pixels, seconds; and the errors of one that may not. Knows no image library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labkit.core.options import named_options, real, whole

MIB = 2**20
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
LISTED = "PNG, JPEG, WebP or GIF"
MOST_PIXELS = 89_478_485  # from here on Pillow warns of its own accord


class ImageError(ValueError):
    """What is wrong with an image."""


class ImagesBusy(ImageError):
    """Nothing is wrong with the image: all threads that read images are busy."""


@named_options
@dataclass(frozen=True)
class Limits:
    """Bounds of one image. `max_bytes` is of the file, `max_pixels` of the picture: a small file may hold a huge one.
    Fetching and decoding have `seconds` each.

    >>> Limits(max_pixels=1_000_000).max_bytes
    20971520
    """

    max_bytes: int = 20 * MIB
    max_pixels: int = 50_000_000
    seconds: float = 10.0

    def __post_init__(self) -> None:
        whole("max_bytes", self.max_bytes, least=1, most=2**30)
        whole("max_pixels", self.max_pixels, least=1, most=MOST_PIXELS)
        real("seconds", self.seconds, least=0.0, most=3600.0, open_left=True)

    def check_bytes(self, num: int) -> None:
        if num > self.max_bytes:
            raise ImageError(f"the image has {num:,} bytes; at most {self.max_bytes:,} are read")

    def check_pixels(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise ImageError(f"the image is {width} x {height} pixels: there is nothing to see")
        if width * height > self.max_pixels:
            raise ImageError(
                f"the image is {width} x {height}, {width * height:,} pixels; at most {self.max_pixels:,} are decoded: "
                "scale it down"
            )


def pillow() -> Any:
    """PIL.Image, or an error that names the extra."""
    try:
        import PIL.Image
    except ImportError:
        raise ImportError("images need Pillow: pip install 'labkit[images]'") from None
    return PIL.Image
