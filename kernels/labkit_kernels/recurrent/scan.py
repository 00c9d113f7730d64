"""The scan of Mamba 2 in C++. This module passes pointers and strides; the arithmetic is in ssd.cpp."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.layout import dense_like
from labkit_kernels.recurrent import reference, ssd
from labkit_kernels.recurrent.sequences import Sequences, ssd_shapes

library = native.load(
    Path(__file__).with_name("ssd.cpp"),
    {"ssd": [c_void_p] * 12 + [c_int64] * 12 + [c_double] * 2 + [c_int] * 3},
)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


if library is not None:
    _ssd = library.ssd

    @ssd.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def ssd_cpu(
        x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
        *, d: Tensor | None = None, dt_bias: Tensor | None = None, softplus: bool = True,
        limits: tuple[float, float] = (0.0, float("inf")),
    ) -> Tensor:  # fmt: skip
        ssd_shapes(x, dt, a, b, c, state, d, dt_bias)
        query_start, slot, fresh = sequences = sequences.checked()
        if not state.is_contiguous() or state.dtype != torch.float32 or not x.dtype == b.dtype == c.dtype:
            options = {"d": d, "dt_bias": dt_bias, "softplus": softplus, "limits": limits}
            return reference.ssd(x, dt, a, b, c, state, sequences, **options)  # type: ignore[arg-type]
        x, b, c = (y if y.stride(2) == 1 else y.contiguous() for y in (x, b, c))
        dt = dt.float()
        dt = dt if dt.stride(1) == 1 else dt.contiguous()
        a, d, dt_bias, out = a.float().contiguous(), _floats(d), _floats(dt_bias), dense_like(x)
        _, heads, size, states = state.shape
        _ssd(
            x.data_ptr(), dt.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr(), _pointer(d), _pointer(dt_bias),
            state.data_ptr(), out.data_ptr(), query_start.data_ptr(), slot.data_ptr(), _pointer(fresh), len(slot),
            *x.stride()[:2], dt.stride(0), *b.stride()[:2], *c.stride()[:2], b.shape[1], heads, size, states,
            *limits, softplus, native.CODES[x.dtype], native.num_threads(),
        )  # fmt: skip
        return out
