"""Which layers share blocks. Layers that attend to the same part of the context, or that may keep another number of
keys, form groups of equal size, so one pool of blocks serves all groups: a block holds one group's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from labkit.models.base import KVSpec


class Groups(NamedTuple):
    windows: tuple[int | None, ...]  # by group
    group_of: tuple[int, ...]  # by layer
    place_of: tuple[int, ...]  # by layer: which of its group's layers it is

    @property
    def size(self) -> int:
        """Number of layers in the largest group; a block has room for that many."""
        return max(self.place_of, default=-1) + 1


def one_group(kv: Sequence[KVSpec]) -> Groups:
    """Every layer keeps the whole context."""
    return Groups((None,), (0,) * len(kv), tuple(range(len(kv))))


def groups_of_model(kv: Sequence[KVSpec], hybrid_kv: bool, kv_groups: int) -> Groups:
    """The groups that an engine was asked for."""
    if hybrid_kv and kv_groups > 1:
        raise ValueError("hybrid_kv makes groups of its own, by window: leave out kv_groups")
    return by_window(kv) if hybrid_kv else in_order(kv, kv_groups)


def in_order(kv: Sequence[KVSpec], num: int) -> Groups:
    """`num` groups of as many layers each, the first layers first, so that they may keep different numbers of keys."""
    if num == 1:
        return one_group(kv)
    if not kv:
        raise ValueError("kv_groups is for layers with attention, and this model has none: leave it out")
    _check_one_shape("kv_groups", kv)
    if len(kv) % num:
        possible = ", ".join(str(n) for n in range(1, len(kv) + 1) if len(kv) % n == 0)
        raise ValueError(f"kv_groups={num} does not divide the {len(kv)} layers: choose one of {possible}")
    size = len(kv) // num
    layers = range(len(kv))
    return Groups((None,) * num, tuple(i // size for i in layers), tuple(i % size for i in layers))


def _check_one_shape(option: str, kv: Sequence[KVSpec]) -> None:
    shapes = {(spec.num_heads, spec.key_size, spec.value_size, spec.joined) for spec in kv}
    if len(shapes) > 1:
        raise ValueError(f"{option} needs layers whose keys and values have one shape, this model has {len(shapes)}")


def by_window(kv: Sequence[KVSpec]) -> Groups:
    """Groups of layers with the same window, full attention first; larger kinds are split to the size of the
    smallest."""
    _check_one_shape("hybrid_kv", kv)
    if not kv:
        raise ValueError("hybrid_kv is for layers with attention, and this model has none: leave it out")
    kinds: dict[int | None, list[int]] = {}
    for layer, spec in enumerate(kv):
        kinds.setdefault(spec.window, []).append(layer)
    size = min(map(len, kinds.values()))
    windows: list[int | None] = []
    group_of, place_of = [0] * len(kv), [0] * len(kv)
    for window in sorted(kinds, key=lambda window: (window is not None, window or 0)):
        layers = kinds[window]
        for first in range(0, len(layers), size):
            for place, layer in enumerate(layers[first : first + size]):
                group_of[layer], place_of[layer] = len(windows), place
            windows.append(window)
    return Groups(tuple(windows), tuple(group_of), tuple(place_of))
