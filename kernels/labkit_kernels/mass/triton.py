"""The attention that keys get, on a GPU, as two Triton kernels.

A key's share of a query's attention needs the query's sum over all keys, which is known only after all were read. So
keys are read twice: the first kernel takes each query's log-sum, the second adds up shares by key. A program of the
second holds a tile of keys and goes through the queries that see it, so no two programs add to one number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.mass import attention_mass, reference
from labkit_kernels.prepared import Launches, launch

_launches = Launches()
QUERIES, KEYS = 16, 64  # that a program multiplies at a time
LOG2E = 1.4426950408889634


@triton.jit
def _keys(k, table, at, length, d, SIZE: tl.constexpr, BLOCK: tl.constexpr, k_block, k_slot):
    real = at < length
    block = tl.load(table + at // BLOCK, mask=real, other=0).to(tl.int64)
    place = block * k_block + (at % BLOCK) * k_slot
    return tl.load(k + place[:, None] + d[None, :], mask=real[:, None] & (d < SIZE)[None, :], other=0.0)


@triton.jit
def _lse(
    q, k, table, query_start, seq_len, lse, scale, q_token, q_head, k_block, k_head, k_slot, table_row, heads,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    seq, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(query_start + seq + 1)
    first = tl.load(query_start + seq) + tile * QUERIES
    length = tl.load(seq_len + seq)
    if first < end:
        d = tl.arange(0, PADDED)
        at = first + tl.arange(0, QUERIES)
        inside = (at < end)[:, None] & (d < SIZE)[None, :]
        queries = tl.load(q + at[:, None].to(tl.int64) * q_token + head * q_head + d[None, :], mask=inside, other=0.0)
        position = length - (end - at)
        most = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        for begin in range(0, length - (end - min(first + QUERIES, end)), KEYS):
            key_at = begin + tl.arange(0, KEYS)
            keys = _keys(
                k + head // GROUP * k_head, table + seq * table_row, key_at, length, d, SIZE, BLOCK, k_block, k_slot
            )
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee" if EXACT else "tf32") * scale
            scores = tl.where(key_at[None, :] <= position[:, None], scores, float("-inf"))
            new = tl.maximum(most, tl.max(scores, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # nothing is seen yet
            total = total * tl.exp2(most - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
            most = new
        tl.store(lse + at * heads + head, most + tl.log2(total), mask=at < end)


@triton.jit
def _mass(
    q, k, table, query_start, seq_len, lse, out, scale, q_token, q_head, k_block, k_head, k_slot, table_row, heads,
    longest, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    seq, key_head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(query_start + seq), tl.load(query_start + seq + 1)
    length = tl.load(seq_len + seq)
    key_at = tile * KEYS + tl.arange(0, KEYS)
    if tile * KEYS < length:
        d = tl.arange(0, PADDED)
        keys = _keys(k + key_head * k_head, table + seq * table_row, key_at, length, d, SIZE, BLOCK, k_block, k_slot)
        total = tl.zeros([KEYS], tl.float32)
        for head in range(key_head * GROUP, (key_head + 1) * GROUP):
            for first in range(start, end, QUERIES):
                at = first + tl.arange(0, QUERIES)
                inside = at < end
                place = q + at[:, None].to(tl.int64) * q_token + head * q_head + d[None, :]
                queries = tl.load(place, mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
                sums = tl.load(lse + at * heads + head, mask=inside, other=0.0)
                scores = tl.dot(queries, tl.trans(keys), input_precision="ieee" if EXACT else "tf32") * scale
                seen = (key_at[None, :] <= (length - (end - at))[:, None]) & inside[:, None]
                total += tl.sum(tl.where(seen, tl.exp2(scores - sums[:, None]), 0.0), 0)
        line = (seq * tl.num_programs(1) + key_head).to(tl.int64) * longest
        tl.store(out + line + key_at, total, mask=key_at < length)


@attention_mass.variant("triton", device="cuda", picked=True)
def attention_mass_triton(
    q: Tensor, k_cache: Tensor, block_table: Tensor, query_start: Tensor, seq_len: Tensor, **options: Any
) -> Tensor:
    special = any(options.get(name) is not None for name in ("sinks", "alibi"))
    special |= any(options.get(name) for name in ("window", "softcap"))
    if special or k_cache.dtype != q.dtype or q.stride(2) != 1 or k_cache.stride(3) != 1:
        return reference.attention_mass(q, k_cache, block_table, query_start, seq_len, **options)
    (tokens, heads, size), (_, key_heads, block, _) = q.shape, k_cache.shape
    where = (block_table, query_start, seq_len)
    key = (
        q.get_device(), q.dtype, q.shape, q.stride(), k_cache.shape, k_cache.stride(), block_table.stride(0),
        *(x.dtype for x in where), len(seq_len), *map(options.get, ("scale", "max_query_len", "max_seq_len")),
    )  # fmt: skip
    if (kept := _launches.get(key)) is not None:
        first, second, longest = kept
        out, lse = zeros_for(q, seq_len, key_heads, longest)
        if first(q, k_cache, *where, lse) and second(q, k_cache, *where, lse, out):
            return out
    queries = options.get("max_query_len") or int(query_start.diff().max())
    longest = options.get("max_seq_len") or int(seq_len.max())
    out, lse = zeros_for(q, seq_len, key_heads, longest)
    if not tokens or not longest:
        return out
    numbers = (options["scale"] * LOG2E, *q.stride()[:2], *k_cache.stride()[:3], block_table.stride(0), heads)
    fixed = {
        "GROUP": heads // key_heads, "SIZE": size, "PADDED": max(16, triton.next_power_of_2(size)), "BLOCK": block,
        "QUERIES": QUERIES, "KEYS": KEYS, "EXACT": q.dtype == torch.float32, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    first = launch(
        _lse, (len(seq_len), heads, triton.cdiv(queries, QUERIES)), (q, k_cache, *where, lse), numbers, **fixed
    )
    second = launch(
        _mass, (len(seq_len), key_heads, triton.cdiv(longest, KEYS)), (q, k_cache, *where, lse, out),
        (*numbers, longest), **fixed,
    )  # fmt: skip
    known = options.get("max_query_len") and options.get("max_seq_len")  # else they were read from the device
    if known and first is not None and second is not None:
        _launches.keep(key, (first, second, longest))
    return out


def zeros_for(q: Tensor, seq_len: Tensor, key_heads: int, longest: int) -> tuple[Tensor, Tensor]:
    """The output, and room for each query's sum."""
    kind = {"dtype": torch.float32}
    return q.new_zeros((len(seq_len), key_heads, longest), **kind), q.new_empty(q.shape[:2], **kind)


def _config(kernel: object, kind: str, size: int) -> Config:
    pointers = dict.fromkeys(("q", "k"), f"*{kind}")
    pointers |= dict.fromkeys(("table", "query_start", "seq_len"), "*i32") | {"lse": "*fp32"}
    integers = ["q_token", "q_head", "k_block", "k_head", "k_slot", "table_row", "heads"]
    if kernel is _mass:
        pointers["out"] = "*fp32"
        integers.append("longest")
    constants: dict[str, int | bool] = {
        "GROUP": 2, "SIZE": size, "PADDED": size, "BLOCK": 16, "QUERIES": QUERIES, "KEYS": KEYS,
        "EXACT": kind == "fp32", "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    return Config(kernel, pointers | {"scale": "fp32"} | dict.fromkeys(integers, "i32"), constants)


AOT = {
    "attention_mass": [
        _config(kernel, kind, size)
        for kernel in (_lse, _mass)
        for kind, size in (("bf16", 64), ("bf16", 128), ("fp32", 64))
    ]
}
