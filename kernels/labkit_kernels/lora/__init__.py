"""Low-rank adapters (LoRA): tokens of many adapters and of none in one batch, each times its own two matrices.

`lora_shrink` multiplies by A into a few numbers a token; `lora_expand` multiplies them by B and adds that to the
product of the layer. Both are bound by reading A and B: 2 * rank * (inputs + outputs) bytes an adapter in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance, randn
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import ROUNDING

from . import reference
from .groups import TILE, Groups, grouped, most_tiles

__all__ = ["TILE", "Groups", "grouped", "lora_expand", "lora_shrink", "most_tiles"]

# name -> (tokens by slot, inputs, part sizes, rank, ranks in use by slot); the last count is of tokens without adapter
SHAPES: dict[str, tuple[Sequence[int], int, Sequence[int], int, Sequence[int]]] = {
    "one token": ([1, 0], 48, [48], 16, [16]),
    "three parts": ([3, 0, 2, 1], 96, [96, 32, 32], 16, [16, 8, 1]),
    "a prime": ([17, 1, 33, 5], 101, [37, 53], 32, [7, 32, 20]),
    "an adapter without this layer": ([4, 4, 0], 64, [80], 16, [0, 5]),
    "no token has an adapter": ([0, 0, 9], 64, [64], 16, [4, 8]),
    "rank 256": ([5, 2, 1], 80, [80, 48], 256, [256, 130]),
    "one more than a tile of each": ([17, 17, 17, 17, 3], 256, [272], 48, [48, 33, 16, 1]),
}
TIMED = {
    "8 rows, 8 adapters": ([1] * 8 + [0], 896, [896, 128, 128], 16, [16] * 8),
    "256 rows, 8 adapters": ([32] * 8 + [0], 4096, [4096, 1024, 1024], 16, [16] * 8),
    "2048 tokens, 3 adapters": ([1000, 500, 48, 500], 4096, [14336, 14336], 16, [16] * 3),
}


def make_groups(counts: Sequence[int], device: torch.device, seed: int = 0) -> Groups:
    """Tokens in mixed order: `counts` of each slot, and the last of no adapter."""
    slots = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(slots)
    tokens, tiles = (torch.from_numpy(part).to(device) for part in grouped(slots, len(counts) - 1))
    return Groups(tokens, tiles, torch.from_numpy(slots).to(device))


def _weights(generator: torch.Generator, slots: int, rank: int, size: int, ranks: Sequence[int], dtype: Any) -> Tensor:
    made = randn(generator, slots, rank, size, dtype=dtype, scale=(max(ranks) or 1) ** -0.5)
    for slot, used in enumerate(ranks):
        made[slot, used:] = 0
    return made


def _shrink_case(name: str, timed: bool = False) -> Case:
    counts, inputs, sizes, rank, ranks = (SHAPES | TIMED)[name]

    def make(device, dtype, generator):
        x = randn(generator, sum(counts), inputs + 16, dtype=dtype, scale=inputs**-0.5)[:, :inputs]
        a = [_weights(generator, len(ranks), rank, inputs, ranks, dtype) for _ in sizes]
        used = torch.tensor(ranks, dtype=torch.int32, device=device)
        splits = {} if timed else {"splits": 1 + len(name) % 3}
        return (x, torch.cat(a, 1), used, len(sizes), make_groups(counts, device)), splits

    return Case(name, make, timed=timed)


def _expand_case(name: str, timed: bool = False) -> Case:
    counts, _, sizes, rank, ranks = (SHAPES | TIMED)[name]

    def make(device, dtype, generator):
        out = randn(generator, sum(counts), sum(sizes) + 8, dtype=dtype)[:, : sum(sizes)]
        groups = make_groups(counts, device)
        splits = 1 if timed else 2
        t = randn(generator, splits, len(groups.tokens), len(sizes) * rank)
        for slot, first, end in groups.tiles.tolist():
            t[:, first:end].unflatten(-1, (len(sizes), rank))[..., ranks[slot] :] = 0
        b = _weights(generator, len(ranks), rank, sum(sizes), ranks, dtype)
        used = torch.tensor(ranks, dtype=torch.int32, device=device)
        return (out, t, b, used, tuple(sizes), groups), {}

    return Case(name, make, timed=timed)


def _used(groups: Groups, ranks: Tensor) -> tuple[int, int]:
    """Summed over tokens, and over adapters that any token uses: their ranks."""
    tiles, rank = groups.tiles.tolist(), ranks.tolist()
    return sum(rank[s] * (end - first) for s, first, end in tiles), sum(
        rank[s] for s in {s for s, f, e in tiles if e > f}
    )


def _shrink_traffic(x: Tensor, a: Tensor, ranks: Tensor, parts: int, groups: Groups, splits: int = 1) -> int:
    return (len(groups.tokens) + parts * _used(groups, ranks)[1]) * x.shape[1] * x.element_size()


def _shrink_flops(x: Tensor, a: Tensor, ranks: Tensor, parts: int, groups: Groups, splits: int = 1) -> int:
    return 2 * parts * _used(groups, ranks)[0] * x.shape[1]


def _expand_traffic(out: Tensor, t: Tensor, b: Tensor, ranks: Tensor, sizes: Sequence[int], groups: Groups) -> int:
    numbers = 2 * len(groups.tokens) + _used(groups, ranks)[1]
    return numbers * out.shape[1] * out.element_size() + t.numel() * 4


def _expand_flops(out: Tensor, t: Tensor, b: Tensor, ranks: Tensor, sizes: Sequence[int], groups: Groups) -> int:
    return 2 * _used(groups, ranks)[0] * out.shape[1]


def _sums(dtype: torch.dtype) -> Tolerance:
    return Tolerance(1e-4, 2e-5, "exact products, summed in float32 in another order")


def _added(dtype: torch.dtype) -> Tolerance:
    unit = max(ROUNDING[dtype], 2e-5)
    return Tolerance(unit, 2 * unit, "summed in float32 (16-bit weights: t in TF32) and rounded once")


def _apart(found: Tensor, expected: Tensor, tolerance: Tolerance) -> float:
    """Summands count by their sum: variants may cut the inputs into several."""
    found, expected = found.sum(0), expected.sum(0)
    if not expected.numel():
        return 0.0
    return float(((found - expected).abs() / (tolerance.atol + tolerance.rtol * expected.abs())).max())


def _cases(make: Any) -> Any:
    def cases() -> Iterator[Case]:
        for name in SHAPES:
            yield make(name)
        for name in TIMED:
            yield make(name, timed=True)

    return cases


lora_shrink = Op(
    "lora_shrink",
    reference=reference.lora_shrink,
    cases=_cases(_shrink_case),
    tolerance=_sums,
    traffic=_shrink_traffic,
    flops=_shrink_flops,
    compare=_apart,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
lora_expand = Op(
    "lora_expand",
    reference=reference.lora_expand,
    cases=_cases(_expand_case),
    tolerance=_added,
    traffic=_expand_traffic,
    flops=_expand_flops,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
