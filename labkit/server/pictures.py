"""The images of a conversation: finds them in its content parts and reads them before the prompt is made.

Knows no chat template and no model's way with images. An error names the field: messages[1].content[0].image_url.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from labkit.images import Image, ImageError, ImagesBusy
from labkit.server.errors import ApiError, overloaded
from labkit.server.service import Service

MOST_IMAGES = 256  # of a call
MOST_PIXELS = 100_000_000  # of all images of a call: 300 MB
MOST_HELD = 500_000_000  # of all calls whose prompts are being made: 1.5 GB
SECONDS = 60.0  # for all images of a call; each has its own limits
DETAILS = ("auto", "low", "high", "original")
IMAGES = ("image_url", "input_image")
TEXTS = ("text", "input_text", "output_text", "refusal")
NOT_SERVED = {
    "input_audio": "audio", "audio_url": "audio", "audio": "audio", "audio_embeds": "audio",
    "video_url": "video", "input_video": "video", "video": "video",
}  # fmt: skip


class Wanted(NamedTuple):
    """An image of a call, by its field and its URL."""

    place: str
    url: str


def wanted_images(contents: Iterable[tuple[str, Any]]) -> list[Wanted]:
    """The images among these contents, each with its place, in order. Sound and video are refused.

    >>> wanted_images([("messages[0].content", [{"type": "image_url", "image_url": {"url": "data:..."}}])])
    [Wanted(place='messages[0].content[0].image_url', url='data:...')]
    """
    found = []
    for place, content in contents:
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, Mapping):
                continue
            kind = part.get("type")
            if kind in IMAGES:
                found.append(_wanted(part, f"{place}[{j}]"))
            elif isinstance(kind, str) and kind in NOT_SERVED:
                at = f"{place}[{j}].{kind}"
                raise ApiError(f"{at}: {NOT_SERVED[kind]} is not served; text and images are", param=at)
    return found


def _wanted(part: Mapping[str, Any], at: str) -> Wanted:
    place = f"{at}.image_url"
    given, detail = part.get("image_url"), part.get("detail")
    if part.get("file_id") is not None:
        raise ApiError(f"{at}.file_id: files are not kept here: send the image as image_url", param=f"{at}.file_id")
    if isinstance(given, Mapping):
        detail = given.get("detail", detail)
        given = given.get("url")
    if not isinstance(given, str):
        raise ApiError(f'{place} must be a URL, or {{"url": URL}}', param=place)
    if detail is not None and detail not in DETAILS:
        raise ApiError(f"{place}: detail is one of {', '.join(DETAILS)}", param=place)
    return Wanted(place, given)


@asynccontextmanager
async def reading(service: Service, wanted: Sequence[Wanted]) -> AsyncIterator[list[Image]]:
    """The images, read one after the other; inside, their pixels count as held. An ApiError names the first image that
    cannot be read."""
    if not wanted:
        yield []
        return
    _check_count(service, wanted)
    found: list[Image] = []
    num_pixels = 0
    try:
        async with asyncio.timeout(SECONDS):
            for one in wanted:
                place = one.place
                found.append(await service.image_urls.read(one.url))
                width, height = found[-1].size
                num_pixels += width * height
                service.num_pixels += width * height
                if num_pixels > MOST_PIXELS:
                    raise ImageError(f"the images of a call may have {MOST_PIXELS:,} pixels together")
                if service.num_pixels > MOST_HELD:
                    raise ImagesBusy("too many images are being read: try again later")
        yield found
    except ImagesBusy as error:
        raise overloaded(f"{place}: {error}") from None
    except ImageError as error:
        raise ApiError(f"{place}: {error}", param=place) from None
    except TimeoutError:
        raise ApiError(f"{place}: the images of this call took longer than {SECONDS:g} s", param=place) from None
    finally:
        service.num_pixels -= num_pixels


def _check_count(service: Service, wanted: Sequence[Wanted]) -> None:
    """Before anything is read."""
    model = service.engine.images
    if model is None:
        place = wanted[0].place
        raise ApiError(f"{place}: the model {service.name} takes text, no images", param=place)
    most = MOST_IMAGES if model.most is None else min(MOST_IMAGES, model.most)
    if len(wanted) > most:
        place = wanted[most].place
        raise ApiError(
            f"{place}: a prompt may have {most} images here (--limit-mm-per-prompt), this one has {len(wanted)}",
            param=place,
        )


def content_of(content: Any, place: str, images: Iterator[Image]) -> Any:
    """A message's content for the chat template: one text, or a list of parts if it holds images."""
    if not isinstance(content, list):
        return content or ""
    parts = [_part(part, f"{place}[{j}]", images) for j, part in enumerate(content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def _part(part: Mapping[str, Any], at: str, images: Iterator[Image]) -> dict[str, Any]:
    kind = part.get("type", "text")
    if kind in IMAGES:
        return {"type": "image", "image": next(images, None)}
    text = part.get("text", part.get("refusal"))
    if kind in TEXTS and isinstance(text, str):
        return {"type": "text", "text": text}
    if kind in TEXTS:
        raise ApiError(f"{at} has no text", param=at)
    raise ApiError(f"{at} is of type {str(kind)[:64]!r}; text and image_url are served", param=at)
