"""Images of requests: the model's own processor turns them into arrays and placeholders. Knows no tower and no blocks.

Everything here happens in the caller's thread, when a request is submitted.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from labkit.core.blocks.spans import Span
from labkit.core.options import check_names, whole
from labkit.core.tokens import as_tokens
from labkit.images import Image, ImageUrls, read_image
from labkit.images.limits import pillow
from labkit.loading.towers import TEXT_ALONE
from labkit.text.huggingface import load_processor

MOST_BYTES = 2**28  # of processed images that are kept
MOST_THUMBNAILS, THUMBNAIL = 512, 64  # pictures of the latest images, at most this wide and high


@dataclass(frozen=True)
class Processed:
    """What the processor made of an image."""

    key: bytes  # the image's digest, and how it was processed
    arrays: dict[str, np.ndarray]
    text: str  # what stands for it in a prompt
    ids: tuple[int, ...]
    places: np.ndarray  # which of `ids` get features


class Images:
    """A model's image processor, with a bounded memory of what it made.

    `most` images a request; `kwargs` go to the processor (vLLM's `limit_mm_per_prompt` and `mm_processor_kwargs`).
    `most_bytes` of processed images are kept.
    """

    urls = ImageUrls()  # where images of chats may come from

    def __init__(
        self, processor: Any, config: Any, *, most: int | None = None, kwargs: Mapping[str, Any] | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:  # fmt: skip
        self.processor, self.most, self.kwargs = processor, most, dict(kwargs or {})
        self.token: str = getattr(processor, "placeholder", processor.image_token)  # in a prompt, for each image
        self.prompt_id = int(processor.image_token_id)
        self.token_id = int(config.image_token_id)  # at each position that gets a feature
        self.bidirectional = config.model_type == "gemma3"
        self.merge_size: int | None = getattr(config.vision_config, "spatial_merge_size", None)
        self.name = type(processor).__name__
        self._settings = _settings(processor)
        self._kept: OrderedDict[bytes, Processed] = OrderedDict()
        self._thumbnails: OrderedDict[bytes, str] = OrderedDict()
        self.most_bytes = most_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self.num_processed = self.num_found = 0

    def __repr__(self) -> str:
        size = f"{self._num_bytes / 2**20:.1f} of {self.most_bytes / 2**20:.0f} MiB"
        return f"Images({self.name}: {self.num_processed} processed, {self.num_found} found, {size})"

    def thumbnail(self, key: bytes) -> str | None:
        """A small picture of a span's image, as a data: URL; only the latest images have one."""
        return self._thumbnails.get(key)

    def place(
        self, prompt: Any, given: Any, encode: Any, more: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, tuple[Span, ...]]:
        """The token ids of a prompt with its images' placeholders, and the spans where the images lie. `prompt` is text
        or token ids, with one image token for each image; `encode` makes ids of text."""
        pictures = read_images(given, self.most)
        made = [self._process(picture, len(pictures), more or {}) for picture in pictures]
        if isinstance(prompt, str):
            parts = prompt.split(self.token)
            self._check_count(len(parts) - 1, len(made))
            text = "".join(part + one.text for part, one in zip(parts, made, strict=False)) + parts[-1]
            ids = np.array(encode(text), np.int32)
        else:
            ids = self._expand(as_tokens(prompt), made)
        return ids, self._spans(ids, made)

    def prompt_of(self, text: str, images: list[Any], encode: Any) -> dict[str, Any]:
        """A prompt of text with image tokens, its placeholders already in."""
        data = {"image": read_images({"image": images}, self.most)}
        return {"prompt_token_ids": self.place(text, data, encode)[0].tolist(), "multi_modal_data": data}

    def check_none(self, ids: np.ndarray) -> None:
        """Refuse image tokens of a prompt that brings no image."""
        if (num := int((ids == self.token_id).sum())) > 0:
            self._check_count(num, 0)

    def _check_count(self, num_tokens: int, num_images: int) -> None:
        if num_tokens != num_images:
            raise ValueError(
                f"prompt has {num_tokens} image tokens ({self.token!r}) and multi_modal_data {num_images} images: "
                f"write one token where each image belongs"
            )

    def _expand(self, ids: np.ndarray, made: list[Processed]) -> np.ndarray:
        """Image tokens replaced by what stands for the images; a prompt that has it already is left as it is."""
        if int((ids == self.token_id).sum()) == sum(len(one.places) for one in made):
            return ids
        at = (ids == self.prompt_id).nonzero()[0]
        self._check_count(len(at), len(made))
        parts, last = [], 0
        for place, one in zip(at.tolist(), made, strict=True):
            parts += [ids[last:place], np.array(one.ids, np.int32)]
            last = place + 1
        return np.concatenate([*parts, ids[last:]])

    def _spans(self, ids: np.ndarray, made: list[Processed]) -> tuple[Span, ...]:
        at = (ids == self.token_id).nonzero()[0]
        needed = sum(len(one.places) for one in made)
        if len(at) != needed:
            raise ValueError(f"prompt has {len(at)} image tokens, its images need {needed}")
        spans, first = [], 0
        for one in made:
            mine = at[first : first + len(one.places)]
            first += len(mine)
            start, end = int(mine[0]), int(mine[-1]) + 1
            places = None if len(mine) == end - start else mine - start
            spans.append(
                Span(
                    start, end - start, one.key, atomic=self.bidirectional, bidirectional=self.bidirectional,
                    pixels=one.arrays, places=places, axes=self._axes(one.arrays),
                )
            )  # fmt: skip
        return tuple(spans)

    def _axes(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Of models whose positions have axes: each feature's place in time, height and width [3, features]."""
        grid = arrays.get("image_grid_thw")
        if grid is None or self.merge_size is None:
            return None
        time, height, width = (int(size) for size in grid.reshape(3))
        sizes = (time, height // self.merge_size, width // self.merge_size)
        return np.indices(sizes).reshape(3, -1)

    def _process(self, picture: Image, several: int, more: Mapping[str, Any]) -> Processed:
        kwargs = {**self.kwargs, **more}
        key = sha256(picture.digest + self._settings + _plain(kwargs)).digest()
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                self.num_found += 1
                return kept
        made, small = self._run(picture, key, kwargs), picture.thumbnail(THUMBNAIL)
        with self._lock:
            self.num_processed += 1
            self._thumbnails[key] = small
            while len(self._thumbnails) > MOST_THUMBNAILS:
                self._thumbnails.popitem(last=False)
            if key not in self._kept:
                self._kept[key] = made
                self._num_bytes += _size(made)
            while self._num_bytes > self.most_bytes:
                self._num_bytes -= _size(self._kept.popitem(last=False)[1])
        return made

    def _run(self, picture: Image, key: bytes, kwargs: Mapping[str, Any]) -> Processed:
        processor: Any = self.processor
        try:
            options = processor._merge_kwargs(
                tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt", **kwargs
            )["images_kwargs"]
            found = processor.image_processor([picture.pixels], **options)
            text = processor.replace_image_token(found, image_idx=0, **options)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"multi_modal_data: {self.name} refuses the image: {error}") from error
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        places = (np.array(ids) == self.token_id).nonzero()[0]
        if not len(places):
            raise ValueError(f"multi_modal_data: {self.name} made no places for the image")
        if self.bidirectional and len(places) != places[-1] - places[0] + 1:
            raise ValueError("multi_modal_data: do_pan_and_scan is not served: an image must be one run of tokens")
        arrays = {name: np.asarray(value) for name, value in found.items() if hasattr(value, "shape")}
        return Processed(key, arrays, text, tuple(ids), places)


def read_images(given: Any, most: int | None = None) -> list[Image]:
    """The images of `multi_modal_data`."""
    if not isinstance(given, Mapping):
        raise ValueError(f'multi_modal_data is {{"image": ...}}, got {given!r}')
    for kind in ("audio", "video"):
        if kind in given:
            raise ValueError(f"multi_modal_data holds {kind!r}: images are served, {kind} is not")
    check_names("multi_modal_data", given, ("image",))
    images = given.get("image")
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("multi_modal_data: there is no image in the list")
    if most is not None and len(images) > most:
        raise ValueError(f"multi_modal_data has {len(images)} images, limit_mm_per_prompt allows {most}")
    return [read_image(image) for image in images]


def sees(folder: Path) -> bool:
    """Whether the folder's model takes images."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if folder.is_dir() and path.exists() else {}
    except ValueError:
        return False  # loading says so
    return isinstance(config, dict) and "vision_config" in config and config.get("model_type") not in TEXT_ALONE


def load_images(
    folder: Path, *, limits: Any = None, kwargs: Any = None, trust_remote_code: bool = False, cache_gb: float = 0.25
) -> Images:
    """The processor of a model's folder; what it makes is kept within `cache_gb` GiB."""
    most = _limit(limits)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"mm_processor_kwargs is a dict, got {kwargs!r}")
    from labkit.loading.checkpoint import load_config

    pillow()
    processor = load_processor(folder, trust_remote_code)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if not hasattr(processor, "image_token") or not hasattr(processor, "image_processor"):
        raise ValueError(f"{folder}: {type(processor).__name__} does not process images")
    return Images(processor, config, most=most, kwargs=kwargs, most_bytes=int(cache_gb * 2**30))


def _limit(limits: Any) -> int | None:
    """Images a request, of vLLM's limit_mm_per_prompt."""
    if limits is None:
        return None
    if not isinstance(limits, Mapping):
        raise ValueError(f'limit_mm_per_prompt is {{"image": N}}, got {limits!r}')
    check_names("limit_mm_per_prompt", limits, ("image", "video", "audio"))
    most = limits.get("image")
    return None if most is None else whole("limit_mm_per_prompt", most, least=0)


def _settings(processor: Any) -> bytes:
    return type(processor).__name__.encode() + str(processor.image_processor.to_dict()).encode()


def _plain(kwargs: Mapping[str, Any]) -> bytes:
    return json.dumps(kwargs, sort_keys=True, default=repr).encode() if kwargs else b""


def _size(made: Processed) -> int:
    return sum(array.nbytes for array in made.arrays.values())
