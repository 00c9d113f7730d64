"""The scans of Mamba 1 and 2 in C++. This module passes pointers and strides; the arithmetic is in scan.cpp and
ssd.cpp."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.layout import dense_like
from labkit_kernels.recurrent import reference, selective_scan, ssd
from labkit_kernels.recurrent.sequences import Sequences, scan_shapes, ssd_shapes

library = native.load(
    Path(__file__).with_name("ssd.cpp"),
    {"ssd": [c_void_p] * 12 + [c_int64] * 12 + [c_double] * 2 + [c_int] * 3},
)
first = native.load(
    Path(__file__).with_name("scan.cpp"),
    {"selective_scan": [c_void_p] * 13 + [c_int64] * 8 + [c_int] * 3},
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


if first is not None:
    _selective_scan = first.selective_scan

    @selective_scan.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def selective_scan_cpu(
        x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
        *, d: Tensor | None = None, dt_bias: Tensor | None = None, gate: Tensor | None = None, softplus: bool = True,
    ) -> Tensor:  # fmt: skip
        scan_shapes(x, dt, a, b, c, state, d, dt_bias, gate)
        query_start, slot, fresh = sequences = sequences.checked()
        same = x.dtype == b.dtype == c.dtype == (x if gate is None else gate).dtype
        if not state.is_contiguous() or state.dtype != torch.float32 or not same:
            options = {"d": d, "dt_bias": dt_bias, "gate": gate, "softplus": softplus}
            return reference.selective_scan(x, dt, a, b, c, state, sequences, **options)  # type: ignore[arg-type]
        x, dt, b, c = (_rows(y) for y in (x, dt.float(), b, c))
        gate = None if gate is None else _rows(gate)
        a, d, dt_bias, out = a.float().contiguous(), _floats(d), _floats(dt_bias), dense_like(x)
        _, channels, states = state.shape
        _selective_scan(
            x.data_ptr(), dt.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr(), _pointer(d), _pointer(dt_bias),
            _pointer(gate), state.data_ptr(), out.data_ptr(), query_start.data_ptr(), slot.data_ptr(), _pointer(fresh),
            len(slot), x.stride(0), dt.stride(0), b.stride(0), c.stride(0), 0 if gate is None else gate.stride(0),
            channels, states, softplus, native.CODES[x.dtype], native.num_threads(),
        )  # fmt: skip
        return out

    def _rows(x: Tensor) -> Tensor:
        return x if x.stride(-1) == 1 else x.contiguous()
