"""The attention that keys get, in C++ for a few queries. This module passes pointers and strides."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.mass import attention_mass, reference

MOST_QUERIES = 4  # of a sequence: with more, torch's products win

library = native.load(
    Path(__file__).with_name("cpu.cpp"), {"attention_mass": [*[c_void_p] * 6, *[c_int64] * 12, c_double, c_int, c_int]}
)

if library is not None:
    _mass = library.attention_mass

    @attention_mass.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def attention_mass_cpu(
        q: Tensor, k_cache: Tensor, block_table: Tensor, query_start: Tensor, seq_len: Tensor, **options: Any
    ) -> Tensor:
        most = options.get("max_query_len") or int(query_start.diff().max())
        special = any(options.get(name) is not None for name in ("sinks", "alibi"))
        special |= any(options.get(name) for name in ("window", "softcap"))
        if special or most > MOST_QUERIES or k_cache.dtype != q.dtype or q.stride(2) != 1 or k_cache.stride(3) != 1:
            return reference.attention_mass(q, k_cache, block_table, query_start, seq_len, **options)
        block_table, query_start, seq_len = (x.int().contiguous() for x in (block_table, query_start, seq_len))
        _, heads, block_size, size = k_cache.shape
        longest = options.get("max_seq_len") or int(seq_len.max())
        out = torch.zeros(len(seq_len), heads, longest)
        _mass(
            q.data_ptr(), k_cache.data_ptr(), block_table.data_ptr(), query_start.data_ptr(), seq_len.data_ptr(),
            out.data_ptr(), len(seq_len), heads, q.shape[1] // heads, size, longest, block_size, *q.stride()[:2],
            *k_cache.stride()[:3], block_table.stride(0), options["scale"], native.CODES[q.dtype], native.num_threads(),
        )  # fmt: skip
        return out
