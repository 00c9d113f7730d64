"""Paged attention in C++ as a variant for float32 and bfloat16. This module passes pointers and strides; the arithmetic
is in attend.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from labkit_kernels import native
from labkit_kernels.cache.codes import split

from . import paged_attention, reference

POINTERS = ("q", "k", "v", "out", "table", "query_start", "seq_len", "sinks", "alibi")
STRIDES = ("q_token", "q_head", "k_block", "k_head", "k_slot", "v_block", "v_head", "v_slot", "table_row")
COUNTS = (
    "num_seqs", "num_heads", "num_kv_heads", "head_size", "value_size", "block_size", "window", "num_threads",
    "invariant", "code",
)  # fmt: skip


CODES = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}


class Call(ctypes.Structure):
    """`Call` in attend.h, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in STRIDES + COUNTS),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    ]


Functions = dict[torch.dtype, Callable[[Call], None]]


@lru_cache
def _functions(source: str) -> Functions:
    """By dtype of the queries; none if they cannot be built."""
    names = {torch.float32: "paged_attention_float32", torch.bfloat16: "paged_attention_bfloat16"}
    library = native.load(Path(__file__).with_name(source), {name: [ctypes.POINTER(Call)] for name in names.values()})
    return {} if library is None else {dtype: getattr(library, name) for dtype, name in names.items()}


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_len: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    max_query_len: int = 0,
    max_seq_len: int = 0,
    invariant: bool = False,
) -> Tensor:
    """Queries may be a view of a fused projection; the cache may be a view of a larger one. What the kernel does not
    do (a cache of another dtype than the queries' or codes of 8 bits, a scale that is not positive) the reference
    does."""
    code = 0 if k_cache.dtype == q.dtype else CODES.get(k_cache.dtype)
    function = None if code is None else _functions("codes.cpp" if code else "cpu.cpp").get(q.dtype)
    if function is None or v_cache.dtype != k_cache.dtype or not scale > 0:
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks, "alibi": alibi}
        return reference.paged_attention(q, k_cache, v_cache, block_table, query_start, seq_len, **options)
    if code:
        (k_cache, _), (v_cache, _) = split(k_cache), split(v_cache)
    num_tokens, num_heads, size = q.shape
    _, num_kv_heads, block_size, value_size = v_cache.shape
    if q.stride(2) != 1:
        q = q.contiguous()
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("paged_attention on a CPU needs caches whose last dimension is contiguous")
    block_table, query_start, seq_len = (_int32(x) for x in (block_table, query_start, seq_len))
    sinks, alibi = (None if x is None else x.float().contiguous() for x in (sinks, alibi))
    out = q.new_empty(num_tokens, num_heads, value_size)
    call = Call(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        block_table.data_ptr(),
        query_start.data_ptr(),
        seq_len.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        None if alibi is None else alibi.data_ptr(),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        seq_len.shape[0],
        num_heads,
        num_kv_heads,
        size,
        value_size,
        block_size,
        window,
        torch.get_num_threads(),
        invariant,
        code,
        scale,
        softcap,
    )
    function(call)
    return out


def _int32(x: Tensor) -> Tensor:
    if x.dtype != torch.int32:
        x = x.int()
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


if found := _functions("cpu.cpp"):
    attend = paged_attention.variant("cpu", device="cpu", dtypes=tuple(found), picked=True)(attend)
