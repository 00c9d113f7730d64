"""RMS norm (with the residual sum before it) and layer norm: reads and writes each vector once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import rounded_once

from . import reference

SHAPES = [(1, 32), (7, 256), (33, 96), (2, 1021)]


def _traffic(x: Tensor, *rest: Any, **options: Any) -> int:
    has_residual = len(rest) > 2 and rest[2] is not None
    return x.numel() * x.element_size() * (4 if has_residual else 2)


def _rms_cases() -> Iterator[Case]:
    for rows, size in SHAPES:
        for residual in (False, True):

            def make(device, dtype, generator, rows=rows, size=size, residual=residual):
                x = torch.randn(rows, size, device=device, dtype=dtype, generator=generator)
                weight = torch.rand(size, device=device, generator=generator).to(dtype) + 0.5
                other = torch.randn(rows, size, device=device, dtype=dtype, generator=generator) if residual else None
                return (x, weight, 1e-6, other), {}

            yield Case(f"{rows}x{size}{' + residual' if residual else ''}", make)

    def heads(device, dtype, generator):
        fused = torch.randn(5, 8 * 32, device=device, dtype=dtype, generator=generator)
        return (fused[:, 64:192].unflatten(-1, (4, 32)), torch.ones(32, device=device), 1e-6), {}

    yield Case("heads of a fused projection, float32 weight", heads)


def _layer_cases() -> Iterator[Case]:
    for rows, size in SHAPES:

        def make(device, dtype, generator, rows=rows, size=size):
            x = torch.randn(rows, size, device=device, dtype=dtype, generator=generator) + 3.0
            weight, bias = torch.randn(2, size, device=device, generator=generator).to(dtype)
            return (x, weight, bias, 1e-5), {}

        yield Case(f"{rows}x{size}", make)


rms_norm = Op(
    "rms_norm",
    reference=reference.rms_norm,
    cases=_rms_cases,
    tolerance=rounded_once,
    traffic=_traffic,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
layer_norm = Op(
    "layer_norm",
    reference=reference.layer_norm,
    cases=_layer_cases,
    tolerance=rounded_once,
    traffic=_traffic,
    home=__name__,
    sources={"cuda": ("triton",)},
)
