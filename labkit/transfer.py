"""Copies from host to device that do not block.

A plain copy from pageable memory waits until everything launched before it has ended. One such copy a step would leave
the device idle while the next step is prepared. These copies use pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def put(values: Any, device: torch.device, dtype: np.typing.DTypeLike = None) -> Tensor:
    """An array or list as a tensor on the device. The copy is ordered before later launches, and nothing waits for
    it."""
    if dtype is not None or not isinstance(values, np.ndarray) or not values.flags.carray:
        values = np.require(values, dtype, ["C", "W"])
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def put_all(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Several arrays as tensors on the device, by one copy: a small one takes as long as all of them together."""
    if device.type == "cpu":
        return {name: put(array, device) for name, array in arrays.items()}
    return unpack(pack(arrays.values(), pinned=True).to(device, non_blocking=True), arrays)


def pack(arrays: Iterable[np.ndarray], pinned: bool = False) -> Tensor:
    """The arrays in one piece of memory, each at a multiple of 16 bytes, as kernels read them."""
    arrays = list(arrays)
    flat = torch.empty(sum(_room(array) for array in arrays), dtype=torch.uint8, pin_memory=pinned)
    host, at = flat.numpy().data, 0
    for array in arrays:
        np.ndarray(array.shape, array.dtype, host, at)[...] = array
        at += _room(array)
    return flat


def unpack(flat: Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Views of what `pack` made of these arrays."""
    found, by_kind, at = {}, {}, 0
    for name, array in arrays.items():
        if (wide := by_kind.get(array.dtype.num)) is None:
            wide = by_kind[array.dtype.num] = flat.view(_kind(array.dtype))
        steps = [1]
        for count in array.shape[:0:-1]:
            steps.append(steps[-1] * count)
        found[name] = wide.as_strided(array.shape, steps[::-1], at // array.itemsize)
        at += _room(array)
    return found


def _room(array: np.ndarray) -> int:
    return -(-array.nbytes // 16) * 16


@cache
def _kind(kind: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, kind)).dtype


def fetch(tensor: Tensor) -> Tensor:
    """The tensor on the host, valid once an event recorded now has completed."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
