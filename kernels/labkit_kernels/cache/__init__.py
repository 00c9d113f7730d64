"""Stores keys and values into KV cache blocks, and copies or swaps blocks. Moves memory, computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case, randn
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import exact

from . import reference
from .codes import LARGEST, width

# (tokens, heads, block size, head size, value size)
SHAPES = [(0, 2, 16, 8, 8), (1, 1, 1, 32, 32), (17, 3, 16, 80, 80), (33, 2, 3, 64, 64), (5, 19, 16, 192, 128)]
TIMED = [(tokens, 8, 16, 128, 128) for tokens in (1, 256, 4096)]


def _store_cases() -> Iterator[Case]:
    def make(device, dtype, generator, shape, kept):
        tokens, heads, block, size, value_size = shape
        blocks = -(-tokens // block) + 2
        fused = randn(generator, tokens, heads * (size + value_size), dtype=dtype)
        k, v = fused.split([heads * size, heads * value_size], -1)
        wide = [width(n, kept or dtype) for n in (size, value_size)]
        caches = [torch.zeros(blocks, heads, block, n, device=device, dtype=kept or dtype) for n in wide]
        slots = (torch.randperm((blocks - 1) * block, device=device, generator=generator) + block)[:tokens]
        return (k.unflatten(-1, (heads, size)), v.unflatten(-1, (heads, value_size)), *caches, slots), {}

    for shape in SHAPES + TIMED:
        tokens, heads, block, size, value_size = shape
        sizes = f"{size}" if size == value_size else f"{size} and {value_size}"
        name = f"{tokens} tokens, {heads} heads of {sizes}, blocks of {block}"
        yield Case(name, partial(make, shape=shape, kept=None), timed=shape in TIMED)
    for kept in (torch.float16, torch.float32, *LARGEST):
        yield Case(f"kept in {kept}", partial(make, shape=(17, 3, 16, 80, 80), kept=kept))
    for kept in LARGEST:
        yield Case(f"kept in {kept}, keys of 20 and values of 12", partial(make, shape=(9, 3, 7, 20, 12), kept=kept))
        yield Case(f"256 tokens, 8 heads of 128, kept in {kept}", partial(make, shape=TIMED[1], kept=kept), timed=True)

    def beside(device, dtype, generator):  # keys and values in one tensor, places before heads in memory
        caches = torch.zeros(4, 2, 16, 3, 40, device=device, dtype=dtype).transpose(2, 3)
        k, v = randn(generator, 2, 5, 3, 40, dtype=dtype)
        slots = (torch.randperm(48, device=device, generator=generator) + 16)[:10:2]
        return (k, v, caches[:, 0], caches[:, 1], slots), {}

    def places_last(device, dtype, generator):
        caches = [torch.zeros(3, 2, 24, 16, device=device, dtype=dtype).transpose(2, 3) for _ in range(2)]
        k, v = randn(generator, 2, 5, 2, 24, dtype=dtype)
        return (k, v, *caches, torch.randperm(32, device=device, generator=generator)[:5] + 16), {}

    yield Case("caches that are views of one", beside)
    yield Case("caches whose places lie side by side", places_last)


def _move_cases(swap: bool) -> Iterator[Case]:
    def make(device, dtype, generator, pairs, shape, count):
        like = {"device": device, "dtype": dtype, "generator": generator}
        caches = [torch.randn(*shape, **like) for _ in range(count)]
        chosen = torch.randperm(shape[0], device=device, generator=generator)[: 2 * pairs].reshape(pairs, 2)
        half = count // 2
        return (caches[:half], caches[half:], chosen.cpu()) if swap else (caches, chosen), {}

    for pairs in (0, 1, 5):
        yield Case(f"{pairs} pairs", partial(make, pairs=pairs, shape=(12, 2, 4, 8), count=4))
    yield Case("odd sizes", partial(make, pairs=3, shape=(7, 1, 3, 5), count=2))
    yield Case("8 pairs, 64 caches", partial(make, pairs=8, shape=(64, 8, 16, 128), count=64), timed=True)

    def views(device, dtype, generator):
        pairs = torch.tensor([[1, 4], [3, 0]], device="cpu" if swap else device)
        both = torch.randn(6, 4, 2, 4, 8, device=device, dtype=dtype, generator=generator)
        caches = list(both.unbind(1))
        return (caches[:2], caches[2:], pairs) if swap else (caches, pairs), {}

    def pieces(device, dtype, generator):
        pairs = torch.tensor([[1, 4], [3, 0]], device="cpu" if swap else device)
        caches = [torch.randn(6, 2, 3, 4, 8, device=device, dtype=dtype, generator=generator)[:, :, 1] for _ in "ab"]
        return (caches[:1], caches[1:], pairs) if swap else (caches, pairs), {}

    yield Case("caches that are views of one", views)
    yield Case("blocks in several pieces", pieces)


def _move_traffic(caches: Sequence[Tensor], *rest: Any) -> int:
    return 2 * len(rest[-1]) * sum(cache[0].numel() * cache.element_size() for cache in caches)


def _store_traffic(k: Tensor, v: Tensor, k_cache: Tensor, *rest: Any) -> int:
    scales = 2 * k.shape[0] * k.shape[1] * (k_cache.shape[3] - k.shape[2]) * k_cache.element_size()
    return (k.numel() + v.numel()) * (k.element_size() + k_cache.element_size()) + scales


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
    traffic=_move_traffic,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
swap_blocks = Op(
    "swap_blocks",
    reference=reference.swap_blocks,
    cases=lambda: _move_cases(True),
    tolerance=exact,
    traffic=_move_traffic,
    home=__name__,
    sources={"cpu": ("copies",), "cuda": ("copies",)},
)
