"""Low-rank products by slot in C++. This module passes pointers and strides; the arithmetic is in cpu.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.lora import lora_expand, lora_shrink, reference
from labkit_kernels.lora.groups import Groups

library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {
        "lora_shrink": [c_void_p, c_int64, *[c_void_p] * 4, c_int64, c_void_p, *[c_int64] * 4, c_int, c_int],
        "lora_expand": [c_void_p, c_int64, *[c_void_p] * 5, *[c_int64] * 7, c_int, c_int],
    },
)

if library is not None:
    _shrink, _expand = library.lora_shrink, library.lora_expand

    @lora_shrink.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def lora_shrink_cpu(
        x: Tensor, a: Tensor, ranks: Tensor, parts: int, groups: Groups, splits: int = 1
    ) -> Tensor:  # fmt: skip
        if x.stride(1) != 1 or x.dtype != a.dtype or splits != 1:
            whole = lora_shrink_cpu(x.contiguous().to(a.dtype), a, ranks, parts, groups)
            return whole if splits == 1 else torch.cat((whole, whole.new_zeros(splits - 1, *whole.shape[1:])))
        _, width, inputs = a.shape
        out = torch.empty(1, len(groups.tokens), width)
        _shrink(
            x.data_ptr(), x.stride(0), a.data_ptr(), ranks.data_ptr(), groups.tokens.data_ptr(),
            groups.tiles.data_ptr(), len(groups.tiles), out.data_ptr(), inputs, width // parts, parts,
            len(groups.tokens), native.CODES[x.dtype], native.num_threads(),
        )  # fmt: skip
        return out

    @lora_expand.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def lora_expand_cpu(
        out: Tensor, t: Tensor, b: Tensor, ranks: Tensor, sizes: Sequence[int], groups: Groups
    ) -> Tensor:  # fmt: skip
        if out.stride(1) != 1 or out.dtype != b.dtype or len(sizes) > 3:
            return reference.lora_expand(out, t, b, ranks, sizes, groups)
        if len(t) > 1:
            t = t.sum(0, keepdim=True)
        _, rank, _ = b.shape
        _expand(
            out.data_ptr(), out.stride(0), t.data_ptr(), b.data_ptr(), ranks.data_ptr(), groups.tokens.data_ptr(),
            groups.tiles.data_ptr(), len(groups.tiles), *sizes, *[0] * (3 - len(sizes)), len(sizes), rank,
            len(groups.tokens), native.CODES[b.dtype], native.num_threads(),
        )  # fmt: skip
        return out
