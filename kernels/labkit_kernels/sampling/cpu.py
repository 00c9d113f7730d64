"""The C++ sampler as a variant. This module passes pointers; the arithmetic is in cpu.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native

from . import sample

POINTERS = ("logits", "temperature", "top_k", "top_p", "min_p", "key", "out")
COUNTS = ("row_stride", "num_rows", "vocab_size", "num_threads")


class Call(ctypes.Structure):
    """`Call` in cpu.cpp, field for field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in COUNTS)]


_library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {f"sample_{name}": [ctypes.POINTER(Call)] for name in ("float32", "bfloat16")},
)
_functions = (
    {torch.float32: _library.sample_float32, torch.bfloat16: _library.sample_bfloat16} if _library is not None else {}
)


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: Tensor) -> Tensor:
    """Rows may be a view of a larger tensor; float16 logits are converted."""
    if logits.dtype not in _functions:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    columns = [
        x.to(kind).contiguous()
        for x, kind in (
            (temperature, torch.float32),
            (top_k, torch.int32),
            (top_p, torch.float32),
            (min_p, torch.float32),
            (key, torch.int64),
        )
    ]
    out = torch.empty(num_rows, dtype=torch.int64)
    pointers = (x.data_ptr() for x in (logits, *columns, out))
    _functions[logits.dtype](Call(*pointers, logits.stride(0), num_rows, vocab_size, torch.get_num_threads()))
    return out


if _functions:
    draw = sample.variant("cpu", device="cpu", picked=True)(draw)
