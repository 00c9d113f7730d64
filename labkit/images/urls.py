"""Images that clients name by URL: data: URLs always, http and file where they are allowed. All of it in threads of its
own and within time limits, so neither an event loop nor an engine waits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from labkit.images.decode import Image, decode
from labkit.images.fetch import Answer, Target, fetch, hosts_of, target_of
from labkit.images.limits import ImageError, Limits
from labkit.images.read import check_format, check_kind, of_data_url, read_file, scheme_of
from labkit.images.threads import Threads

AT_ONCE = 4  # images that are decoded
FETCHED_AT_ONCE = 8


class ImageUrls:
    """Reads images by URL. Files are read below `local_path`, and http(s) URLs from `domains`; without them, none.

    >>> urls = ImageUrls(domains=["images.example.com"])
    >>> await urls.read("data:image/png;base64,...")
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        local_path: str | os.PathLike[str] | None = None,
        domains: Iterable[str] = (),
        fetch: Callable[[Target, Limits], Answer] = fetch,
        decode: Callable[[bytes, Limits], Image] = decode,
    ) -> None:
        self.limits = Limits() if limits is None else limits
        self.root = _root(local_path) if local_path else None  # an empty one is not the working folder
        self.hosts = hosts_of(domains)
        self.fetch, self.decode = fetch, decode
        self.decoding = Threads(AT_ONCE, "labkit-images")
        self.fetching = Threads(FETCHED_AT_ONCE, "labkit-fetch")

    def __repr__(self) -> str:
        return f"ImageUrls({self.decoding!r}, {self.fetching!r})"

    async def read(self, url: str) -> Image:
        """The image at a URL. An ImageError says why there is none."""
        target = self._target(url)
        answer = None if target is None else await self._fetched(target)
        return await self._decoded(lambda: self._image(url, answer))

    def read_now(self, url: str) -> Image:
        """The same in the caller's thread, where decoding has no limit of time."""
        target = self._target(url)
        return self._image(url, None if target is None else self.fetch(target, self.limits))

    def _target(self, url: str) -> Target | None:
        """Where the image must be fetched; None if it need not be."""
        scheme = scheme_of(url)
        if scheme in ("http", "https"):
            return target_of(url, self.hosts)
        if scheme is None:
            raise ImageError("an image is given by its URL, such as data:image/png;base64,...")
        if scheme not in ("data", "file"):
            raise ImageError(f"an image's URL is data:, http:, https: or file:, got {scheme[:64]}:")
        return None

    def _image(self, url: str, answer: Answer | None) -> Image:
        """The image of a URL, with what was fetched from there."""
        if answer is not None:
            check_kind(answer.kind)
            image = self.decode(answer.data, self.limits)
            check_format(answer.kind, image)
            return image
        if scheme_of(url) == "data":
            return of_data_url(url, self.limits, self.decode)
        return self.decode(read_file(self._path(url), self.limits), self.limits)

    async def _decoded(self, function: Callable[[], Image]) -> Image:
        seconds = self.limits.seconds
        return await self.decoding.run(function, seconds, f"the image could not be decoded within {seconds:g} s")

    async def _fetched(self, target: Target) -> Answer:
        seconds = self.limits.seconds + 1.0  # its own limit says more
        late = f"the image did not arrive within {self.limits.seconds:g} s"
        return await self.fetching.run(lambda: self.fetch(target, self.limits), seconds, late)

    def _path(self, url: str) -> Path:
        """The file that a file URL names, links resolved, if it lies below the root."""
        if self.root is None:
            raise ImageError(
                "files are not read: the server may allow it with --allowed-local-media-path; a data: URL needs no "
                "permission"
            )
        try:
            split = urlsplit(url)
            path = Path(unquote(split.path)).resolve()
        except (ValueError, OSError, RuntimeError):
            raise ImageError("the file URL is not valid") from None
        if split.netloc not in ("", "localhost") or self.root not in path.parents:
            raise ImageError("the file does not lie below the folder of --allowed-local-media-path")
        return path


def _root(given: Any) -> Path:
    path = Path(given).resolve()
    if not path.is_dir():
        raise ValueError(f"allowed_local_media_path must be a folder, got {str(given)!r}")
    return path
