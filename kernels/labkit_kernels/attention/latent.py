"""The Triton kernel of attention to latents, and its launcher: one key head, whose first numbers are also the values.

`programs.attend` would read a key and, again, its value. Here a tile of latents is loaded once, multiplied with the
queries and then with the weights. What of a key is no value, the part that turns with the position, is a tile of its
own, so that neither is padded: 576 numbers are 512 and 64. Rows are queries x heads; all heads share the key, so 16 to
128 of them make a decode step nearly a product of matrices.

Compiled and interpreted, not measured.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.prepared import Ready, launch
from labkit_kernels.tune import Choice, chosen

from .pages import Again, launches
from .programs import LOG2E, blocks_of, combine

OP = "paged_attention"
FEW = 16  # rows of a decode step's program
MOST_SPLITS = 32


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: dict[str, Any]) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if v_cache.data_ptr() != k_cache.data_ptr() or v_cache.stride() != k_cache.stride():
        return "values that are the first numbers of their keys"
    rank, turned = v_cache.shape[3], q.shape[2] - v_cache.shape[3]
    if k_cache.shape[1] != 1 or k_cache.dtype != q.dtype:
        return "one key head, in the queries' dtype"
    if rank < 16 or rank & (rank - 1) or turned < 1:
        return "values whose size is a power of two, at least 16"
    if any(options.get(name) for name in ("window", "softcap")) or options["scale"] <= 0:
        return "no window and no soft cap"
    if options.get("sinks") is not None or options.get("alibi") is not None:
        return "no sinks and no ALiBi"
    return None


@triton.jit
def visit_latents(
    acc,  # [BLOCK_M, DV]
    most,  # [BLOCK_M], to base 2
    total,
    query,  # [BLOCK_M, DV]
    turned,  # [BLOCK_M, DR]
    k,
    table,
    start,
    stop,
    end_key,
    position,  # [BLOCK_M]
    fold,  # the scale, to base 2
    k_block,
    k_slot,
    DV: tl.constexpr,
    DR: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over the tiles of keys in start .. stop."""
    dim = tl.arange(0, DV)
    more = tl.arange(0, DR)
    block = blocks_of(table, start, end_key, BLOCK_SIZE, BLOCK_N)
    for begin in tl.range(start, stop, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        row = k + (block * k_block + at % BLOCK_SIZE * k_slot)
        block = blocks_of(table, begin + BLOCK_N, end_key, BLOCK_SIZE, BLOCK_N)  # early: the next copies wait for it
        if MASKED:
            here = at < end_key
            latents = tl.load(row[:, None] + dim[None, :], mask=here[:, None], other=0.0)
            both = here[:, None] & (more < ROTATED)[None, :]
            others = tl.load(row[:, None] + DV + more[None, :], mask=both, other=0.0)
        else:
            latents = tl.load(row[:, None] + dim[None, :])
            others = tl.load(row[:, None] + DV + more[None, :], mask=(more < ROTATED)[None, :], other=0.0)
        scores = tl.dot(query, latents.T, input_precision=PRECISION)
        scores = tl.dot(turned, others.T, scores, input_precision=PRECISION) * fold
        if MASKED:
            scores = tl.where(here[None, :] & (at[None, :] <= position[:, None]), scores, float("-inf"))
        grown = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(grown == float("-inf"), 0.0, grown) if MASKED else grown
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(most - shift)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latents.dtype), latents, acc * rescale[:, None], input_precision=PRECISION)
        most = grown
    return acc, most, total


