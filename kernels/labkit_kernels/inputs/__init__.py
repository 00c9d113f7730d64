"""What a step's tokens, positions, slots and random keys are, from a few numbers for each of its sequences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import exact

from . import reference

# queries of each sequence, sequences of padding, tokens of padding, samples, block size
SHAPES = [
    ((1,), 0, 0, 1, 4),
    ((1, 1, 1), 2, 5, 5, 16),
    ((1, 3, 1, 17, 2), 0, 0, 5, 5),
    ((1, 1, 40, 7), 4, 80, 8, 16),
    ((5, 300), 14, 15, 3, 32),
]
TIMED = [((1,) * 256, 0, 0, 256, 32), ((1,) * 128 + (512, 512), 126, 128, 256, 32)]


def _cases() -> Iterator[Case]:
    def make(device, dtype, generator, counts, pads, more, samples, size):
        def numbers(most: int, *shape: int, least: int = 0, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.randint(least, most, shape, device=device, generator=generator).to(kind)

        num_rows, num_seqs = len(counts) + 5, len(counts) + pads
        lengths = torch.tensor([*counts, *[0] * pads], device=device)
        query_start = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
        total = sum(counts)
        ids = numbers(1000, total + more)
        ids[query_start[: len(counts)].long()] = torch.where(lengths[: len(counts)] == 1, -1, 7).int()
        rows = torch.randperm(num_rows, device=device, generator=generator).int()[: len(counts)]
        rows = torch.cat((rows, rows.new_full((pads,), num_rows)))
        start = numbers(90, num_seqs)
        start[len(counts) :] = 0
        tables = numbers(500, num_rows + 1, 2 + (90 + max(counts)) // size)
        latest, seeds = (numbers(2**40, num_rows + 1, least=-(2**40), kind=torch.int64) for _ in range(2))
        queries, drawn = numbers(total, samples), numbers(num_rows, samples)
        return (ids, rows, start, query_start, tables, latest, queries, drawn, seeds, size), {}

    for shape in SHAPES + TIMED:
        counts, pads, more, samples, size = shape
        name = f"{len(counts)} sequences with {sum(counts)} tokens, {pads} and {more} of padding, blocks of {size}"
        parts = {"counts": counts, "pads": pads, "more": more, "samples": samples, "size": size}
        yield Case(name, partial(make, **parts), (torch.float32,), timed=shape in TIMED)


def _traffic(ids: Tensor, rows: Tensor, *rest: Any) -> int:
    return ids.numel() * (4 + 4 + 3 * 8) + rows.numel() * 16 + rest[4].numel() * (4 + 4 + 8 + 8)


step_inputs = Op(
    "step_inputs",
    reference=reference.step_inputs,
    cases=_cases,
    tolerance=exact,
    traffic=_traffic,
    home=__name__,
    sources={"cuda": ("triton",)},
)
