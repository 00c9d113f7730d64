"""Recurrent layers: short convolutions, the gated delta rule and state-space scans over a step's sequences.

Each sequence of a step reads its state from a slot and writes it back (`Sequences`), so decode rows and chunks of
prompts go in one call, and a sequence gives the same results however it is cut, up to rounding in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import ROUNDING, rounded_once

from . import cases, reference
from .sequences import Sequences

__all__ = ["Sequences", "causal_conv", "gated_delta", "selective_scan", "ssd"]


def _summed(dtype: torch.dtype) -> Tolerance:
    unit = max(ROUNDING[dtype], 1e-5)
    return Tolerance(
        unit, 2 * unit, "states and sums in float32, in another order and with decays multiplied otherwise"
    )


def _conv_cases() -> Iterator[Case]:
    for i, name in enumerate(cases.MIXES):
        yield cases.conv_case(name, (32, 7, 48, 521, 65)[i], (4, 3, 2, 4, 4)[i], i % 2 == 0, i % 3 == 0)
    for name in cases.TIMED:
        yield cases.conv_case(name, 8192, 4, True, False)


def _delta_cases() -> Iterator[Case]:
    shapes = [(1, 1, 16, 16), (2, 4, 24, 40), (2, 2, 32, 17), (1, 3, 7, 32), (1, 2, 64, 40)]
    for i, (name, shape) in enumerate(zip(cases.MIXES, shapes, strict=True)):
        yield cases.delta_case(name, *shape, channels=i == 2)
    yield cases.delta_case("decode", 1, 1, 32, 16, channels=True)
    yield cases.delta_case("decode rows and chunks", 1, 1, 16, 16, forgets=0.01)
    yield cases.delta_case("decode rows and chunks", 1, 1, 16, 16, forgets=30.0)
    yield cases.delta_case("a chunk", 1, 1, 16, 16, channels=True, forgets=30.0)
    for name in cases.TIMED:
        yield cases.delta_case(name, 16, 32, 128, 128)


def _ssd_cases() -> Iterator[Case]:
    shapes = [(1, 1, 16, 16), (2, 4, 24, 40), (1, 2, 32, 17), (1, 3, 7, 32), (1, 2, 40, 96)]
    for i, (name, shape) in enumerate(zip(cases.MIXES, shapes, strict=True)):
        yield cases.ssd_case(name, *shape, plain=i == 2)
    for name in cases.TIMED:
        yield cases.ssd_case(name, 8, 128, 64, 128)


def _scan_cases() -> Iterator[Case]:
    shapes = [(16, 16), (40, 8), (33, 7), (65, 16), (24, 24)]
    for i, (name, shape) in enumerate(zip(cases.MIXES, shapes, strict=True)):
        yield cases.scan_case(name, *shape, plain=i == 2)
    for name in cases.TIMED:
        yield cases.scan_case(name, 8192, 16)


def _states(state: Tensor, sequences: Sequences) -> int:
    """Bytes of the states that are read and written."""
    num = sum((slot >= 0) * (2 - fresh) for _, _, slot, fresh in sequences.each())
    return num * state[0].numel() * state.element_size()


def _conv_traffic(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, sequences: Sequences, *_: Any) -> int:
    return 2 * x.numel() * x.element_size() + weight.numel() * weight.element_size() + _states(state, sequences)


def _conv_flops(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * x.numel() * weight.shape[1]


def _delta_traffic(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, sequences: Sequences,
                   **_: Any) -> int:  # fmt: skip
    given = sum(x.numel() * x.element_size() for x in (q, k, v, v, g, beta))
    return given + _states(state, sequences)


def _delta_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return 6 * v.numel() * k.shape[-1]


def _ssd_traffic(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
                 **_: Any) -> int:  # fmt: skip
    return sum(y.numel() * y.element_size() for y in (x, x, dt, b, c)) + _states(state, sequences)


def _ssd_flops(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 4 * x.numel() * b.shape[-1]


def _scan_traffic(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
                  *, gate: Tensor | None = None, **_: Any) -> int:  # fmt: skip
    given = sum(y.numel() * y.element_size() for y in (x, x, dt, a, b, c, *([] if gate is None else [gate])))
    return given + _states(state, sequences)


def _scan_flops(x: Tensor, dt: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    return 6 * x.numel() * a.shape[-1]


causal_conv = Op(
    "causal_conv",
    reference=reference.causal_conv,
    cases=_conv_cases,
    tolerance=rounded_once,
    traffic=_conv_traffic,
    flops=_conv_flops,
    home=__name__,
    sources={"cpu": ("conv",), "cuda": ("triton",)},
)
gated_delta = Op(
    "gated_delta",
    reference=reference.gated_delta,
    cases=_delta_cases,
    tolerance=_summed,
    traffic=_delta_traffic,
    flops=_delta_flops,
    home=__name__,
    sources={"cpu": ("delta",), "cuda": ("triton",)},
)
ssd = Op(
    "ssd",
    reference=reference.ssd,
    cases=_ssd_cases,
    tolerance=_summed,
    traffic=_ssd_traffic,
    flops=_ssd_flops,
    home=__name__,
    sources={"cpu": ("scan",), "cuda": ("triton",)},
)
selective_scan = Op(
    "selective_scan",
    reference=reference.selective_scan,
    cases=_scan_cases,
    tolerance=_summed,
    traffic=_scan_traffic,
    flops=_scan_flops,
    home=__name__,
    sources={"cpu": ("scan",), "cuda": ("triton",)},
)
