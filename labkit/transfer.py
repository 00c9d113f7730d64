"""Copies from host to device that do not block.

A plain copy from pageable memory waits until everything launched before it has ended. One such copy a step would leave
the device idle while the next step is prepared. These copies use pinned memory.
"""

from __future__ import annotations

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


def fetch(tensor: Tensor) -> Tensor:
    """The tensor on the host, valid once an event recorded now has completed."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
