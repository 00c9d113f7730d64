"""The batch-invariant product in C++. This module passes pointers and strides; the arithmetic is in rows.cpp."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from labkit_kernels import native
from labkit_kernels.linear import linear_invariant, reference

library = native.load(
    Path(__file__).with_name("rows.cpp"), {"linear_rows": [*[c_void_p] * 5, *[c_int64] * 6, c_int, c_int]}
)

if library is not None:
    _rows = library.linear_rows

    @linear_invariant.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def linear_invariant_cpu(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        given = [part for part in (weight, bias, residual) if part is not None]
        if any(part.dtype != x.dtype for part in given) or any(part.stride(-1) != 1 for part in (x, *given)):
            return reference.linear_invariant(x, weight, bias, residual)
        out = x.new_empty(len(x), len(weight))
        _rows(
            x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(), out.data_ptr(), len(x), len(weight), x.shape[1],
            x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), native.CODES[x.dtype],
            native.num_threads(),
        )  # fmt: skip
        return out
