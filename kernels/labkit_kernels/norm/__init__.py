"""RMS norm (optionally with the residual add before it) and layer norm: each vector is read once and written once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from labkit_kernels.check import Case, randn
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import rounded_once

from . import reference

# (vectors, size): one of each, a prime, just past what a program holds, more vectors than share a program
SHAPES = [(1, 1), (1, 32), (7, 256), (33, 96), (2, 1021), (3, 1025)]
TIMED = [(1, 4096), (256, 4096), (4096, 4096)]


def _rms_traffic(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> int:
    """Input and output, and the residual's input and output if there is one."""
    return x.numel() * x.element_size() * (2 if residual is None else 4) + weight.numel() * weight.element_size()


def _rms_flops(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> int:
    return x.numel() * (4 if residual is None else 5)


def _layer_traffic(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> int:
    return 2 * x.numel() * x.element_size()


def _layer_flops(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> int:
    return 7 * x.numel()


def _rms_case(rows: int, size: int, residual: bool) -> Case:
    def make(device, dtype, generator):
        x = randn(generator, rows, size, dtype=dtype)
        weight = randn(generator, size, dtype=dtype)
        return (x, weight, 1e-6, randn(generator, rows, size, dtype=dtype) if residual else None), {}

    return Case(f"{rows}x{size}{' + residual' if residual else ''}", make, timed=(rows, size) in TIMED)


def _rms_cases() -> Iterator[Case]:
    for rows, size in SHAPES + TIMED:
        for residual in (False, True):
            yield _rms_case(rows, size, residual)

    def heads(device, dtype, generator):
        fused = randn(generator, 5, 8 * 32, dtype=dtype)
        return (fused[:, 64:192].unflatten(-1, (4, 32)), randn(generator, 32), 1e-6), {}

    def views(device, dtype, generator):
        x, residual = (randn(generator, 9, 2 * 48, dtype=dtype)[:, :48] for _ in range(2))
        return (x, randn(generator, 48, dtype=dtype), 1e-5, residual), {}

    def batched(device, dtype, generator):
        x = randn(generator, 2, 3, 40, dtype=dtype)
        residual = randn(generator, 2, 5, 40, dtype=dtype)[:, :3]
        return (x, randn(generator, 40, dtype=dtype), 1e-5, residual), {}

    def wide(device, dtype, generator):
        return (randn(generator, 9, 48, dtype=dtype), randn(generator, 48), 1e-5, randn(generator, 9, 48)), {}

    def columns(device, dtype, generator):
        return (randn(generator, 24, 5, dtype=dtype).T, randn(generator, 24, dtype=dtype), 1e-5), {}

    yield Case("heads of a fused projection, float32 weight", heads)
    yield Case("views + residual that is a view", views)
    yield Case("three dimensions + residual that is a view", batched)
    yield Case("float32 residual", wide)
    yield Case("vectors that are columns", columns)


def _layer_case(rows: int, size: int) -> Case:
    def make(device, dtype, generator):
        x = randn(generator, rows, size, dtype=dtype) + 3.0
        weight, bias = randn(generator, 2, size, dtype=dtype)
        return (x, weight, bias, 1e-5), {}

    return Case(f"{rows}x{size}", make, timed=(rows, size) in TIMED)


def _layer_cases() -> Iterator[Case]:
    for rows, size in SHAPES + TIMED:
        yield _layer_case(rows, size)

    def bare(device, dtype, generator):
        return (randn(generator, 7, 2 * 64, dtype=dtype)[:, 64:], None, None, 1e-5), {}

    def no_bias(device, dtype, generator):
        return (randn(generator, 2, 3, 48, dtype=dtype), randn(generator, 48), None, 1e-5), {}

    yield Case("a view, no weight and no bias", bare)
    yield Case("float32 weight, no bias", no_bias)


rms_norm = Op(
    "rms_norm",
    reference=reference.rms_norm,
    cases=_rms_cases,
    tolerance=rounded_once,
    traffic=_rms_traffic,
    flops=_rms_flops,
    sized=lambda rows, size: _rms_case(rows, size, False),
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
layer_norm = Op(
    "layer_norm",
    reference=reference.layer_norm,
    cases=_layer_cases,
    tolerance=rounded_once,
    traffic=_layer_traffic,
    flops=_layer_flops,
    sized=_layer_case,
    home=__name__,
    sources={"cuda": ("triton",)},
)
