"""Gated activations: two values are read and one is written for each element."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance, randn
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import rounded_once

from . import reference

SHAPES = [(1, 1), (1, 32), (7, 688), (33, 97), (2, 1025)]
TIMED = [(1, 14336), (64, 14336), (1024, 14336)]


def _case(rows: int, size: int, option: str | None = None) -> Case:
    def make(device, dtype, generator):
        x = randn(generator, rows, 2 * size, dtype=dtype, scale=3.0)
        return (x,) if option is None else (x, option), {}

    return Case(f"{rows}x{size}{f', {option}' if option else ''}", make, timed=(rows, size) in TIMED)


def _cases(*options: str) -> Iterator[Case]:
    for rows, size in SHAPES + TIMED:
        for option in options or (None,):
            yield _case(rows, size, option)

    def view(device, dtype, generator):
        return (randn(generator, 3, 5, 96, dtype=dtype)[:, 1:4, 16:80],), {}

    def extreme(device, dtype, generator):
        gate = torch.tensor([-3e4, -100.0, -30.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 30.0, 100.0, 3e4], device=device)
        return (torch.cat((gate, torch.ones_like(gate))).to(dtype),), {}

    yield Case("a view", view)
    yield Case("large gates", extreme)


def _traffic(x: Tensor, *rest: object) -> int:
    return x.numel() * x.element_size() * 3 // 2


def _flops(x: Tensor, *rest: object) -> int:
    return x.numel() // 2 * 12  # an exponential counts as eight flops


def _gelu_tolerance(dtype: torch.dtype) -> Tolerance:
    if dtype != torch.float32:
        return rounded_once(dtype)
    return Tolerance(2e-6, 8e-6, "the reference's 1 + erf(gate) cancels for negative gates; `up` scales what is left")


silu_mul = Op(
    "silu_mul",
    reference=reference.silu_mul,
    cases=_cases,
    tolerance=rounded_once,
    traffic=_traffic,
    flops=_flops,
    sized=lambda rows, size: _case(rows, size),
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
gelu_mul = Op(
    "gelu_mul",
    reference=reference.gelu_mul,
    cases=lambda: _cases("tanh", "none"),
    tolerance=_gelu_tolerance,
    traffic=_traffic,
    flops=_flops,
    sized=lambda rows, size: _case(rows, size, "tanh"),
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
