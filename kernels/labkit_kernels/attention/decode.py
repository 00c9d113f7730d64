"""The Triton kernel of decode attention for small heads.

Several programs fit on a multiprocessor, tiles that every query sees run without masks, and the splits of a sequence
are added up by the last program that arrives, in the same launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .prefill import LOG2E, through


@triton.jit
def decode(
    k_tiles,
    v_tiles,
    q,
    k,
    v,
    out,  # [tokens, heads, D], dense
    parts,  # [sequences x key heads, splits, ROWS, D] float32, when split
    stats,  # [sequences x key heads, splits, 2, ROWS] float32: largest score, sum
    arrived,  # [sequences x key heads] int32, zero before and after
    table,
    query_start,
    seq_len,
    sinks,
    scale,
    q_token,
    q_head,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    table_row,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # sequences with more queries are another kernel's
    BLOCK_M: tl.constexpr,  # BLOCK_Q * GROUP, padded
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,  # padded to a power of two; 1: not split
    TMA: tl.constexpr,
):
    """The queries of a sequence and of the heads that share a key head, against this program's share of the keys."""
    kv_head = tl.program_id(0) % KV_HEADS
    seq = tl.program_id(0) // KV_HEADS
    token = tl.load(query_start + seq)
    num_queries = tl.load(query_start + seq + 1) - token
    if (num_queries == 0) | (num_queries > BLOCK_Q):
        return
    length = tl.load(seq_len + seq)
    lowest = length - num_queries  # the first query's position
    end_key = tl.maximum(length, 0)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(lowest - WINDOW + 1, 0)
    begin = first_key // BLOCK_N * BLOCK_N
    stop = end_key
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end_key - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
        begin += share * tl.program_id(1)
        stop = tl.minimum(begin + share, end_key)

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D)
    query_at = row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = query_at < num_queries
    position = lowest + query_at
    row_token = (token + query_at).to(tl.int64)
    at = row_token[:, None] * q_token + head[:, None] * q_head + dim[None, :]
    query = tl.load(q + at, mask=valid[:, None], other=0.0)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # in the first part only
        most = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) / scale
        most = tl.where(tl.program_id(1) == 0, most, float("-inf"))
        total = tl.where(most > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    fold = scale * LOG2E
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    table += seq.to(tl.int64) * table_row

    whole = begin
    if WINDOW > 0:  # from here on the last query sees every key
        whole = tl.cdiv(tl.maximum(end_key - WINDOW, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(stop, begin))
        acc, most, total = through(
            acc, most, total, query, k_tiles, v_tiles, k, v, table, begin, whole, first_key, end_key, position, fold,
            k_block, k_slot, v_block, v_slot, kv_head, KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, True, TMA,
        )  # fmt: skip
    masked = tl.maximum(tl.minimum((lowest + 1) // BLOCK_N * BLOCK_N, stop), whole)
    acc, most, total = through(
        acc, most, total, query, k_tiles, v_tiles, k, v, table, whole, masked, first_key, end_key, position, fold,
        k_block, k_slot, v_block, v_slot, kv_head, KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, False, TMA,
    )  # fmt: skip
    acc, most, total = through(
        acc, most, total, query, k_tiles, v_tiles, k, v, table, masked, stop, first_key, end_key, position, fold,
        k_block, k_slot, v_block, v_slot, kv_head, KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, True, TMA,
    )  # fmt: skip

    num_heads = KV_HEADS * GROUP
    if SPLITS == 1:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to = (row_token * num_heads + head)[:, None] * D + dim[None, :]
        tl.store(out + to, result.to(out.dtype.element_ty), mask=valid[:, None])
    else:
        splits = tl.num_programs(1)
        mine = tl.program_id(0).to(tl.int64) * splits + tl.program_id(1)
        tl.store(parts + mine * (BLOCK_M * D) + row[:, None] * D + dim[None, :], acc, mask=valid[:, None])
        tl.store(stats + mine * (2 * BLOCK_M) + row, most, mask=valid)
        tl.store(stats + mine * (2 * BLOCK_M) + BLOCK_M + row, total, mask=valid)
        tl.debug_barrier()  # every thread's part is stored before the program counts as arrived
        if tl.atomic_add(arrived + tl.program_id(0), 1) == splits - 1:
            tl.store(arrived + tl.program_id(0), 0)
            split = tl.program_id(0).to(tl.int64) * splits + tl.arange(0, SPLITS)
            present = tl.arange(0, SPLITS) < splits
            for i in tl.range(0, num_queries * GROUP):
                stat = stats + split * (2 * BLOCK_M) + i
                tops = tl.load(stat, mask=present, other=float("-inf"), cache_modifier=".cg")
                sums = tl.load(stat + BLOCK_M, mask=present, other=0.0, cache_modifier=".cg")
                source = parts + split[:, None] * (BLOCK_M * D) + i * D + dim[None, :]
                part = tl.load(source, mask=present[:, None], other=0.0, cache_modifier=".cg")
                largest = tl.max(tops, 0)
                by = tl.exp2((tops - tl.where(largest == float("-inf"), 0.0, largest)) * fold)
                all_sums = tl.sum(sums * by, 0)
                result = tl.sum(part * by[:, None], 0) / tl.where(all_sums == 0.0, 1.0, all_sums)
                to = ((token + i // GROUP).to(tl.int64) * num_heads + kv_head * GROUP + i % GROUP) * D + dim
                tl.store(out + to, result.to(out.dtype.element_ty))
