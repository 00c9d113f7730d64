"""Allocates CPU tensors in huge pages where the system has them. Streaming through them causes fewer TLB misses, which
saves some 5% of a decode step."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zeroed tensor. Its memory is allocated when it is first touched."""
    size = math.prod(shape) * dtype.itemsize
    huge = (size + HUGE // 2) // HUGE * HUGE  # a remainder of less than half a page stays in small pages
    if not huge or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, max(size, huge) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(dtype).view(tuple(shape))
