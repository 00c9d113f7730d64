"""Image features: computed by the model's vision tower when a step first needs them, and kept, the latest used, within
a number of bytes. Knows spans and a tower; no processor and no scheduler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from labkit.core.blocks.spans import Span

MOST_BYTES = 2**30


class Elsewhere:
    """In place of `Features` behind the first stage, which has the inputs of all requests, and says which of them
    failed."""

    most_bytes = 0

    def forget(self) -> None:
        """Nothing is kept here."""


class Features:
    """Features by a span's key. What a step needs is computed together, for all its requests; a request that is
    preempted, or whose image comes again, finds them here.

    An image that the tower refuses is in `errors` instead, until the next step: only its own request fails.
    """

    def __init__(self, tower: Any, most_bytes: int = MOST_BYTES) -> None:
        self.tower, self.most_bytes = tower, most_bytes
        self.kept: OrderedDict[bytes, Tensor] = OrderedDict()  # the longest unused first
        self.errors: dict[bytes, str] = {}
        self.num_bytes = 0
        self.num_encoded = self.num_hits = 0  # images
        self.encoded_bytes = 0  # of features that were computed

    def __repr__(self) -> str:
        return (
            f"Features({len(self.kept)} images, {self.num_bytes / 2**20:.1f} of {self.most_bytes / 2**20:.0f} MiB, "
            f"{self.num_encoded} encoded, {self.num_hits} found)"
        )

    def of(self, spans: Iterable[Span]) -> dict[bytes, Tensor]:
        """The features of all these spans [its places, size]; those the tower refuses are missing."""
        self.errors = {}
        wanted = {span.key: span for span in spans}
        found = {key: self.kept[key] for key in wanted if key in self.kept}
        for key in found:
            self.kept.move_to_end(key)
        self.num_hits += len(found)
        missing = [span for key, span in wanted.items() if key not in found]
        if missing:
            found |= self._encode(missing)
        return found

    def forget(self) -> None:
        """Another tower computes from here on."""
        self.kept.clear()
        self.num_bytes = 0

    def _encode(self, spans: list[Span]) -> dict[bytes, Tensor]:
        found = {}
        for span, features in zip(spans, self.tower.encode([dict(span.pixels or {}) for span in spans]), strict=True):
            if isinstance(features, str):
                self.errors[span.key] = features
            elif len(features) != span.num_inputs:
                self.errors[span.key] = (
                    f"the image has {len(features)} features and the prompt {span.num_inputs} places for them"
                )
            else:
                found[span.key] = features
                self.encoded_bytes += features.numel() * features.element_size()
                self._keep(span.key, features)
        self.num_encoded += len(spans)
        return found

    def _keep(self, key: bytes, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if size > self.most_bytes:
            return
        self.kept[key] = features
        self.num_bytes += size
        while self.num_bytes > self.most_bytes:
            _, oldest = self.kept.popitem(last=False)
            self.num_bytes -= oldest.numel() * oldest.element_size()

    def check(self) -> None:
        held = sum(kept.numel() * kept.element_size() for kept in self.kept.values())
        assert held == self.num_bytes <= self.most_bytes, f"{held} bytes are kept, {self.num_bytes} counted"


def features_of(model: Any, most_bytes: int) -> Features | Elsewhere | None:
    """Those of images; None: the model does not see."""
    if not getattr(model, "is_first", True):
        return Elsewhere()
    tower = getattr(model, "vision", None)
    return None if tower is None else Features(tower, most_bytes)
