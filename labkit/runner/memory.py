"""A runner's KV cache memory: allocation, copies for snapshots, and available memory."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels import pages
from torch import Tensor

from labkit.models.base import KVCache, Model
from labkit.runner.groups import Groups


class SavedBlocks(NamedTuple):
    """The blocks written so far, and their contents."""

    index: np.ndarray
    kept: list[Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedBlocks:
        return self


class BlockStore:
    """Keys and values of all layers, and which blocks were ever written; a copy holds only those."""

    def __init__(self, caches: list[KVCache]) -> None:
        self.caches = caches
        self.flat = [tensor for pair in caches for tensor in pair]
        self.touched = np.zeros(len(self.flat[0]) if caches else 0, bool)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedBlocks:
        index = self.touched.nonzero()[0]
        return SavedBlocks(index, [tensor[torch.from_numpy(index)] for tensor in self.flat])

    def load(self, saved: SavedBlocks) -> None:
        for tensor, kept in zip(self.flat, saved.kept, strict=True):
            tensor[torch.from_numpy(saved.index)] = kept
        self.touched[:] = False
        self.touched[saved.index] = True


def make_caches(
    model: Model, groups: Groups, num_blocks: int, block_size: int, device: torch.device, pinned: bool = False
) -> list[KVCache]:
    """One cache for each position in a group. Zeroed, because a nan in an unused slot would survive a product with
    0."""

    def zeros(*shape: int) -> Tensor:
        if device.type != "cpu" or pinned:
            return torch.zeros(shape, dtype=model.dtype, device=device, pin_memory=pinned)
        return pages.zeros(shape, model.dtype)

    return [
        (
            zeros(num_blocks, spec.num_heads, block_size, spec.key_size),
            zeros(num_blocks, spec.num_heads, block_size, spec.value_size),
        )
        for spec in (model.kv[groups.place_of.index(place)] for place in range(groups.size))
    ]


def available_memory() -> int:
    """Bytes that a new process can use without swapping, as the system reports."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
