"""Storing keys and values and copying blocks in C++. Copies runs of bytes, so any dtype works; caches in 8 bits are
filled from float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.cache import copy_blocks, reference, store_kv
from labkit_kernels.cache.codes import split

library = native.load(
    Path(__file__).with_name("cpu.cpp"),
    {
        "store_kv": [c_void_p] * 5 + [c_int64 * 12] + [c_int64] * 3 + [c_int] * 3,
        "copy_blocks": [c_void_p] * 4 + [c_int64] * 2 + [c_int],
    },
)
Lies = c_int64 * 12
CODES = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}

if library is not None:
    _store_kv, _copy_blocks = library.store_kv, library.copy_blocks

    @store_kv.variant("cpu", device="cpu", picked=True)
    def store_kv_cpu(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        if k_cache.stride(3) != 1 or v_cache.stride(3) != 1 or k_cache.dtype != v_cache.dtype:
            return reference.store_kv(k, v, k_cache, v_cache, slots)
        dtype, code = k_cache.dtype, CODES.get(k_cache.dtype, 0)
        if code:
            (k_cache, _), (v_cache, _) = split(k_cache), split(v_cache)
            dtype = k.dtype if k.dtype in native.CODES else torch.float32
        k, v = _as(k, dtype), _as(v, dtype)
        if slots.dtype != torch.int64 or not slots.is_contiguous():
            slots = slots.long().contiguous()
        tokens, heads, _ = k.shape
        _store_kv(
            k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(),
            Lies(*_lie(k, k_cache), *_lie(v, v_cache)), tokens, heads, k_cache.shape[2], native.CODES.get(dtype, 0),
            code, native.num_threads(),
        )  # fmt: skip
        return None

    @copy_blocks.variant("cpu", device="cpu", picked=True)
    def copy_blocks_cpu(caches: Sequence[Tensor], pairs: Tensor) -> None:
        if not all(cache[0].is_contiguous() for cache in caches):
            return reference.copy_blocks(caches, pairs)
        pairs = pairs.long().contiguous()
        count = len(caches)
        items = [cache.element_size() for cache in caches]
        pointers = (c_void_p * count)(*(cache.data_ptr() for cache in caches))
        strides = (c_int64 * count)(*(cache.stride(0) * item for cache, item in zip(caches, items, strict=True)))
        sizes = (c_int64 * count)(*(cache[0].numel() * item for cache, item in zip(caches, items, strict=True)))
        _copy_blocks(pointers, strides, sizes, pairs.data_ptr(), count, pairs.shape[0], native.num_threads())
        return None

    def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x if x.dtype == dtype else x.to(dtype)
        return x if x.stride(2) == 1 else x.contiguous()

    def _lie(x: Tensor, cache: Tensor) -> tuple[int, ...]:
        item, kept = x.element_size(), cache.element_size()
        block, head, place, _ = cache.stride()
        return x.shape[2] * item, x.stride(0) * item, x.stride(1) * item, block * kept, head * kept, place * kept
