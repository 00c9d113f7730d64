"""The gated delta rule in C++. This module passes pointers and strides; the arithmetic is in delta.cpp."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.layout import dense_like
from labkit_kernels.recurrent import gated_delta, reference
from labkit_kernels.recurrent.sequences import Sequences, delta_shapes

library = native.load(
    Path(__file__).with_name("delta.cpp"),
    {"gated_delta": [c_void_p] * 10 + [c_int64] * 11 + [c_double] + [c_int] * 4},
)

if library is not None:
    _gated_delta = library.gated_delta

    @gated_delta.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def gated_delta_cpu(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, sequences: Sequences,
        *, normalize: bool = False, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        delta_shapes(q, k, v, g, beta, state)
        query_start, slot, fresh = sequences = sequences.checked()
        if not state.is_contiguous() or state.dtype != torch.float32 or not q.dtype == k.dtype == v.dtype:
            return reference.gated_delta(q, k, v, g, beta, state, sequences, normalize=normalize, scale=scale)
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        g, beta, out = g.float().contiguous(), beta.float().contiguous(), dense_like(v)
        _, heads, size, value = state.shape
        _gated_delta(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), g.data_ptr(), beta.data_ptr(), state.data_ptr(), out.data_ptr(),
            query_start.data_ptr(), slot.data_ptr(), None if fresh is None else fresh.data_ptr(), len(slot),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], q.shape[1], heads, size, value,
            size**-0.5 if scale is None else scale, normalize, g.dim() == 3, native.CODES[q.dtype],
            native.num_threads(),
        )  # fmt: skip
        return out
