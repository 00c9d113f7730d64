"""One token from each row of logits. The same key gives the same token, whatever else is drawn beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance
from labkit_kernels.registry import Op

from . import reference


def _cases() -> Iterator[Case]:
    for rows, vocab in [(1, 2), (5, 97), (33, 4096), (3, 32_003)]:
        for name in ("greedy", "plain", "top_k", "top_p", "min_p", "all"):

            def make(device, dtype, generator, rows=rows, vocab=vocab, name=name):
                logits = 3 * torch.randn(rows, vocab, device=device, generator=generator)
                logits = logits.to(dtype).float()  # coarse values tie

                def column(on: bool, value: float, off: float, kind: torch.dtype) -> Tensor:
                    return torch.full((rows,), value if on else off, device=device, dtype=kind)

                return (
                    logits,
                    column(name != "greedy", 0.8, 0.0, torch.float32),
                    column(name in ("top_k", "all"), 5, 0, torch.int32),
                    column(name in ("top_p", "all"), 0.7, 1.0, torch.float32),
                    column(name in ("min_p", "all"), 0.05, 0.0, torch.float32),
                    torch.randint(-(2**62), 2**62, (rows,), device=device, generator=generator),
                ), {}

            yield Case(f"{rows}x{vocab}, {name}", make)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    return Tolerance(0.0, 0.0, "the same hash, the same filters: at most one draw of a batch may fall on a rounding")


def _compare(expected: Any, found: Any, tolerance: Tolerance) -> float:
    if expected.is_floating_point() or expected.shape != found.shape:
        return 0.0 if torch.equal(expected, found) else float("inf")
    return float((expected != found).sum()) if len(expected) > 1 else float(2 * (expected != found).sum())


def _traffic(logits: Tensor, *rest: Any) -> int:
    return logits.numel() * 4


sample = Op(
    "sample",
    reference=reference.sample,
    cases=_cases,
    tolerance=_tolerance,
    traffic=_traffic,
    compare=_compare,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
