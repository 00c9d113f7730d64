"""The ops a model calls, picked for its device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from labkit_kernels import get

NAMES = ("rms_norm", "layer_norm", "rope", "silu_mul", "gelu_mul", "store_kv", "paged_attention")


class Ops:
    """Plain functions by name: `ops.rms_norm(x, weight, eps)`. `pick` again when the registry's generation has
    changed."""

    rms_norm: Callable[..., Any]
    layer_norm: Callable[..., Any]
    rope: Callable[..., Any]
    silu_mul: Callable[..., Any]
    gelu_mul: Callable[..., Any]
    store_kv: Callable[..., Any]
    rope_kv: Callable[..., Any] | None  # both in one kernel, if there is one and neither op was swapped
    paged_attention: Callable[..., Any]

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> None:
        self.device, self.dtype, self.deterministic = device, dtype, deterministic
        self.pick()

    def pick(self) -> None:
        for name in NAMES:
            setattr(self, name, get(name).pick(self.device, self.dtype))
        both = get("rope_kv")
        variant = both.picked(self.device, self.dtype)
        apart = variant.name == "reference" or get("rope").swapped or get("store_kv").swapped
        self.rope_kv = None if apart and not both.swapped else variant.function
        if self.deterministic:
            self.paged_attention = partial(self.paged_attention, invariant=True)
