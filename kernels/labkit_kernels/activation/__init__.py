"""Gated activations: two values read and one written for each place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import rounded_once

from . import reference


def _cases(*options: str) -> Iterator[Case]:
    for rows, size in [(1, 32), (7, 688), (33, 97)]:
        for option in options or (None,):

            def make(device, dtype, generator, rows=rows, size=size, option=option):
                x = 3 * torch.randn(rows, 2 * size, device=device, dtype=dtype, generator=generator)
                return (x,) if option is None else (x, option), {}

            yield Case(f"{rows}x{size}{f', {option}' if option else ''}", make)


def _traffic(x: Tensor, *rest: object) -> int:
    return x.numel() * x.element_size() * 3 // 2


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
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
gelu_mul = Op(
    "gelu_mul",
    reference=reference.gelu_mul,
    cases=lambda: _cases("tanh", "none"),
    tolerance=_gelu_tolerance,
    traffic=_traffic,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
