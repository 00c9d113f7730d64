"""Rotary position embeddings, optionally with q/k norms before them and the KV cache store after them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.cache.codes import LARGEST, width
from labkit_kernels.check import Case, randn
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import rounded_once

from . import reference

# (tokens, query heads, key heads, head size, rotary size, interleaved, norms)
SHAPES = [
    (1, 1, 1, 2, 2, False, ""),
    (1, 4, 4, 32, 32, False, ""),
    (7, 4, 2, 64, 64, False, "qk"),
    (3, 5, 1, 64, 64, True, "qk"),
    (33, 3, 1, 80, 32, True, ""),
    (2, 3, 2, 80, 20, False, "q"),
    (5, 14, 2, 96, 96, False, ""),
    (2, 17, 1, 128, 128, False, "k"),
]
TIMED = [(tokens, 32, 8, 128, 128, False, "") for tokens in (1, 256, 4096)]


def _make(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, shape: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Queries, keys and values as views of one projection; table, positions; options."""
    tokens, heads, keys, size, rotary, interleaved, norms = shape
    fused = randn(generator, tokens, (heads + 2 * keys) * size, dtype=dtype)
    parts = fused.split([heads * size, keys * size, keys * size], -1)
    speeds = torch.logspace(0, -3, rotary // 2, device=device)
    angles = torch.arange(64, device=device).float()[:, None] * speeds
    table = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.randint(0, 64, (tokens,), device=device, generator=generator)
    options = {"interleaved": interleaved, "eps": 1e-6}
    if norms:
        options |= {f"{name}_norm": randn(generator, size, dtype=dtype) for name in norms}
    return (*(part.unflatten(-1, (-1, size)) for part in parts), table, positions), options


def _name(shape: tuple[Any, ...]) -> str:
    tokens, heads, keys, size, rotary, interleaved, norms = shape
    extras = f"{', interleaved' if interleaved else ''}{f', {norms} norm' if norms else ''}"
    return f"{tokens} tokens, {heads}/{keys} heads of {size}, {rotary} turned{extras}"


def _cases() -> Iterator[Case]:
    for shape in SHAPES + TIMED:

        def make(device, dtype, generator, shape=shape):
            (q, k, _, table, positions), options = _make(device, dtype, generator, shape)
            return (q, k, table, positions), options

        yield Case(_name(shape), make, timed=shape in TIMED)

    def wide(device, dtype, generator):  # a float32 norm weight; positions and heads that are views
        q, k = (randn(generator, heads, 6, 32, dtype=dtype).transpose(0, 1) for heads in (3, 2))
        table = randn(generator, 16, 32)
        positions = torch.randint(0, 16, (12,), device=device, generator=generator)[::2]
        return (q, k, table, positions), {"q_norm": randn(generator, 32), "k_norm": randn(generator, 32), "eps": 1e-5}

    yield Case("heads before tokens in memory, float32 norms", wide)


def _kv_cases() -> Iterator[Case]:
    def make(device, dtype, generator, shape, block, kept=None):
        (q, k, v, table, positions), options = _make(device, dtype, generator, shape)
        tokens, heads, size = k.shape
        blocks = -(-tokens // block) + 2
        wide = width(size, kept or dtype)
        caches = [torch.zeros(blocks, heads, block, wide, device=device, dtype=kept or dtype) for _ in range(2)]
        slots = (torch.randperm((blocks - 1) * block, device=device, generator=generator) + block)[:tokens]
        return (q, k, v, table, positions, *caches, slots), options

    for i, shape in enumerate(SHAPES + TIMED):
        block = (16, 3, 64)[i % 3]
        yield Case(f"{_name(shape)}, blocks of {block}", partial(make, shape=shape, block=block), timed=shape in TIMED)
    kept = partial(make, shape=SHAPES[2], block=16, kept=torch.float16)
    yield Case("kept in float16", kept, dtypes=(torch.float32,))

    def another_value(device, dtype, generator):  # values of another size
        (q, k, v, *rest, k_cache, v_cache, slots), options = make(device, dtype, generator, SHAPES[2], 16)
        return (q, k, v[..., :40], *rest, k_cache, v_cache[..., :40].contiguous(), slots), options

    yield Case("values of another size", another_value)

    def unturned(device, dtype, generator, kept):  # at position 0, where no variant rounds before the codes
        (q, k, v, table, positions, *rest), options = make(device, dtype, generator, SHAPES[6], 16, kept)
        return (q, k, v, table, positions * 0, *rest), options

    for kept in LARGEST:
        yield Case(f"kept in {kept}, at position 0", partial(unturned, kept=kept))


def _traffic(q: Tensor, k: Tensor, table: Tensor, positions: Tensor, **options: object) -> int:
    return 2 * (q.numel() + k.numel()) * q.element_size() + positions.numel() * table.shape[1] * table.element_size()


def _flops(q: Tensor, k: Tensor, table: Tensor, positions: Tensor, **options: object) -> int:
    return 3 * table.shape[1] * q.shape[0] * (q.shape[1] + k.shape[1])


def _kv_traffic(q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, *rest: Any, **options: Any) -> int:
    return _traffic(q, k, table, positions) + 2 * v.numel() * v.element_size()


rope = Op(
    "rope",
    reference=reference.rope,
    cases=_cases,
    tolerance=rounded_once,
    traffic=_traffic,
    flops=_flops,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
rope_kv = Op(
    "rope_kv",
    reference=reference.rope_kv,
    cases=_kv_cases,
    tolerance=rounded_once,
    traffic=_kv_traffic,
    home=__name__,
    sources={"cuda": ("triton",)},
)
