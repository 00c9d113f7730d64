"""Spans of a prompt that belong together, such as an image's tokens, and what they add to the hashes of blocks. Knows
no pixels and no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.options import whole


@dataclass(frozen=True)
class Span:
    """Tokens that belong together, such as an image's. `key` (the content hash) is part of the hash of every block the
    span touches. A prefix hit never ends inside an `atomic` span. The tokens of a `bidirectional` one see each other,
    so that one step computes them all; so it does with a `whole` one.

    `embeddings` [length, size], an array or a tensor, are the model's inputs at these positions, instead of the
    embeddings of the token ids (as transformers' `inputs_embeds`). Without a `key` the embeddings are hashed.

    `pixels` are arrays by name from which the runner computes the inputs: what the model's image processor made of one
    image. `places` are the positions within the span that get them, all of them if it is None. `axes` [3, length] are
    the positions in time, height and width that a rotary embedding with several axes has, from the span's start on.

    `routing` {layer: [length, experts a token]} are the experts that these tokens go through, in place of those that
    the layer's router would choose: what `capture={"router": [layer]}` returned. Without a `key` it is hashed.
    """

    start: int
    length: int
    key: bytes = b""
    embeddings: Any = field(default=None, compare=False, repr=False)
    atomic: bool = field(default=True, repr=False)
    bidirectional: bool = field(default=False, repr=False)
    whole: bool = field(default=False, repr=False)
    pixels: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    places: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    axes: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    routing: Mapping[int, NDArray[np.int64]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        whole("a span's start", self.start, least=0)
        whole("a span's length", self.length, least=1)
        if self.embeddings is not None:
            if self.pixels is not None:
                raise ValueError("a span has embeddings or pixels, not both")
            object.__setattr__(self, "embeddings", _embeddings(self.embeddings, self.length))
            if not self.key:
                object.__setattr__(self, "key", sha256(self.embeddings.tobytes()).digest())
        if self.routing is not None:
            given = {layer: _experts(layer, experts, self.length) for layer, experts in self.routing.items()}
            object.__setattr__(self, "routing", given)
            if not self.key:
                parts = (f"{layer}:{given[layer].shape}".encode() + given[layer].tobytes() for layer in sorted(given))
                object.__setattr__(self, "key", sha256(b"routing" + b"".join(parts)).digest())
        if not isinstance(self.key, bytes) or not self.key:
            raise ValueError(f"a span's key is the bytes of its content's hash, got {self.key!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Span:
        return self  # nothing of it changes, and pixels are large

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def in_one_step(self) -> bool:
        return self.bidirectional or self.whole

    @property
    def kind(self) -> str:
        if self.routing is not None:
            return "routing"
        if self.whole:
            return "whole"
        return "image" if self.pixels is not None else "span" if self.embeddings is None else "embeddings"

    @property
    def short(self) -> str:
        """The beginning of its key, as it is shown."""
        return self.key.hex()[:12]

    @property
    def num_bytes(self) -> int:
        """Of its pixels."""
        return sum(int(getattr(array, "nbytes", 0)) for array in (self.pixels or {}).values())

    def without_pixels(self) -> Span:
        """The same span of a request that has ended, and needs no input any more."""
        return replace(self, pixels={}) if self.pixels else self

    @property
    def num_inputs(self) -> int:
        """Positions whose input is not the embedding of their token id."""
        if self.embeddings is None and self.pixels is None:
            return 0
        return self.length if self.places is None else len(self.places)


def _embeddings(given: Any, length: int) -> NDArray[np.float32]:
    """A float32 array of its own, whatever library or device it comes from."""
    if hasattr(given, "detach"):
        given = given.detach().float().cpu().numpy()
    given = np.asarray(given)
    if given.dtype.kind not in "fiu":
        raise ValueError(f"a span's embeddings are real numbers, got {given.dtype}")
    found = np.array(given, np.float32)
    if found.ndim != 2 or len(found) != length:
        raise ValueError(f"a span's embeddings are one line for each of its {length} tokens, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError("a span's embeddings hold nan or infinity")
    found.flags.writeable = False
    return found


def _experts(layer: int, given: Any, length: int) -> NDArray[np.int64]:
    """An array of its own: [length, experts a token]."""
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    found = np.asarray(given)
    if found.dtype.kind not in "iu":
        raise ValueError(f"routing of layer {layer}: experts are whole numbers, got {found.dtype}")
    if found.ndim != 2 or len(found) != length:
        raise ValueError(
            f"routing of layer {layer}: one line of experts for each of {length} tokens, got shape {found.shape}"
        )
    found = found.astype(np.int64)
    found.flags.writeable = False
    return found


def span_keys(spans: Iterable[Span], block_size: int, num_tokens: int | None = None) -> dict[int, bytes]:
    """block index -> 32 bytes that stand for the spans it touches, and where in the block they lie."""
    found: dict[int, list[bytes]] = {}
    for span in spans:
        if not isinstance(span, Span):
            raise ValueError(f"spans must be Span(start, length, key), got {span!r}")
        if num_tokens is not None and span.end > num_tokens:
            raise ValueError(f"{span!r} does not lie within {num_tokens} tokens")
        for index in range(span.start // block_size, -(-span.end // block_size)):
            place = f"{span.start - index * block_size}:{span.length}:".encode()
            found.setdefault(index, []).append(place + sha256(span.key).digest())
    return {index: sha256(b"".join(parts)).digest() for index, parts in found.items()}
