"""RMS norm in C++. This module passes pointers and strides; the arithmetic is in cpu.cpp."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from labkit_kernels import native
from labkit_kernels.layout import dense_like, dense_rows, rows
from labkit_kernels.norm import reference, rms_norm

library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {"rms_norm": [c_void_p] * 4 + [c_int64] * 7 + [c_double] + [c_int] * 3},
)

if library is not None:
    _rms_norm = library.rms_norm

    @rms_norm.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        kind = native.CODES.get(weight.dtype)
        lies = None if residual is None else rows(residual)
        if kind is None or (residual is not None and (lies is None or residual.dtype != x.dtype)):
            return reference.rms_norm(x, weight, eps, residual)
        x, (outer, inner, x_outer, x_inner) = dense_rows(x)
        if lies is not None and lies[:2] != (outer, inner):  # one of them is dense, the other a view
            outer, inner = x.shape[:-1] if x.dim() == 3 else (x.shape[0], 1)
            (x_outer, x_inner), lies = _strides(x), (outer, inner, *_strides(residual))
        out = dense_like(x)
        weight = weight.contiguous()
        _rms_norm(
            x.data_ptr(), weight.data_ptr(), None if residual is None else residual.data_ptr(), out.data_ptr(),
            outer, inner, x.shape[-1], x_outer, x_inner, *(lies[2:] if lies is not None else (0, 0)), eps,
            native.CODES[x.dtype], kind, native.num_threads(),
        )  # fmt: skip
        return out

    def _strides(x: Tensor) -> tuple[int, int]:
        return (x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), 0)
