"""ctypes bindings of cpu.cpp: its structures, its functions, and whether this machine can run them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int8, c_int32, c_int64, c_uint8, c_void_p
from pathlib import Path

from torch import Tensor

from labkit_kernels import native


class Weight(ctypes.Structure):
    """`Weight` in cpu.cpp, field for field."""

    _fields_ = [
        *((name, c_void_p) for name in ("values", "scales", "offsets", "order")),
        *((name, c_int64) for name in ("columns", "depth", "groups", "group")),
        ("bits", c_int32),
        ("half", c_int32),
        ("table", c_int8 * 16),
    ]


class Linear(ctypes.Structure):
    """`Linear` in cpu.cpp, field for field."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "norm", "bias", "residual", "out")),
        ("weight", POINTER(Weight)),
        *((name, c_int64) for name in ("rows", "x_row", "residual_row", "out_row")),
        ("eps", c_double),
        ("norm_dtype", c_int32),
        ("out_dtype", c_int32),
        ("num_threads", c_int64),
    ]


class Mlp(ctypes.Structure):
    """`Mlp` in cpu.cpp, field for field."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "norm", "residual", "out")),
        ("up", POINTER(Weight)),
        ("down", POINTER(Weight)),
        *((name, c_int64) for name in ("rows", "x_row", "residual_row", "out_row")),
        ("eps", c_double),
        ("norm_dtype", c_int32),
        ("gate", c_int32),
        ("num_threads", c_int64),
    ]


library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {
        "integers_available": [POINTER(c_int32)],
        "linear_integers": [POINTER(Linear)],
        "argmax_integers": [POINTER(Linear), c_void_p, c_void_p],
        "mlp_integers": [POINTER(Mlp)],
        "gather_integers": [POINTER(Weight), c_void_p, c_int64, c_void_p],
        "pack_integers": [c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int32, c_uint8, c_void_p, c_int64],
    },
)


def available() -> bool:
    """Whether the library has code for this machine: for AMX, AVX-512 VNNI, AVX2 or ARM's dot products."""
    answer = c_int32(0)
    if library is not None:
        library.integers_available(answer)
    return bool(answer.value)


def pack(values: Tensor, tiled: Tensor, deep: int, bits: int, rest: int) -> None:
    columns, depth = values.shape
    library.pack_integers(  # type: ignore[union-attr]
        values.data_ptr(), values.stride(0), columns, depth, len(tiled), deep, bits, rest, tiled.data_ptr(),
        native.num_threads(),
    )  # fmt: skip


def gather(weight: Weight, ids: Tensor, out: Tensor) -> None:
    library.gather_integers(weight, ids.data_ptr(), len(ids), out.data_ptr())  # type: ignore[union-attr]
