"""Packed linear layers in C++, for CPUs with AMX, AVX-512 or AVX2."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.linear import linear, linear_argmax, mlp, reference
from labkit_kernels.linear.library import Linear, Mlp, available, library
from labkit_kernels.linear.packed import Packed

GATES = {"silu": 0, "tanh": 1, "none": 2}
BF16 = (torch.bfloat16,)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


if available():
    _linear, _argmax, _mlp = library.linear_bfloat16, library.argmax_bfloat16, library.mlp_bfloat16  # type: ignore[union-attr]

    @linear.variant("cpu", device="cpu", dtypes=BF16, picked=True)
    def linear_cpu(
        x: Tensor,
        weight: Packed,
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
            x.data_ptr(), _pointer(norm), weight.tiles.data_ptr(), _pointer(bias), _pointer(residual), out.data_ptr(),
            rows, weight.depth, columns, x.stride(0), 0 if residual is None else residual.stride(0), columns, eps,
            0 if norm is None else native.CODES[norm.dtype], native.CODES[out.dtype], native.num_threads(),
        )  # fmt: skip
        if rows:
            _linear(call)
        return out

    @linear_argmax.variant("cpu", device="cpu", dtypes=BF16, picked=True)
    def linear_argmax_cpu(
        x: Tensor, weight: Packed, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        x = _dense(x)
        columns, sums = x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)
        call = Linear(
            x.data_ptr(), _pointer(norm), weight.tiles.data_ptr(), _pointer(bias), None, None,
            len(x), weight.depth, weight.columns, x.stride(0), 0, 0, eps,
            0 if norm is None else native.CODES[norm.dtype], 0, native.num_threads(),
        )  # fmt: skip
        if len(x):
            _argmax(call, columns.data_ptr(), sums.data_ptr())
        return columns, sums

    @mlp.variant("cpu", device="cpu", dtypes=BF16, picked=True)
    def mlp_cpu(
        x: Tensor,
        up: Packed,
        down: Packed,
        *,
        gate: str = "silu",
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        inner = up.columns // 2
        if inner % 16:
            return reference.mlp(x, up, down, gate=gate, norm=norm, eps=eps, residual=residual)
        x = _dense(x)
        if residual is not None:
            residual = _dense(residual)
        rows, size = len(x), down.columns
        out = x.new_empty(rows, size)
        call = Mlp(
            x.data_ptr(), _pointer(norm), up.tiles.data_ptr(), down.tiles.data_ptr(), _pointer(residual),
            out.data_ptr(), rows, size, inner, x.stride(0), 0 if residual is None else residual.stride(0), size, eps,
            0 if norm is None else native.CODES[norm.dtype], GATES[gate], native.num_threads(),
        )  # fmt: skip
        if rows:
            _mlp(call)
        return out
