"""What a request wants to see of a model: kinds of activations by layer, and at which of its positions. Knows no
tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.options import choose, text, whole

KINDS = {
    "hidden": "the residual stream behind a layer [tokens, hidden size]",
    "attention_output": "what attention adds to it, before norms behind it [tokens, hidden size]",
    "mlp_output": "what the MLP adds to it, before norms behind it [tokens, hidden size]",
    "q": "queries as attention takes them, rotated [tokens, heads, head size]",
    "k": "keys as attention takes them, rotated [tokens, key heads, head size]",
    "v": "values [tokens, key heads, head size]",
    "router": "the experts that were chosen [tokens, experts of a token]",
    "router_weights": "their weights [tokens, experts of a token]",
    "attention": "attention weights [heads, queries, keys]",
}
OPTIONS = ("positions", "folder")


class CapturedStep(NamedTuple):
    """What one step gave, the lines of one request behind those of another. A kind that only some of them asked for has
    lines of all."""

    step: int
    requests: tuple[str, ...]
    starts: NDArray[np.int64]  # by request: the position of its first line
    counts: NDArray[np.int64]  # by request: its lines, one for each position from there on
    values: dict[tuple[str, int], Any]  # by (kind, layer): [lines, ..]
    attention: dict[str, dict[tuple[str, int], Any]]  # by request: [heads, its lines, keys]

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedStep:
        return self  # nobody writes to its arrays


class Captured(NamedTuple):
    """What one request captured, by (kind, layer): a line for each of `positions`, and the step that computed it."""

    steps: NDArray[np.int64]
    positions: NDArray[np.int64]
    values: dict[tuple[str, int], Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return self  # nobody writes to its arrays

    def before(self, end: int) -> Captured | None:
        """Only what is of positions below `end`; None if that is nothing."""
        if not len(self.positions) or self.positions[-1] < end:
            return self
        num = int(np.searchsorted(self.positions, end))
        lines = {key: value[:, :num] if key[0] == "attention" else value[:num] for key, value in self.values.items()}
        return Captured(self.steps[:num], self.positions[:num], lines) if num else None


def check_capture(given: Any) -> dict[str, Any] | None:
    """Layers by kind, each a tuple of numbers or "all"; `positions` and `folder` where they are given."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(
            f"capture maps kinds of activations to layer numbers, got {given!r}; kinds: {', '.join(KINDS)}"
        )
    found: dict[str, Any] = {}
    for what, which in given.items():
        choose("capture", what, dict.fromkeys((*KINDS, *OPTIONS)))
        if what not in OPTIONS:
            found[what] = _layers(what, which)
    positions, folder = given.get("positions", "all"), given.get("folder")
    if positions not in ("all", "last"):
        raise ValueError(f'positions of capture are "all" or "last" (those a token is drawn from), got {positions!r}')
    if positions != "all":
        found["positions"] = positions
    if folder is not None:
        if "attention" in found:
            raise ValueError("attention weights are not written to a folder: they differ in shape from step to step")
        found["folder"] = text("folder of capture", os.fspath(folder))
    if not layers_of(found):
        raise ValueError(f"capture names no layers: give some of {', '.join(KINDS)}")
    return found


def layers_of(capture: Mapping[str, Any] | None) -> dict[str, Any]:
    """Layers by kind: a tuple of numbers, or "all"."""
    if capture is None:
        return {}
    return {what: which for what, which in capture.items() if what not in OPTIONS and which}


def keys_of(capture: Mapping[str, Any] | None) -> list[tuple[str, int]]:
    return [(what, layer) for what, layers in layers_of(capture).items() for layer in layers]


def needs_all(capture: Mapping[str, Any] | None) -> bool:
    """Whether every position has to be computed, also those that the cache holds."""
    return bool(layers_of(capture)) and capture.get("positions", "all") == "all"  # type: ignore[union-attr]


def fitted(capture: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """With numbers in place of "all", and every layer among the `num_layers` there are."""
    found = dict(capture)
    for what, layers in layers_of(capture).items():
        most = num_layers + (what == "hidden" and num_layers > 0)
        found[what] = tuple(range(num_layers)) if layers == "all" else layers
        for layer in found[what]:
            if layer >= most:
                raise ValueError(f"capture of {what!r} names layer {layer}: this runner has {num_layers} layers")
    return found


def _layers(what: str, which: Any) -> Any:
    if isinstance(which, str):
        if which != "all":
            raise ValueError(f'capture[{what!r}] is a list of layers or "all", got {which!r}')
        return which
    if hasattr(which, "__index__"):
        which = (which,)
    if not isinstance(which, Iterable):
        raise ValueError(f'capture[{what!r}] is a list of layers or "all", got {which!r}')
    least = -1 if what == "hidden" else 0
    return tuple(dict.fromkeys(whole(f"capture[{what!r}]", i, least=least) for i in which))
