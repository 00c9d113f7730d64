"""Gated activations in C++. This module passes pointers and strides; the arithmetic is in cpu.cpp."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from labkit_kernels import native
from labkit_kernels.activation import gelu_mul, silu_mul
from labkit_kernels.layout import dense_rows

SILU, GELU = 0, {"tanh": 1, "none": 2}
library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {"gated_act": [c_void_p] * 2 + [c_int64] * 5 + [c_int] * 3},
)

if library is not None:
    _gated_act = library.gated_act

    def _gated(x: Tensor, act: int) -> Tensor:
        x, (outer, inner, x_outer, x_inner) = dense_rows(x)
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        _gated_act(
            x.data_ptr(), out.data_ptr(), outer, inner, size, x_outer, x_inner, act, native.CODES[x.dtype],
            native.num_threads(),
        )  # fmt: skip
        return out

    @silu_mul.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def silu_mul_cpu(x: Tensor) -> Tensor:
        return _gated(x, SILU)

    @gelu_mul.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def gelu_mul_cpu(x: Tensor, approximate: str = "tanh") -> Tensor:
        return _gated(x, GELU[approximate])
