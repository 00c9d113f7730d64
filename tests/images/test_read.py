"""`read_image`: what is read, how it looks, what its digest says, and what is refused with which words."""

import io
import os
import tracemalloc

import numpy as np
import pytest

from labkit.images import Image, ImageError, Limits, read_image
from tests.images.pictures import PIL, bomb, chunk, data_url, file_of, picture, png


def shown(image):
    """[height, width, 3]"""
    return np.asarray(image.pixels)


LOSSLESS = [("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {})]


@pytest.mark.parametrize(("format", "more"), LOSSLESS, ids=lambda one: str(one))
def test_every_way_to_give_an_image_gives_the_same_pixels_and_the_same_digest(format, more, tmp_path):
    given = picture() if format != "GIF" else picture().quantize(16)
    data = file_of(given, format, **more)
    path = tmp_path / "picture"
    path.write_bytes(data)
    kind = f"image/{format.lower()}"
    opened = PIL.Image.open(io.BytesIO(data))
    sources = [given, data, bytearray(data), path, str(path), data_url(data, kind), opened, read_image(data)]
    found = [read_image(source) for source in sources]
    assert all(np.array_equal(shown(image), np.asarray(given.convert("RGB"))) for image in found)
    assert len({image.digest for image in found}) == 1 and len(set(found)) == 1
    assert found[1].size == (7, 5) and found[1].format == format and found[1].pixels.mode == "RGB"


def test_the_digest_depends_on_pixels_and_size_and_not_on_the_file():
    one, other = picture(seed=0), picture(seed=1)
    assert read_image(file_of(one)) == read_image(file_of(one, "WEBP", lossless=True))
    assert read_image(one) != read_image(other)
    black = [read_image(PIL.Image.new("RGB", size)) for size in ((2, 6), (6, 2), (3, 4), (12, 1))]
    assert len({image.digest for image in black}) == 4  # the same bytes, of another shape


def test_an_image_is_a_copy_that_later_changes_do_not_reach():
    given = picture()
    image = read_image(given)
    before = shown(image).copy()
    given.paste("red", (0, 0, 7, 5))
    assert np.array_equal(shown(image), before)


def test_jpeg_is_read_as_pillow_decodes_it():
    data = file_of(picture(33, 17), "JPEG", quality=90)
    assert np.array_equal(shown(read_image(data)), np.asarray(PIL.Image.open(io.BytesIO(data))))


# What a camera calls its turn, and what has to be done so that the picture is upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_the_orientation_of_exif_is_applied_once(orientation, format):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    given = picture()
    data = file_of(given, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    upright = UPRIGHT[orientation](np.asarray(given))
    image = read_image(data)
    assert np.array_equal(shown(image), upright)
    assert np.array_equal(shown(read_image(image.pixels)), upright)  # it is not turned again
    assert np.array_equal(shown(read_image(PIL.Image.open(io.BytesIO(data)))), upright)


def test_exif_that_cannot_be_read_turns_nothing():
    data = png(2, 1, 8, 2, [bytes(range(6))], chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"))
    assert shown(read_image(data)).tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_over_white(mode):
    given = picture(mode="RGBA").convert(mode)
    colours = np.asarray(given.convert("RGBA")).astype(float)
    alpha = colours[..., 3:] / 255
    expected = colours[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(shown(read_image(file_of(given))) - expected).max() <= 1


def test_a_transparent_colour_lies_over_white_in_palettes_gray_colour_and_16_bits():
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert shown(read_image(file_of(palette, transparency=0))).tolist() == [[[255] * 3, [40, 50, 60]]]
    assert shown(read_image(png(2, 1, 8, 0, [b"\7\x09"], chunk(b"tRNS", b"\0\7")))).tolist() == [[[255] * 3, [9] * 3]]
    clear = chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3]))
    assert shown(read_image(png(2, 1, 8, 2, [bytes(range(1, 7))], clear))).tolist() == [[[255] * 3, [4, 5, 6]]]
    gray = png(2, 1, 16, 0, [b"\x12\x34\x56\x78"], chunk(b"tRNS", b"\x12\x34"))
    assert shown(read_image(gray)).tolist() == [[[255] * 3, [0x56] * 3]]
    deep = png(2, 1, 16, 2, [bytes(range(16, 28))], chunk(b"tRNS", bytes(range(16, 22))))
    assert shown(read_image(deep)).tolist() == [[[255] * 3, [22, 24, 26]]]


def test_sixteen_bits_become_their_upper_eight():
    assert shown(read_image(png(2, 1, 16, 0, [b"\x12\xff\xfe\x00"]))).tolist() == [[[0x12] * 3, [0xFE] * 3]]
    assert shown(read_image(png(1, 1, 16, 2, [b"\x01\xff\x80\x00\xff\xff"]))).tolist() == [[[1, 128, 255]]]


def test_one_bit_gray_and_palette_are_colours():
    assert shown(read_image(file_of(PIL.Image.new("1", (1, 1), 1)))).tolist() == [[[255] * 3]]
    assert shown(read_image(file_of(PIL.Image.new("L", (1, 1), 77)))).tolist() == [[[77] * 3]]


def test_of_a_photo_with_several_pictures_the_first_is_read():
    data = file_of(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    first = PIL.Image.open(io.BytesIO(data))
    assert first.format == "MPO" and first.n_frames == 2
    assert np.array_equal(shown(read_image(data)), np.asarray(first))


def test_it_prints_and_shows_itself():
    image = read_image(file_of(picture(300, 200)))
    assert repr(image).startswith("Image(300x200 PNG, ") and "<img src=" in image._repr_html_()
    assert read_image(image.thumbnail(50)).size == (50, 33)


# -- what is refused -------------------------------------------------------------------------------------------------


def animation(format, **more):
    return file_of(picture(), format, save_all=True, append_images=[picture(seed=1)], duration=40, **more)


REFUSED = {
    "cmyk": (file_of(PIL.Image.new("CMYK", (2, 2)), "JPEG"), "CMYK"),
    "gif animation": (animation("GIF"), "animation"),
    "webp animation": (animation("WEBP"), "animation"),
    "png animation": (animation("PNG"), "animation"),
    "bmp": (file_of(picture(), "BMP"), "this is a BMP image; images are PNG, JPEG, WebP or GIF"),
    "tiff": (file_of(picture(), "TIFF"), "TIFF"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "pdf": (b"%PDF-1.7", "PDF"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
    "video": (b"\0\0\0\x18ftypisom" + bytes(20), "video"),
    "wav": (b"RIFF\0\0\0\0WAVEfmt ", "sound"),
    "text": (b"hello", "no image"),
    "nothing": (b"", "empty"),
    "half a header": (file_of(picture())[:20], "cut off within its header"),
    "no pixels": (png(0, 5, 8, 2, []), "0 x 5"),
    "half": (file_of(picture(64, 64))[:3000], "broken"),
    "half a jpeg": (file_of(picture(64, 64), "JPEG")[:900], "broken"),
    "half a webp": (file_of(picture(64, 64), "WEBP")[:500], "broken"),
    "half a gif": (file_of(picture(64, 64), "GIF")[:900], "broken"),
    "wrong checksum": (file_of(picture()).replace(b"IDAT", b"IDAT\0", 1), "broken"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_of_the_listed_formats_is_refused_by_name(name):
    data, words = REFUSED[name]
    with pytest.raises(ImageError, match=words):
        read_image(data)


def test_a_broken_gif_of_which_a_second_picture_is_cut_off_is_an_animation():
    with pytest.raises(ImageError, match="animation"):
        read_image(animation("GIF")[:-20])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_huge_picture_is_refused_by_its_header(format):
    data = bomb(format)
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"pixels; at most 50,000,000 are decoded: scale it down"):
        read_image(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_gif_whose_picture_is_larger_than_its_screen_counts_as_pillow_makes_room_for_it():
    data = bytearray(file_of(picture(), "GIF"))
    at = data.index(b",\0\0\0\0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageError, match="65535 x 65535"):
        read_image(bytes(data))


def test_limits_are_those_given_and_hold_for_every_kind_of_source(tmp_path):
    small = Limits(max_bytes=100, max_pixels=34)
    path = tmp_path / "large.png"
    path.write_bytes(bytes(101))
    for source in (bytes(101), path, data_url(bytes(101))):
        with pytest.raises(ImageError, match="the image has 101 bytes; at most 100 are read"):
            read_image(source, limits=small)
    with pytest.raises(ImageError, match=r"characters; at most 100 bytes"):
        read_image(data_url(bytes(3000)), limits=small)
    for source in (picture(), read_image(picture())):
        with pytest.raises(ImageError, match=r"7 x 5, 35 pixels; at most 34"):
            read_image(source, limits=small)
    assert read_image(picture(), limits=Limits(max_pixels=35)).size == (7, 5)
    with pytest.raises(ValueError, match="max_pixels must be at most 89478485"):
        Limits(max_pixels=10**9)
    with pytest.raises(TypeError, match="did you mean 'max_pixels'"):
        Limits(max_pixel=1)


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "F", "I"])
def test_pil_images_of_other_modes_are_refused_with_what_to_do(mode):
    with pytest.raises(ImageError, match=r"convert it to RGB|scale them to 8"):
        read_image(PIL.Image.new(mode, (2, 2)))


def test_a_pil_image_of_an_animation_or_a_broken_file_is_refused():
    with pytest.raises(ImageError, match="animation"):
        read_image(PIL.Image.open(io.BytesIO(animation("GIF"))))
    with pytest.raises(ImageError, match="broken"):
        read_image(PIL.Image.open(io.BytesIO(file_of(picture(64, 64))[:3000])))


def test_an_error_of_a_path_names_the_file_and_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("missing.png", "No such file"), (".", "is no regular file"), ("pipe", "is no regular file")):
        with pytest.raises(ImageError, match=words) as failure:
            read_image(tmp_path / name)
        assert str(tmp_path.parent) not in str(failure.value)
    with pytest.raises(ImageError, match="not valid"):
        read_image("a\0b")


@pytest.mark.parametrize("source", [None, 7, [1, 2], np.zeros((2, 2, 3), np.uint8), {"image": "x"}])
def test_other_objects_are_refused_by_their_type(source):
    with pytest.raises(ImageError, match="a PIL image, a path, bytes or a data: URL"):
        read_image(source)


@pytest.mark.parametrize("url", ["http://localhost/x.png", "https://a.b/c", "file:///etc/passwd", "ftp://a/b"])
def test_nothing_is_fetched(url):
    with pytest.raises(ImageError, match=f"{url.partition(':')[0]}: URLs are not fetched here"):
        read_image(url)


# -- data: URLs ------------------------------------------------------------------------------------------------------


def test_a_data_url_may_leave_its_type_out_or_write_it_otherwise():
    data = file_of(picture(), "JPEG")
    for kind in ("image/jpeg", "IMAGE/JPG", "image/jpeg;charset=utf-8", "", "image", "application/octet-stream"):
        assert read_image(data_url(data, kind)).format == "JPEG"
    broken = data_url(data).replace("image/png", "image/jpeg")
    assert read_image(f"{broken[:60]}\r\n {broken[60:]}".replace("data:", "DATA:")).format == "JPEG"


PNG = file_of(picture())
BAD_URLS = {
    data_url(PNG, "image/jpeg"): "declared as image/jpeg, and it is image/png: declare what it is",
    data_url(PNG, "text/html"): "its type is 'text/html'; images are PNG",
    data_url(PNG, "video/mp4"): "its type is 'video/mp4'",
    data_url(PNG, "image/svg+xml"): r"its type is 'image/svg\+xml'",
    "data:image/png;base64": "no comma",
    "data:image/png,abc": "must be base64",
    "data:,": "must be base64",
    "data:image/png;base64,": "empty",
    "data:image/png;base64,@@@@": "not valid base64",
    "data:image/png;base64,abc": "not valid base64",
    "data:image/png;base64,\u00e4\u00f6": "not valid base64",
    "data:image/png;base64,aGVsbG8=": "no image",
}


@pytest.mark.parametrize("url", BAD_URLS, ids=BAD_URLS.values())
def test_a_data_url_that_lies_or_is_broken_is_refused_with_the_reason(url):
    with pytest.raises(ImageError, match=BAD_URLS[url]):
        read_image(url)


def test_images_compare_by_what_they_show():
    assert Image(None, b"a", "PNG") == Image(1, b"a", "GIF") != Image(1, b"b", "GIF")
