"""Damaged images, at random: each is read or refused with an `ImageError`, and nothing else happens."""

import random

import numpy as np
import pytest

from labkit.images import Image, ImageError, Limits, read_image
from tests.images.pictures import PIL, file_of, picture

EXIF = PIL.Image.Exif()
EXIF[0x0112] = 6
ORIGINALS = {
    "png": file_of(picture(40, 30), exif=EXIF),
    "palette png": file_of(picture(40, 30).quantize(9), transparency=3),
    "jpeg": file_of(picture(40, 30), "JPEG", exif=EXIF),
    "progressive jpeg": file_of(picture(40, 30), "JPEG", progressive=True),
    "webp": file_of(picture(40, 30, "RGBA"), "WEBP", exif=EXIF),
    "lossless webp": file_of(picture(40, 30), "WEBP", lossless=True),
    "gif": file_of(picture(40, 30).quantize(9), "GIF", transparency=2),
}


def damaged(data, random):
    """Some of: bytes changed, a part cut out, doubled or filled, the end cut off; most often near the beginning."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 20))):
        if not data:
            break
        at = min(
            int(random.expovariate(1 / 60)) if random.random() < 0.7 else random.randrange(len(data)), len(data) - 1
        )
        end = at + int(random.expovariate(1 / 8)) + 1
        kind = random.randrange(5)
        if kind == 0:
            data[at] = random.randrange(256)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:end] = random.choice((b"\0", b"\xff", b"\x7f")) * (end - at)
        else:
            del data[random.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_damaged_image_is_read_or_refused_with_a_clear_error(name):
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    source, limits, refused = random.Random(seed), Limits(max_pixels=200_000), 0
    for i in range(120):
        data = damaged(ORIGINALS[name], source)
        try:
            image = read_image(data, limits=limits)
        except ImageError as error:
            refused += 1
            text = str(error)
            assert text.startswith(("the ", "this is ")) and len(text) < 250 and "0x" not in text, (i, text)
        else:
            assert isinstance(image, Image) and len(image.digest) == 32
            assert np.asarray(image.pixels).shape == (*reversed(image.size), 3)
    assert refused > 10  # the damage is real
