"""Keys and values into blocks, and blocks to elsewhere: memory moved, nothing computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import exact

from . import reference


def _store_cases() -> Iterator[Case]:
    for tokens, heads, block, size in [(1, 1, 1, 32), (17, 3, 16, 80), (33, 2, 3, 64)]:

        def make(device, dtype, generator, t=tokens, h=heads, b=block, d=size):
            blocks = -(-t // b) + 2
            fused = torch.randn(t, 2 * h * d, device=device, dtype=dtype, generator=generator)
            k, v = (part.unflatten(-1, (h, d)) for part in fused.chunk(2, -1))
            caches = torch.zeros(2, blocks, h, b, d, device=device, dtype=dtype)
            slots = (torch.randperm((blocks - 1) * b, device=device, generator=generator) + b)[:t]
            return (k, v, caches[0], caches[1], slots), {}

        yield Case(f"{tokens} tokens, {heads} heads of {size}, blocks of {block}", make)


def _move_cases(swap: bool) -> Iterator[Case]:
    for pairs in (0, 1, 5):

        def make(device, dtype, generator, n=pairs):
            caches = [torch.randn(12, 2, 4, 8, device=device, dtype=dtype, generator=generator) for _ in range(4)]
            chosen = torch.randperm(12, device=device, generator=generator)[: 2 * n].reshape(n, 2)
            return (caches[:2], caches[2:], chosen.cpu()) if swap else (caches, chosen), {}

        yield Case(f"{pairs} pairs", make)


def _store_traffic(k: Tensor, v: Tensor, k_cache: Tensor, *rest: Any) -> int:
    return (k.numel() + v.numel()) * (k.element_size() + k_cache.element_size())


store_kv = Op(
    "store_kv",
    reference=reference.store_kv,
    cases=_store_cases,
    tolerance=exact,
    traffic=_store_traffic,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
copy_blocks = Op(
    "copy_blocks",
    reference=reference.copy_blocks,
    cases=lambda: _move_cases(False),
    tolerance=exact,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
swap_blocks = Op(
    "swap_blocks",
    reference=reference.swap_blocks,
    cases=lambda: _move_cases(True),
    tolerance=exact,
    home=__name__,
)
