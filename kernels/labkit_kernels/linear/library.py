"""ctypes bindings of cpu.cpp: its structures, its functions, and whether this machine can run them."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from labkit_kernels import native


class Linear(ctypes.Structure):
    """`Linear` in cpu.cpp, field for field."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "norm", "weight", "bias", "residual", "out")),
        *((name, c_int64) for name in ("rows", "depth", "columns", "x_row", "residual_row", "out_row")),
        ("eps", c_double),
        ("norm_dtype", c_int32),
        ("out_dtype", c_int32),
        ("num_threads", c_int64),
    ]


class Mlp(ctypes.Structure):
    """`Mlp` in cpu.cpp, field for field."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "norm", "up", "down", "residual", "out")),
        *((name, c_int64) for name in ("rows", "size", "inner", "x_row", "residual_row", "out_row")),
        ("eps", c_double),
        ("norm_dtype", c_int32),
        ("gate", c_int32),
        ("num_threads", c_int64),
    ]


library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {
        "linear_available": [ctypes.POINTER(c_int32)],
        "linear_bfloat16": [ctypes.POINTER(Linear)],
        "argmax_bfloat16": [ctypes.POINTER(Linear), c_void_p, c_void_p],
        "mlp_bfloat16": [ctypes.POINTER(Mlp)],
        "pack_weight": [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64],
    },
)


def available() -> bool:
    """Whether the library has code for this machine: for AMX, AVX-512 or AVX2."""
    answer = c_int32(0)
    if library is not None:
        library.linear_available(answer)
    return bool(answer.value)


def _pack(weight: Tensor, tiles: Tensor) -> None:
    columns, depth = weight.shape
    library.pack_weight(  # type: ignore[union-attr]
        weight.data_ptr(), weight.stride(0), columns, depth, 16 * len(tiles), tiles.data_ptr(), native.num_threads()
    )


pack = _pack if library is not None else None
