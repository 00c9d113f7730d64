"""Rotary position embeddings in C++. This module passes pointers and strides; the arithmetic is in cpu.cpp."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.layout import dense_like
from labkit_kernels.rotary import reference, rope

library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {"rope": [c_void_p] * 8 + [c_int64] * 10 + [c_double] + [c_int] * 4},
)

if library is not None:
    _rope = library.rope

    @rope.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def rope_cpu(
        q: Tensor,
        k: Tensor,
        table: Tensor,
        positions: Tensor,
        *,
        interleaved: bool = False,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        norms = [norm.dtype for norm in (q_norm, k_norm) if norm is not None]
        if any(kind not in native.CODES or kind != norms[0] for kind in norms) or k.dtype != q.dtype:
            return reference.rope(
                q, k, table, positions, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps
            )
        if q.stride(2) != 1:
            q = q.contiguous()
        if k.stride(2) != 1:
            k = k.contiguous()
        if table.dtype != torch.float32 or table.stride(1) != 1:
            table = table.float().contiguous()
        if positions.dtype != torch.int64 or not positions.is_contiguous():
            positions = positions.long().contiguous()
        if q_norm is not None:
            q_norm = q_norm.contiguous()
        if k_norm is not None:
            k_norm = k_norm.contiguous()
        tokens, heads, size = q.shape
        out = dense_like(q), dense_like(k)
        _rope(
            q.data_ptr(), k.data_ptr(), out[0].data_ptr(), out[1].data_ptr(),
            None if q_norm is None else q_norm.data_ptr(), None if k_norm is None else k_norm.data_ptr(),
            table.data_ptr(), positions.data_ptr(), tokens, heads, k.shape[1], size, table.shape[1] // 2,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), table.stride(0), eps,
            interleaved, native.CODES[q.dtype], native.CODES[norms[0]] if norms else 0, native.num_threads(),
        )  # fmt: skip
        return out
