"""Samples one token from each row of logits. The same key gives the same token, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance
from labkit_kernels.registry import Op

from . import reference

# name -> temperature, top_k, top_p, min_p
SETTINGS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (0.8, 0, 1.0, 0.0),
    "top_k": (0.8, 3, 1.0, 0.0),
    "top_p": (0.8, 0, 0.7, 0.0),
    "min_p": (0.8, 0, 1.0, 0.05),
    "all": (0.8, 50, 0.9, 0.05),
}


def make_rows(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, rows: int, vocab: int, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rows that use these settings in turn. Logits are rounded to the dtype, so coarse dtypes have ties."""
    logits = (3 * torch.randn(rows, vocab, device=device, generator=generator)).to(dtype).float()
    asked = [SETTINGS[names[i % len(names)]] for i in range(rows)]
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32)
    columns = [
        torch.tensor(x, dtype=kind, device=device) for x, kind in zip(zip(*asked, strict=True), kinds, strict=True)
    ]
    return (logits, *columns, torch.randint(-(2**62), 2**62, (rows,), device=device, generator=generator)), {}


def _cases() -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    for rows, vocab in ((1, 2), (13, 97), (3, 4096), (2, 32_003)):
        for name in SETTINGS:

            def make(device, dtype, generator, rows=rows, vocab=vocab, name=name):
                return make_rows(device, dtype, generator, rows, vocab, (name,))

            yield Case(f"{rows}x{vocab}, {name}", make, dtypes)

    def mixed(device, dtype, generator):
        return make_rows(device, dtype, generator, 13, 1009, tuple(SETTINGS))

    yield Case("13x1009, each row its own", mixed, dtypes)

    def as_they_are(device, dtype, generator):
        (logits, *rest), options = make_rows(device, dtype, generator, 7, 517, tuple(SETTINGS))
        return (logits.to(dtype), *rest), options

    yield Case("7x517, logits of the dtype", as_they_are, (torch.bfloat16,))
    for name in SETTINGS:

        def make_large(device, dtype, generator, name=name):
            return make_rows(device, dtype, generator, 48, 151_936, (name,))

        yield Case(f"48x151936, {name}", make_large, dtypes, timed=True)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    return Tolerance(
        0.0,
        0.0,
        "the hash and the order of logits are exact; logarithms and sums round, which changes a draw only where the "
        "two best scores are some 1e-6 apart: one draw in a million, and none of these cases'",
    )


def _traffic(logits: Tensor, *rest: Any) -> int:
    return logits.nbytes


sample = Op(
    "sample",
    reference=reference.sample,
    cases=_cases,
    tolerance=_tolerance,
    traffic=_traffic,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
