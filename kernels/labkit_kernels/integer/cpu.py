"""Integer linear layers in C++, for CPUs that multiply bytes (AVX2, AVX-512 VNNI, AMX)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.integer import integer_argmax, integer_linear, integer_mlp, reference
from labkit_kernels.integer.library import Linear, Mlp, available, library
from labkit_kernels.integer.packed import Integers

GATES = {"silu": 0, "tanh": 1, "none": 2}
BF16 = (torch.bfloat16,)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


if available():
    _linear, _argmax, _mlp = library.linear_integers, library.argmax_integers, library.mlp_integers  # type: ignore[union-attr]

    @integer_linear.variant("cpu", device="cpu", dtypes=BF16, picked=True)
    def integer_linear_cpu(
        x: Tensor,
        weight: Integers,
        bias: Tensor | None = None,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        x = _dense(x)
        if residual is not None:
            residual = _dense(residual)
        rows, columns = len(x), weight.columns
        out = x.new_empty(rows, columns, dtype=out_dtype)
        call = Linear(
            x.data_ptr(), _pointer(norm), _pointer(bias), _pointer(residual), out.data_ptr(),
            ctypes.pointer(weight.described), rows, x.stride(0), 0 if residual is None else residual.stride(0), columns,
            eps, 0 if norm is None else native.CODES[norm.dtype], native.CODES[out.dtype], native.num_threads(),
        )  # fmt: skip
        if rows:
            _linear(call)
        return out

    @integer_argmax.variant("cpu", device="cpu", dtypes=BF16, picked=True)
    def integer_argmax_cpu(
        x: Tensor, weight: Integers, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        x = _dense(x)
        columns, sums = x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)
        call = Linear(
            x.data_ptr(), _pointer(norm), _pointer(bias), None, None, ctypes.pointer(weight.described), len(x),
            x.stride(0), 0, 0, eps, 0 if norm is None else native.CODES[norm.dtype], 0, native.num_threads(),
        )  # fmt: skip
        if len(x):
            _argmax(call, columns.data_ptr(), sums.data_ptr())
        return columns, sums

    @integer_mlp.variant("cpu", device="cpu", dtypes=BF16, picked=True)
    def integer_mlp_cpu(
        x: Tensor,
        up: Integers,
        down: Integers,
        *,
        gate: str = "silu",
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        if down.depth % 16:
            return reference.integer_mlp(x, up, down, gate=gate, norm=norm, eps=eps, residual=residual)
        x = _dense(x)
        if residual is not None:
            residual = _dense(residual)
        rows, size = len(x), down.columns
        out = x.new_empty(rows, size)
        call = Mlp(
            x.data_ptr(), _pointer(norm), _pointer(residual), out.data_ptr(), ctypes.pointer(up.described),
            ctypes.pointer(down.described), rows, x.stride(0), 0 if residual is None else residual.stride(0), size, eps,
            0 if norm is None else native.CODES[norm.dtype], GATES[gate], native.num_threads(),
        )  # fmt: skip
        if rows:
            _mlp(call)
        return out