@triton.jit(do_not_specialize=["num_seqs"])
def attend_latents(
    q,
    k,
    out,  # [tokens, heads, DV], dense
    parts,  # [tokens, heads, splits, DV] float32, when split
    stats,  # [tokens, heads, splits, 2] float32: largest score, sum
    table,
    query_start,
    seq_len,
    num_seqs,
    num_heads,
    scale,
    q_token,
    q_head,
    k_block,
    k_slot,
    table_row,
    HEADS: tl.constexpr,  # in one program
    CHUNKS: tl.constexpr,  # programs that all heads take
    DV: tl.constexpr,
    DR: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries x heads against the keys of its sequence, or against this program's share of them."""
    # As in programs.attend: the i-th sequence's blocks begin at query_start[i] // BLOCK_Q + i, the last ones go first.
    chunk = tl.program_id(0) % CHUNKS
    target = (tl.num_programs(0) - 1 - tl.program_id(0)) // CHUNKS
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= target:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    token = tl.load(query_start + seq)
    num_queries = tl.load(query_start + seq + 1) - token
    first_query = (target - (token // BLOCK_Q + seq)) * BLOCK_Q
    if first_query >= num_queries:
        return
    length = tl.load(seq_len + seq)
    token += first_query
    lowest = length - num_queries + first_query  # the first row's position
    end_key = tl.maximum(length - num_queries + tl.minimum(first_query + BLOCK_Q, num_queries), 0)
    begin = 0
    stop = end_key
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end_key, BLOCK_N), tl.num_programs(1)) * BLOCK_N
        begin = share * tl.program_id(1)
        stop = tl.minimum(begin + share, end_key)

    row = tl.arange(0, BLOCK_M)
    query_at = row // HEADS
    head = chunk * HEADS + row % HEADS
    valid = (query_at < BLOCK_Q) & (first_query + query_at < num_queries) & (head < num_heads)
    position = lowest + query_at
    dim = tl.arange(0, DV)
    more = tl.arange(0, DR)
    row_token = (token + query_at).to(tl.int64)
    from_row = q + row_token * q_token + head * q_head
    query = tl.load(from_row[:, None] + dim[None, :], mask=valid[:, None], other=0.0)
    both = valid[:, None] & (more < ROTATED)[None, :]
    turned = tl.load(from_row[:, None] + DV + more[None, :], mask=both, other=0.0)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    table += seq.to(tl.int64) * table_row
    fold = scale * LOG2E
    masked = tl.maximum(tl.minimum((lowest + 1) // BLOCK_N * BLOCK_N, stop), begin)
    acc, most, total = visit_latents(
        acc, most, total, query, turned, k, table, begin, masked, end_key, position, fold, k_block, k_slot, DV, DR,
        ROTATED, BLOCK_SIZE, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, most, total = visit_latents(
        acc, most, total, query, turned, k, table, masked, stop, end_key, position, fold, k_block, k_slot, DV, DR,
        ROTATED, BLOCK_SIZE, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    at = row_token * num_heads + head
    if SPLIT:
        at = at * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts + at[:, None] * DV + dim[None, :], acc, mask=valid[:, None])
        tl.store(stats + at * 2, most, mask=valid)
        tl.store(stats + at * 2 + 1, total, mask=valid)
    else:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + at[:, None] * DV + dim[None, :], result.to(out.dtype.element_ty), mask=valid[:, None])


def tile_of(dtype: torch.dtype, rank: int, few: bool) -> Choice:
    """Rows, keys, warps and stages. From registers and shared memory, not measured: with 64 rows, sums and queries of
    512 numbers spill on sm_90."""
    if dtype == torch.float32:
        return {"rows": 16, "keys": 16, "num_warps": 8, "num_stages": 1 if rank > 256 else 2}
    if few:
        return {"rows": 16, "keys": 32, "num_warps": 8, "num_stages": 3}
    return {"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 2}


def attend_latent(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_len: Tensor,
    *,
    scale: float,
    max_query_len: int = 0,
    max_seq_len: int = 0,
    invariant: bool = False,
    processors: int = 1,  # of the device
    splits: int | None = None,
    key: Hashable | None = None,  # of this class of calls, to keep the launches for
    **_: Any,
) -> Tensor:
    """Whatever `why_not` lets pass."""
    num_tokens, num_heads, size = q.shape
    rank, block_size, num_seqs = v_cache.shape[3], k_cache.shape[2], seq_len.shape[0]
    if not (query_start.is_contiguous() and seq_len.is_contiguous() and q.stride(2) == 1):
        key = None
    q = q if q.stride(2) == 1 else q.contiguous()
    query_start, seq_len = query_start.contiguous(), seq_len.contiguous()
    out = q.new_empty(num_tokens, num_heads, rank)
    if num_tokens == 0 or num_seqs == 0:
        return out
    few = invariant or 0 < max_query_len * num_heads <= FEW
    named = f"latents {'few' if few else 'many'} {rank} {str(q.dtype)[6:]}"
    tile = chosen(OP, named, tile_of(q.dtype, rank, few), q.device)
    heads = min(triton.next_power_of_2(num_heads), tile["rows"])
    block_q, chunks = tile["rows"] // heads, triton.cdiv(num_heads, heads)
    blocks = num_tokens // block_q + num_seqs
    if splits is None:
        bound = max_seq_len or block_table.shape[1] * block_size
        wanted = 2 * processors // max(1, -(-num_tokens // block_q) * chunks)
        splits = max(1, min(wanted, bound // 256, MOST_SPLITS)) if 0 < max_query_len <= FEW else 1
        splits = 1 if invariant else 1 << (splits.bit_length() - 1)
    parts = stats = out
    if splits > 1:
        parts = q.new_empty(num_tokens, num_heads, splits, rank, dtype=torch.float32)
        stats = q.new_empty(num_tokens, num_heads, splits, 2, dtype=torch.float32)
    first = launch(
        attend_latents, (blocks * chunks, splits),
        (q, k_cache, out, parts, stats, block_table, query_start, seq_len),
        (num_seqs, num_heads, scale, q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(2),
         block_table.stride(0)),
        HEADS=heads, CHUNKS=chunks, DV=rank,
        DR=max(16, triton.next_power_of_2(size - rank)), ROTATED=size - rank, BLOCK_SIZE=block_size,
        BLOCK_M=tile["rows"], BLOCK_N=tile["keys"], BLOCK_Q=block_q, SPLIT=splits > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )  # fmt: skip
    second: Ready | None = None
    if splits > 1:
        second = launch(
            combine, (num_tokens, num_heads), (parts, stats, out), (num_heads, splits), VALUE_SIZE=rank, DV=rank,
            SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    if key is not None and first is not None and (second is not None or splits == 1):
        launches.keep(key, _again(first, second, out.shape, parts.shape, stats.shape))
    return out


def _again(first: Ready, second: Ready | None, shape: torch.Size, parts: torch.Size, stats: torch.Size) -> Again:
    """Both launches of a class of calls, as `triton._again`."""

    def again(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_start: Tensor, seq_len: Tensor,
        *_: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        out = q.new_empty(shape)
        sums = some = out
        if second is not None:
            sums, some = q.new_empty(parts, dtype=torch.float32), q.new_empty(stats, dtype=torch.float32)
        done = first(q, k_cache, out, sums, some, block_table, query_start, seq_len)
        return out if done and (second is None or second(sums, some, out)) else None

    return again


_POINTERS = dict.fromkeys(("table", "query_start", "seq_len"), "*i32") | dict.fromkeys(("parts", "stats"), "*fp32")
_STRIDES = ("q_token", "q_head", "k_block", "k_slot")
_NUMBERS = dict.fromkeys((*_STRIDES, "table_row", "num_seqs", "num_heads"), "i32") | {"scale": "fp32"}


def config_of(
    arch: int, few: bool, heads: int = 16, rank: int = 512, dtype: torch.dtype = torch.bfloat16,
    tile: Choice | None = None,
) -> Config:  # fmt: skip
    """What the launcher compiles on this architecture."""
    tile = tile or tile_of(dtype, rank, few)
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    held = min(heads, tile["rows"])
    constants = {
        "HEADS": held, "CHUNKS": -(-heads // held), "DV": rank, "DR": 64, "ROTATED": 64, "BLOCK_SIZE": 16,
        "BLOCK_M": tile["rows"], "BLOCK_N": tile["keys"], "BLOCK_Q": tile["rows"] // held, "SPLIT": few,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "num_warps": tile["num_warps"],
        "num_stages": tile["num_stages"],
    }  # fmt: skip
    types = dict.fromkeys(("q", "k", "out"), kind) | _POINTERS | _NUMBERS
    return Config(attend_latents, types, constants, archs=(arch,), aligned=_STRIDES)


AOT = [config_of(80, True), config_of(90, False, heads=128)]
MORE = [  # `compile --all`
    *(config_of(arch, few, heads) for arch in (80, 90, 100) for few, heads in ((True, 16), (False, 16), (False, 128))),
    *(config_of(80, few, rank=256) for few in (True, False)),
    config_of(80, True, dtype=torch.float32),
]
