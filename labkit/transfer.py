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
    """An array, or a list, as a tensor on the device: ordered before what is launched next, waited for by nobody."""
    tensor = torch.from_numpy(np.require(values, dtype, ["C", "W"]))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def fetch(tensor: Tensor) -> Tensor:
    """The same on the host, there once an event recorded now has come."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
